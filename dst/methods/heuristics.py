"""Where promising connections are looked for: marginals f over inputs and g over outputs.

A heuristic measures {path: (f, g)} with f (n_in,) and g (n_out,), non-negative and not normalised.
A connection is then drawn with probability f_a g_b; in a convolution a and b are channels and the
kernel position is uniform (App. C), unless f tells the positions apart: (kx ky n_in,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.axis import AXIS
from dst.connections.base import Connections
from dst.connections.execution import arena_parts, linear, part_call, variables_of
from dst.errors import ConfigError
from dst.layers import BUILT_IN, Layer, kind_of
from dst.loss import Loss, run_loss
from dst.network import Network, input_of, layer_path
from dst.observe import marginals, observe_and_sum
from dst.state import SparseState, stream
from dst.vocabulary import Names

Array = jax.Array
Layers = Mapping[str, Layer]
Marginals = dict[str, tuple[Array, Array]]
Units = Mapping[str, tuple[Array, Array]]  # h and delta of every layer, from `observe`

SKETCH_STREAM = 3  # GraEst's signs, beside the streams of `dst.update`


class Seen(NamedTuple):
    """What one pass tells, of some layers h and delta, of others only their sums."""

    units: Units
    sums: Marginals  # of |h| and |delta|, on one device


class Heuristic(NamedTuple):
    """How f x g is found: from what a pass sees, or before the jitted step."""

    measure: Callable[[Network, SparseState, Seen], Marginals] | None
    sums: bool = False  # needs the sums of |h| and |delta|, or h and delta themselves
    holds: bool = False  # needs h and delta of all layers
    on_host: Callable[[Network], Callable[[SparseState], Marginals]] | None = None
    words: Callable[[Network, float], float] = lambda net, density: 0.0  # a possible connection
    examples: str = "batch"  # of which a pass is taken: "none", "one" or "batch"


def look(held: Layers, summed: Layers, value: Callable, state: SparseState) -> Seen:
    """One pass that holds h and delta of some layers and sums those of others; none for none."""
    if not held and not summed:
        return Seen({}, {})
    return Seen(*observe_and_sum(held, summed, value, state.masks.reads_maps))


def uniform(net: Network, state: SparseState, seen: Seen) -> Marginals:
    """Eq. 1: every input and every output unit alike."""
    return {p: (jnp.ones(layer.n_in), jnp.ones(layer.n_out)) for p, layer in net.layers.items()}


def grabo(net: Network, state: SparseState, seen: Seen) -> Marginals:
    """Eq. 7: f = sum_b |h_b|, g = sum_b |delta_b|, whose product bounds |G| (Eq. 6)."""

    def total(a: Array) -> Array:
        return jnp.sum(jnp.abs(a), axis=tuple(range(1, a.ndim)), dtype=jnp.float32)

    of_units = {path: tuple(map(total, pair)) for path, pair in seen.units.items()}
    return paired(net, lax.psum({**of_units, **seen.sums}, AXIS))


def graest(net: Network, state: SparseState, seen: Seen) -> Marginals:
    """GraEst: f = |sum_b r_b h_b|, g = |sum_b r_b delta_b| with random signs r (an AMS sketch).

    The product of the signed sums is G in expectation. In a convolution every output position of
    every image has a sign, and f is that of the columns (kx, ky, i): (kx ky n_in,). Each device has
    its own signs.
    """
    key = jax.random.fold_in(stream(state, SKETCH_STREAM), lax.axis_index(AXIS))
    sums = {}
    for l, (path, layer) in enumerate(net.layers.items()):
        h, delta = seen.units[path]
        sign = jax.random.rademacher(jax.random.fold_in(key, l), delta.shape[1:], delta.dtype)
        sums[path] = layer.signed_sums(h, delta, sign)
    return paired(net, jax.tree.map(jnp.abs, lax.psum(sums, AXIS)))


def paired(net: Network, fg: Marginals) -> Marginals:
    """f and g of units as those of each kernel's pairs, see `Layer.paired`."""
    return {path: net.layers[path].paired(f, g) for path, (f, g) in fg.items()}


def synflow(net: Network) -> Callable[[SparseState], Marginals]:
    """Eq. 3: f the synaptic flow into a layer's inputs, g out of its outputs, in float64.

    Runs on the host side of the rewire: R of ResNet-56 is near 1e70, beyond float32, and x64 cannot
    be switched on inside a float32 program. Raises: a network whose flow is not finite or not
    positively homogeneous in its weights.
    """
    subject, instead = "heuristic is 'synflow'", "use 'grabo' or 'uniform'"
    check_inputs(net, subject, instead)
    measure = jax.jit(functools.partial(synaptic_flow, net))

    def flow(state: SparseState) -> Marginals:
        with jax.enable_x64(True):
            R, R_of_double, fg = measure(state.params, state.masks, state.batch_stats)
            check_flow(R, R_of_double, subject, instead)
        return fg

    return flow


def check_inputs(net: Network, subject: str, instead: str) -> None:
    """`ConfigError` if the model's inputs cannot carry a flow."""
    for leaf in jax.tree.leaves(net.args):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                f"{subject}, but the model takes {leaf.dtype} inputs, which cannot carry a flow; "
                f"{instead}."
            )


def check_flow(R: Array, R_of_double: Array, subject: str, instead: str) -> None:
    """`ConfigError` if the flow is not finite or does not double with its inputs."""
    if not abs(float(R_of_double) - 2 * float(R)) <= 1e-6 * abs(float(R)) + NOTHING:
        raise ConfigError(
            f"{subject}, but the flow is infinite or not positively homogeneous (R(2x) is "
            f"{float(R_of_double):.6g}, R(x) is {float(R):.6g}); {instead}."
        )


