"""The optimizer's moments of connections that do not exist: recognised once, held at their start.

Any optax optimizer keeps some arrays in the shape of the parameters. Those that belong to a sparse
kernel are found by name, not by type, so chains, `MultiSteps` and `multi_transform` need nothing.

`optax.tree_map_params` finds the same ones, which a test holds, but it calls `tx.init` with no
parameters at all: an optimizer that looks at them (L-BFGS, or a user's that iterates over their
items) fails. And what `carry` moves has no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util

from dst.errors import ConfigError, quoted
from dst.layers.base import Layer
from dst.optimizer import extended

Array = jax.Array

MOST_STEPS = 300  # that an optimizer may accumulate, or wait, before it moves the kernels


def recognise(opt_state: Any, params: Any, masks: Mapping[str, Any]) -> list[str | None]:
    """The sparse layer of each leaf of `opt_state`, None for what belongs to none.

    A leaf belongs to a parameter if its path ends in the parameter's and it has its shape. Raises:
    a leaf as large as a sparse kernel that belongs to no parameter.
    """
    owners = {name: leaf.shape for name, leaf in _named(params)}
    layers = {f"{path}/kernel": path for path in masks}
    # A leaf of one number is a count or a norm, whatever the layers are.
    smallest = min((mask.size for mask in masks.values() if mask.size > 1), default=math.inf)
    found: list[str | None] = []
    for name, leaf in _named(opt_state):
        keys = name.split("/")
        tails = ("/".join(keys[i:]) for i in range(len(keys)))
        owner = next((tail for tail in tails if owners.get(tail) == leaf.shape), "")
        if not owner and leaf.size >= smallest:
            raise ConfigError(
                f"optimizer state {name!r} of shape {leaf.shape} belongs to no parameter of that "
                "shape, so it cannot be kept sparse; use an optimizer that works coordinate by "
                "coordinate (SGD, Adam, ...)."
            )
        found.append(layers.get(owner))
    return found


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with their paths, as in 'mu/Dense_0/kernel'."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


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
    except Exception as error:  # whatever it makes of parameters that it was not built for
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
    rng, update = np.random.default_rng(0), jax.jit(extended(tx).update)

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
        updates, state = update(gradient, state, weights, value=np.float32(1), grad=gradient)
        flat = traverse_util.flatten_dict(updates, sep="/")
        own = [flat.pop(f"{p}/kernel").ravel() for p in layers if f"{p}/kernel" in flat]
        return (np.concatenate(own or [flat.pop("arena/kernel")]), flat), state

    def same(a: Any, b: Any) -> bool:
        # Where gradients nearly cancel in a moment, the rounding of a global norm shows.
        return np.allclose(a, b, 1e-4, 1e-5 * np.max(np.abs(b), initial=0))

    def close(one: Any, other: Any) -> bool:
        return jax.tree.all(jax.tree.map(same, one, other))

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
    """One step on the kernels themselves, as shapes. Raises: the optimizer's own."""
    params = _parameters(rest, {path: layer.shape for path, layer in layers.items()})
    step = lambda w: extended(tx).update(w, tx.init(w), w, value=0.0, grad=w)  # noqa: E731
    jax.eval_shape(step, params)


def _parameters(rest: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """The parameters with kernels of these shapes: {layer path: shape}."""
    kernels = {f"{path}/kernel": jax.ShapeDtypeStruct(s, np.float32) for path, s in shapes.items()}
    return traverse_util.unflatten_dict(rest | kernels, sep="/")
