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

from dst.config import ConfigError, quoted
from dst.layers.base import Layer

Array = jax.Array

MOST_STEPS = 300  # that an optimizer may accumulate, or wait, before it moves the kernels


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

    Global norms and masks by a parameter's name are fine. A few steps are taken on small kernels,
    and on the same numbers as one vector, params["arena"]["kernel"]. What an optimizer raises on
    ordinary kernels too is its own error, and raised as it is.
    """
    rest = traverse_util.flatten_dict(jax.eval_shape(lambda: params), sep="/")
    try:
        alike = _same_steps(tx, rest, layers) and _same_state(tx, rest, layers)
    except ConfigError:  # moments in no parameter's shape
        alike = False
    except (
        Exception
    ) as error:  # whatever an optimizer makes of parameters that it was not built for
        _step_kernels(tx, rest, layers)
        raise ConfigError(
            f"the optimizer fails with {quoted(error)} in execution 'sparse', where "
            "all connections are one vector; use one that works coordinate by coordinate (SGD, "
            "Adam, AdamW, a global norm, ...)."
        ) from error
    if not alike:
        raise ConfigError(
            "the optimizer treats kernels by their shape or layer (as LAMB, Adafactor, Muon or a "
            "mask by ndim do), but in execution 'sparse' all connections are one vector; use one "
            "that works coordinate by coordinate (SGD, Adam, AdamW, a global norm, ...)."
        )


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(n, 3 - i % 2) for i, n in enumerate(shape))


def _same_steps(tx, rest: dict[str, Any], layers: Mapping[str, Layer]) -> bool:
    """Whether small kernels and the same numbers as one vector take the same steps.

    Until the kernels have moved twice: gradients may be accumulated, a schedule may begin at 0.
    """
    rng, update = np.random.default_rng(0), jax.jit(tx.update)

    def nest(flat: dict[str, np.ndarray]) -> Any:
        flat = {path: leaf.astype(np.float32) for path, leaf in flat.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def draw(scale: float) -> tuple[Any, Any]:
        other = {k: scale * rng.normal(size=_small(v.shape)) for k, v in rest.items()}
        own = {p: scale * rng.normal(size=_small(layer.shape)) for p, layer in layers.items()}
        vector = np.concatenate([kernel.ravel() for kernel in own.values()])
        kernels = {f"{path}/kernel": kernel for path, kernel in own.items()}
        return nest(other | kernels), nest(other | {"arena/kernel": vector})

    def step(weights: Any, gradient: Any, state: Any) -> tuple[tuple[Any, Any], Any]:
        updates, state = update(gradient, state, weights)
        flat = traverse_util.flatten_dict(updates, sep="/")
        own = [flat.pop(f"{p}/kernel").ravel() for p in layers if f"{p}/kernel" in flat]
        return (np.concatenate(own or [flat.pop("arena/kernel")]), flat), state

    def close(one: Any, other: Any) -> bool:
        return jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, 1e-4, 0), one, other))

    # Large weights show their decay, large gradients what is clipped.
    for weight, gradient in ((1e4, 1), (1, 1e4)):
        weights = draw(weight)
        states = tuple(tx.init(w) for w in weights)
        moves = 0
        for _ in range(MOST_STEPS):
            taken = map(step, weights, draw(gradient), states)
            (one, other), states = zip(*taken, strict=True)
            if not close(one, other):
                return False
            moves += bool(np.any(one[0]))
            if moves == 2:
                break
    return True


def _same_state(tx, rest: dict[str, Any], layers: Mapping[str, Layer]) -> bool:
    """Whether the kernels' real shapes give the same kinds of moments as small ones."""

    def owners(shapes: dict[str, tuple[int, ...]]) -> list[str | None]:
        params = _parameters(rest, shapes)
        kernels = {path: jax.ShapeDtypeStruct(s, np.float32) for path, s in shapes.items()}
        return recognise(jax.eval_shape(tx.init, params), params, kernels)

    real = {path: layer.shape for path, layer in layers.items()}
    return owners(real) == owners({path: _small(shape) for path, shape in real.items()})


def _step_kernels(tx, rest: dict[str, Any], layers: Mapping[str, Layer]) -> None:
    """One step on the kernels themselves, as shapes. Errors: the optimizer's own."""
    params = _parameters(rest, {path: layer.shape for path, layer in layers.items()})
    jax.eval_shape(lambda w: tx.update(w, tx.init(w), w), params)


def _parameters(rest: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """The parameters with kernels of these shapes: {layer path: shape}."""
    kernels = {f"{path}/kernel": jax.ShapeDtypeStruct(s, np.float32) for path, s in shapes.items()}
    return traverse_util.unflatten_dict(rest | kernels, sep="/")