# The flow that every unit of SynFlow's twin has at least: the slope of ReLU at 0 is 0, and would
# hide from g the units that nothing reaches. In float64 it is lost beside any real flow, and what
# is below NOTHING counts as 0.
TRACE, NOTHING = 1e-300, 1e-150


def _units(net: Network, density: float) -> float:
    units = sum(layer.n_in + layer.n_out for layer in net.layers.values())
    return units / net.possible


def _columns(net: Network, density: float) -> float:
    """GraEst has an f for each column (kx, ky, i) of a convolution."""
    return sum(layer.columns + layer.n_out for layer in net.layers.values()) / net.possible


HEURISTICS = Names(
    "heuristic",
    Heuristic,
    dict(
        uniform=Heuristic(uniform, examples="none"),
        grabo=Heuristic(grabo, sums=True, words=_units),
        # A float64 copy of the connections and its gradient.
        synflow=Heuristic(
            None, on_host=synflow, words=lambda net, density: 4 * density, examples="one"
        ),
        graest=Heuristic(graest, holds=True, words=_columns),
    ),
)


def marginals_of(
    net: Network, loss: Loss, heuristic: Heuristic
) -> Callable[[SparseState, Any], Marginals]:
    """f x g alone: (state, batch) -> {path: (f, g)}, on one device's share of the batch."""
    find = heuristic.measure
    if find is None:
        flow = heuristic.on_host(net)  # type: ignore[misc]
        return lambda state, batch: flow(state)

    def run(state: SparseState, batch: Any) -> Marginals:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        held = net.layers if heuristic.holds else {}
        summed = net.layers if heuristic.sums and not held else {}
        return find(net, state, look(held, summed, value, state))

    return run


def synaptic_flow(
    net: Network, params: Any, connections: Connections, collections: Mapping[str, Any]
) -> tuple[Array, Array, Marginals]:
    """R(1), R(2 * 1) and the normalised float32 marginals of Eq. 3."""
    total = functools.partial(total_flow, net, params, connections)
    R, double = total(collections), total(collections, 2.0)
    # The scale of R cancels in f and g; dividing by it keeps the cotangents in range. If a layer
    # has collapsed, R is nothing, and f x g is where connections would mend it.
    flow = lambda extra: total({**collections, **extra}) / jnp.maximum(R, NOTHING)  # noqa: E731
    fg = paired(net, marginals(net.layers, flow, jnp.float64))
    unit = lambda v: (v / jnp.maximum(v.sum(), NOTHING)).astype(jnp.float32)  # noqa: E731
    return R, double, {path: (unit(f), unit(g)) for path, (f, g) in fg.items()}


def total_flow(
    net: Network,
    params: Any,
    connections: Connections,
    collections: Mapping[str, Any],
    value: float | Array = 1.0,
) -> Array:
    """R of Eq. 3: the sum of the linear twin's outputs for an input of `value`, batch 1, float64.

    The twin has |w| for w, no biases, and |scale| / sqrt(var + eps) for batch normalisation.
    """
    variables = variables_of(_linear(params), connections, collections)
    inputs = jax.tree.map(lambda a: jnp.full((1, *a.shape[1:]), value, jnp.float64), net.args)
    with nn.intercept_methods(without_dropout), nn.intercept_methods(_twin(net, connections)):
        return jnp.sum(net.model.apply(variables, *inputs, **net.kwargs, mutable=True)[0])


def without_dropout(next_fun, args, kwargs, context):
    """Interceptor: `nn.Dropout` hands its input on, so that nothing is random."""
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return args[0] if args else kwargs["inputs"]
    return next_fun(*args, **kwargs)


def _linear(params: Any) -> Any:
    """|w| for every parameter, in float64, and 0 for biases."""

    def magnitude(path, leaf):
        return jnp.abs(leaf).astype(jnp.float64) * (path[-1].key != "bias")

    return jax.tree_util.tree_map_with_path(magnitude, params)


def _twin(net: Network, connections: Connections) -> Callable:
    """Interceptor: layers and BatchNorm as in the linear twin, in float64."""
    sparse = arena_parts(connections)

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, nn.BatchNorm):
                return _normalise(module, args[0] if args else kwargs["x"])
            if call := part_call(sparse, args, kwargs, context):
                part, h = call
                return linear(part, module, h, frozen=True)[0] + TRACE
            kind = kind_of(module)
            chosen = kind in BUILT_IN or layer_path(module) in net.layers
            if kind and chosen and kind.obstacle(module) is None:
                h, kernel = input_of(module, args, kwargs), module.get_variable("params", "kernel")
                layer = kind.describe("", module, h)
                y = layer.apply(layer.inputs(h), kernel.reshape(layer.dims))
                return layer.outputs(y) + TRACE
        return next_fun(*args, **kwargs)

    return interceptor


def _normalise(norm: nn.BatchNorm, x: Array) -> Array:
    """x |scale| / sqrt(var + eps): batch normalisation without mean and bias."""
    scale = norm.get_variable("params", "scale") if norm.use_scale else 1.0
    factor = scale / jnp.sqrt(norm.get_variable("batch_stats", "var") + norm.epsilon)
    axes = {axis % x.ndim for axis in np.atleast_1d(norm.axis)}
    return x * jnp.expand_dims(factor, [axis for axis in range(x.ndim) if axis not in axes])
