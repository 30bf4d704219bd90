"""Where promising connections are looked for: marginals f over inputs and g over outputs.

A heuristic is (net, loss) -> measure, and measure(state, batch) -> {path: (f, g)} with f (n_in,)
and g (n_out,), non-negative and not normalised. A connection is then drawn with probability
f_a g_b; in a convolution a and b are channels and the kernel position is uniform (App. C), unless
f tells the positions apart: (kx ky n_in,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.config import ConfigError
from dst.connections.arena import Arena, Connections
from dst.connections.execution import linear, part_call, variables_of
from dst.layers import BUILT_IN, kind_of
from dst.network import Network, input_of, layer_path
from dst.observe import marginals, observe
from dst.state import SparseState
from dst.update import AXIS, Loss, run_loss, stream

Array = jax.Array
Marginals = dict[str, tuple[Array, Array]]
Units = Mapping[str, tuple[Array, Array]]  # h and delta of every layer, from `observe`

SKETCH_STREAM = 3  # GraEst's signs, beside the streams of `dst.update`


def uniform(net: Network, loss: Loss) -> Callable[[SparseState, Any], Marginals]:
    """Eq. 1: every input and every output unit alike."""

    def measure(state: SparseState, batch: Any) -> Marginals:
        return {p: (jnp.ones(layer.n_in), jnp.ones(layer.n_out)) for p, layer in net.layers.items()}

    return measure


def grabo(net: Network, loss: Loss) -> Callable[[SparseState, Any], Marginals]:
    """Eq. 7: f = sum_b |h_b|, g = sum_b |delta_b|, whose product bounds |G| (Eq. 6)."""

    def measure(state: SparseState, batch: Any) -> Marginals:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        return lax.psum(marginals(net.layers, value), AXIS)

    return measure


def bounds(net: Network, state: SparseState, seen: Units) -> Marginals:
    """GraBo's f and g from h and delta that were observed."""

    def total(a: Array) -> Array:
        return jnp.sum(jnp.abs(a), axis=tuple(range(1, a.ndim)), dtype=jnp.float32)

    return lax.psum({path: tuple(map(total, pair)) for path, pair in seen.items()}, AXIS)


def graest(net: Network, loss: Loss) -> Callable[[SparseState, Any], Marginals]:
    """GraEst: f = |sum_b r_b h_b|, g = |sum_b r_b delta_b| with random signs r (an AMS sketch).

    The product of the signed sums is G in expectation. In a convolution every output position of
    every image has a sign, and f is that of the columns (kx, ky, i): (kx ky n_in,).
    """

    def measure(state: SparseState, batch: Any) -> Marginals:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        return sketches(net, state, observe(net.layers, value))

    return measure


def sketches(net: Network, state: SparseState, seen: Units) -> Marginals:
    """GraEst's f and g from h and delta that were observed; each device has its own signs."""
    key = jax.random.fold_in(stream(state, SKETCH_STREAM), lax.axis_index(AXIS))
    sums = {}
    for l, (path, layer) in enumerate(net.layers.items()):
        h, delta = seen[path]
        sign = jax.random.rademacher(jax.random.fold_in(key, l), delta.shape[1:], delta.dtype)
        sums[path] = layer.signed_sums(h, delta, sign)
    return jax.tree.map(jnp.abs, lax.psum(sums, AXIS))


def synflow(net: Network, loss: Loss) -> Callable[[SparseState, Any], Marginals]:
    """Eq. 3: f the synaptic flow into a layer's inputs, g out of its outputs, in float64.

    Runs on the host side of the rewire: R of ResNet-56 is near 1e70, beyond float32, and x64 cannot
    be switched on inside a float32 program. Errors: a network whose flow is not finite or not
    positively homogeneous in its weights.
    """
    subject, instead = "heuristic is 'synflow'", "use 'grabo' or 'uniform'"
    check_inputs(net, subject, instead)
    measure = jax.jit(functools.partial(synaptic_flow, net))

    def flow(state: SparseState, batch: Any) -> Marginals:
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

HEURISTICS = {"uniform": uniform, "grabo": grabo, "synflow": synflow, "graest": graest}
ON_HOST = ("synflow",)
OBSERVED = {"grabo": bounds, "graest": sketches}  # what the pass that observes h and delta gives


def synaptic_flow(
    net: Network, params: Any, connections: Connections, collections: Mapping[str, Any]
) -> tuple[Array, Array, Marginals]:
    """R(1), R(2 * 1) and the normalised float32 marginals of Eq. 3."""
    total = functools.partial(total_flow, net, params, connections)
    R, double = total(collections), total(collections, 2.0)
    # The scale of R cancels in f and g; dividing by it keeps the cotangents in range. If a layer
    # has collapsed, R is nothing, and f x g is where connections would mend it.
    flow = lambda extra: total({**collections, **extra}) / jnp.maximum(R, NOTHING)  # noqa: E731
    fg = marginals(net.layers, flow, jnp.float64)
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
    with nn.intercept_methods(without_dropout), nn.intercept_methods(_twin(connections)):
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


def _twin(connections: Connections) -> Callable:
    """Interceptor: layers and BatchNorm as in the linear twin, in float64."""
    parts = connections.parts if isinstance(connections, Arena) else ()
    sparse = {part.layer.path: part for part in parts}
    masks = () if isinstance(connections, Arena) else connections

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, nn.BatchNorm):
                return _normalise(module, args[0] if args else kwargs["x"])
            if call := part_call(sparse, args, kwargs, context):
                part, h = call
                return linear(part, module, h, frozen=True)[0] + TRACE
            kind = kind_of(module)
            chosen = kind in BUILT_IN or layer_path(module) in masks
            if kind and chosen and kind.obstacle(module) is None:
                h, kernel = input_of(module, args, kwargs), module.get_variable("params", "kernel")
                return kind.describe("", module, h).apply(h, kernel) + TRACE
        return next_fun(*args, **kwargs)

    return interceptor


def _normalise(norm: nn.BatchNorm, x: Array) -> Array:
    """x |scale| / sqrt(var + eps): batch normalisation without mean and bias."""
    scale = norm.get_variable("params", "scale") if norm.use_scale else 1.0
    factor = scale / jnp.sqrt(norm.get_variable("batch_stats", "var") + norm.epsilon)
    axes = {axis % x.ndim for axis in np.atleast_1d(norm.axis)}
    return x * jnp.expand_dims(factor, [axis for axis in range(x.ndim) if axis not in axes])
