"""The optimizer's moments of connections that do not exist: recognised once, held at their start.

Any optax optimizer keeps some arrays in the shape of the parameters. Those that belong to a sparse
kernel are found by name, not by type, so chains, `MultiSteps` and `multi_transform` need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from dst.config import ConfigError
from dst.network import Layer

Array = jax.Array


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def recognise(opt_state: Any, params: Any, masks: Mapping[str, Any]) -> list[str | None]:
    """The sparse layer of each leaf of `opt_state`, None for what belongs to none.

    A leaf belongs to a parameter if its path ends in the parameter's and it has its shape. Errors:
    a leaf as large as a sparse kernel that belongs to no parameter.
    """
    owners = {
        _names(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    layers = {(*path.split("/"), "kernel"): path for path in masks}
    smallest = min((mask.size for mask in masks.values()), default=math.inf)
    found: list[str | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        names = _names(path)
        tails = [names[i:] for i in range(len(names))]
        owner = next((t for t in tails if owners.get(t) == leaf.shape), None)
        if owner is None and leaf.size >= smallest > 1:
            raise ConfigError(
                f"optimizer state {'/'.join(names)!r} of shape {leaf.shape} belongs to no "
                "parameter of that shape, so it cannot be kept sparse; use an optimizer that works "
                "coordinate by coordinate (SGD, Adam, ...)."
            )
        found.append(layers.get(owner) if owner else None)
    return found


def reset_inactive(opt_state: Any, fresh: Any, owners: list[str | None], keep: Mapping[str, Array]):
    """`opt_state` with `fresh` (the value of `tx.init`) wherever the layer's `keep` is False."""
    leaves, treedef = jax.tree.flatten(opt_state)
    starts = jax.tree.leaves(fresh)
    kept = [
        leaf if path is None else jnp.where(keep[path], leaf, start)
        for leaf, start, path in zip(leaves, starts, owners, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)


def refuse_unless_coordinate_wise(
    tx: optax.GradientTransformation, params: Any, layers: Mapping[str, Layer]
) -> None:
    """Refuses an optimizer that would treat one vector of all connections unlike the kernels.

    Global norms and masks by a parameter's name are fine. Two steps are taken on small kernels and
    on the same numbers as one vector, params["arena"]["kernel"].
    """
    rng = np.random.default_rng(0)
    small = lambda shape: tuple(min(n, 3 - (i % 2)) for i, n in enumerate(shape))  # noqa: E731
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rest = jax.eval_shape(lambda: params)
    kernels = {path: small(layer.shape) for path, layer in layers.items()}

    def both(scale):
        others = jax.tree.map(lambda leaf: scale * draw(small(leaf.shape)), rest)
        own = {path: scale * draw(shape) for path, shape in kernels.items()}
        flat = traverse_util.flatten_dict(others, sep="/")
        apart = traverse_util.unflatten_dict(
            flat | {f"{path}/kernel": kernel for path, kernel in own.items()}, sep="/"
        )
        vector = np.concatenate([kernel.ravel() for kernel in own.values()])
        return apart, {**others, "arena": {"kernel": vector}}

    def steps(weights, gradients):
        state = tx.init(weights)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, weights)
        flat = traverse_util.flatten_dict(updates, sep="/")
        own = [flat.pop(f"{path}/kernel").ravel() for path in layers if f"{path}/kernel" in flat]
        return np.concatenate(own or [flat.pop("arena/kernel")]), flat

    def owners(shapes):
        weights = traverse_util.flatten_dict(rest, sep="/")
        weights |= {
            f"{path}/kernel": jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in shapes.items()
        }
        tree = traverse_util.unflatten_dict(weights, sep="/")
        leaves = {path: tree_leaf(tree, path) for path in shapes}
        return recognise(jax.eval_shape(tx.init, tree), tree, leaves)

    tree_leaf = lambda tree, path: traverse_util.flatten_dict(tree, sep="/")[f"{path}/kernel"]  # noqa: E731
    try:
        (w, v), *gradients = both(1e4), both(1), both(1)  # large weights: their decay shows
        one, other = (steps(x, g) for x, g in zip((w, v), zip(*gradients, strict=True), strict=True))
        alike = jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, 1e-4, 0), one, other))
        real = {path: layer.shape for path, layer in layers.items()}
        alike = alike and owners(real) == owners(kernels)
    except Exception:  # whatever an optimizer makes of parameters that it was not built for
        alike = False
    if not alike:
        raise ConfigError(
            "the optimizer treats kernels by their shape or layer (as LAMB, Adafactor, Muon or a "
            "mask by ndim do), but in execution 'sparse' all connections are one vector; use one "
            "that works coordinate by coordinate (SGD, Adam, AdamW, a global norm, ...)."
        )
