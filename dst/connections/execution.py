"""Runs a model on its connections: masked kernels among the parameters, or an arena.

In sparse execution an interceptor replaces the products of the sparse layers of an unmodified
model. Their kernels are never created, not even by `init`, but where a layer is expanded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import tracers
from flax.linen.dtypes import promote_dtype

from dst.axis import across_devices
from dst.connections.arena import SPARSE, VALUES, Arena
from dst.connections.backends.dispatch import compiled, covered, on_cpu, tier
from dst.connections.base import Connections, Execution, Part
from dst.connections.fusion import Opaque, fused, plainly, region
from dst.connections.masks import MASKED
from dst.connections.normalization import batch_norm, fits
from dst.connections.products import (
    add_bias,
    add_channel_bias,
    convolution,
    expand,
    frozen_convolution,
    frozen_product,
    product,
)
from dst.errors import ConfigError
from dst.layers.conv import fast_convolution
from dst.network import Network, layer_call, skipping

Array = jax.Array

EXECUTIONS: dict[str, Execution] = {"masked": MASKED, "sparse": SPARSE}


def forward(
    net: Network,
    params: Any,
    connections: Connections,
    collections: Mapping,
    /,
    *args,
    frozen: bool = False,
    chain: bool = True,
    seen: Callable[[int], Any] = lambda count: None,
    **kwargs,
) -> Any:
    """`net.model.apply` on either kind of connections; `collections` are all but "params".

    `frozen` says that no gradient of the sparse layers' values will be asked for, `chain` that they
    may go from layer to layer: not under jax.vmap, where each example would add what all have
    gathered. `seen` is told how many convolutions were fused.
    """

    def run(mark, params, connections, collections, args, kwargs):
        interceptor = fast_convolution
        if isinstance(connections, Arena):
            values = params[VALUES]["kernel"]
            interceptor = sparse_layers(connections, values, frozen, mark, chain)
        variables = variables_of(params, connections, collections)
        # Flax would look up what `nn.with_partitioning` names among the devices of the step.
        no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
        with nn.intercept_methods(across_devices), nn.intercept_methods(interceptor), no_mesh:
            return net.model.apply(variables, *args, **kwargs)

    given = params, connections, collections, args, kwargs
    if not fusible(net, params, connections):
        return run(plainly, *given)
    try:
        found, count = fused(functools.partial(run, region), *given)
    except Opaque:
        return run(plainly, *given)
    seen(count)
    return found


def fusible(net: Network, params: Any, connections: Connections) -> bool:
    """Whether kernels may compute more than one operation of this model at once."""
    if not net.fuse or not isinstance(connections, Arena):
        return False
    maps = any(part.layer.convolves for part in connections.parts)
    values = params[VALUES]["kernel"]
    # Elsewhere than within a trace, the model would be traced again in every call.
    return maps and compiled(values) and isinstance(values, jax.core.Tracer)


def variables_of(params: Any, connections: Connections, collections: Mapping) -> dict[str, Any]:
    """The model's variables; an arena travels as a collection, of which each layer has a copy.

    Not by closure: so `nn.remat` sees it as an argument.
    """
    if not isinstance(connections, Arena):
        return {"params": params, **collections}
    rest = {name: leaf for name, leaf in params.items() if name != VALUES}
    arrays = {
        "values": params[VALUES]["kernel"],
        "column": connections.column,
        "pointer": connections.pointer,
    }
    copies = {part.layer.path: arrays for part in connections.parts}
    flat = {(*path.split("/"), name): a for path, c in copies.items() for name, a in c.items()}
    return {"params": rest, **collections, VALUES: traverse_util.unflatten_dict(flat)}


def arena_parts(connections: Connections) -> dict[str, Part]:
    """The parts of an arena by layer path; masks have none."""
    if not isinstance(connections, Arena):
        return {}
    return {part.layer.path: part for part in connections.parts}


def part_call(
    parts: Mapping[str, Part], args: tuple, kwargs: Mapping[str, Any], context: Any
) -> tuple[Part, Any] | None:
    """Of an intercepted call: the part of the arena it is to multiply with, and what; or None.

    None too for a layer that is applied to variables of its own, whatever it is called.
    """
    call = layer_call(parts, args, kwargs, context)
    return call if call and context.module.has_variable(VALUES, "values") else None


def sparse_layers(
    arena: Arena, values: Array, frozen: bool, mark: Callable = plainly, chain: bool = True
) -> Callable:
    """Interceptor: y = W h + b of the sparse layers, from the arena; `mark` is `region` to fuse."""
    parts = arena_parts(arena)
    maps = any(part.layer.convolves for part in arena.parts)
    passed, outside = [values], tracers.current_trace()

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        call = part_call(parts, args, kwargs, context)
        if call is None:
            if context.method_name == "__call__" and isinstance(module, nn.BatchNorm):
                x, others = (args[0], args[1:]) if args else (kwargs["x"], ())
                if maps and compiled(values) and fits(module, x, others, kwargs):
                    return batch_norm(module, x, mark)
            return next_fun(*args, **kwargs)
        part, h = call
        bias = module.get_variable("params", "bias")  # or None
        h, _, bias = promote_dtype(h, values[:0], bias, dtype=getattr(module, "dtype", None))
        # One chain of values through all layers, see `products`. A trace of its own (nn.remat)
        # would leak them: such a layer begins a chain, at the cost of K more numbers.
        chained = chain and not frozen and tracers.current_trace() == outside
        y, left = linear(part, module, h, bias, passed[0] if chained else None, frozen, mark)
        if chained:
            passed[0] = left
        return y

    return interceptor


def linear(
    part: Part,
    module: nn.Module,
    h: Array,
    bias: Array | None = None,
    values: Array | None = None,
    frozen: bool = False,
    mark: Callable = plainly,
) -> tuple[Array, Array]:
    """W h + b of a sparse layer and its `values`, by default those in the module's collection.

    h and y are as the module has them, y in h's dtype. Raises: h of another number of units.
    """
    bias = None if bias is None else bias.ravel()
    given, units = part.layer.inputs(h), part.layer.channels
    if given.shape[-1] != units:  # whose columns nothing behind this would check
        raise ConfigError(
            f"layer {part.layer.path!r} reads {units} units, not {given.shape[-1]}: its input is "
            f"{jnp.shape(h)}, another size than that of dst.network(model, x)."
        )
    y, values = _linear(part, module, given, bias, values, frozen, mark)
    return part.layer.outputs(y), values


def _linear(
    part: Part,
    module: nn.Module,
    h: Array,
    bias: Array | None,
    values: Array | None,
    frozen: bool,
    mark: Callable,
) -> tuple[Array, Array]:
    """`linear` with units along the last axis: (..., n_in) -> (..., n_out), or of maps."""
    own: dict[str, Any] = {
        name: module.get_variable(VALUES, name) for name in ("values", "column", "pointer")
    }
    values = own["values"] if values is None else values
    arena = Arena(own["column"], own["pointer"], ())
    if part.layer.matrix:
        columns = h.reshape(-1, h.shape[-1]).T.astype(values.dtype)
        if frozen:
            y = frozen_product(part, values, arena, columns)
        else:
            y, values = product(part, values, arena, columns)
        if bias is not None:
            y = add_bias(y, bias.astype(y.dtype))
        return y.T.reshape(*h.shape[:-1], part.n_out).astype(h.dtype), values
    if covered(part.layer, values, h):
        body = frozen_convolution if frozen else convolution

        def run(values, column, pointer, x):
            return body(part, values, Arena(column, pointer, ()), x)

        what = "convolution", part, frozen
        found = mark(what, run, values, arena.column, arena.pointer, part.layer.maps(h))
        y, values = (found, values) if frozen else found
        if bias is not None:
            y = mark(("bias",), add_channel_bias, y, bias)
        return y.reshape(part.layer.output(h, y.dtype).shape), values
    y, values = _expanded(part, values, arena, h, frozen)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,)), values


def _expanded(part: Part, values: Array, arena: Arena, h: Array, frozen: bool):
    """The product with the dense kernel, made for this moment, and `values`."""
    kernel, values = expand(part, values, arena)
    if frozen:
        kernel = jax.lax.stop_gradient(kernel)
    return part.layer.apply_fast(h, kernel.astype(h.dtype)), values


def described(net: Network, params: Any, connections: Connections, collections: Mapping, **kwargs):
    """How the layers of a sparse network run here, in words, for the log; "" of a masked one.

    `kwargs` of the model are those of training, as train=True.
    """
    if not isinstance(connections, Arena):
        return ""
    expanded = expanded_layers(net)
    words = [tier(), *_counted(net, expanded)]
    may_fuse = net.fuse and not all(expanded.values())  # else the model need not be traced for it
    if may_fuse and (fused := fused_convolutions(net, params, connections, collections, **kwargs)):
        convolutions = sum(layer.convolves for layer in net.layers.values())
        words += [
            f"{fused} of {convolutions} convolutions are fused with their batch normalisation"
        ]
    return "; ".join(words)


def slower(net: Network) -> str:
    """What of a sparse network has no compiled kernels here, in words; "" if nothing, or masked."""
    if net.execution == "masked":
        return ""
    words = [] if on_cpu() else [tier()]
    return "; ".join([*words, *_counted(net, expanded_layers(net))])


def _counted(net: Network, expanded: Mapping[str, bool]) -> list[str]:
    """How many layers of each kind are expanded, if any, in words."""
    words = []
    for kind in dict.fromkeys(type(layer) for layer in net.layers.values()):
        these = [expanded[path] for path in expanded if type(net.layers[path]) is kind]
        if any(these):
            what = kind.plural or f"{kind.__name__} layers"
            words += [f"{sum(these)} of {len(these)} {what} are expanded"]
    return words


def fused_convolutions(net: Network, params, connections, collections, **kwargs) -> int:
    """How many calls of convolutions run in one kernel with the batch normalisation behind them."""
    fused: list[int] = []

    def run(params, connections, collections, *args):
        rngs = {name: jax.random.key(0) for name in ("dropout", "params")}
        own = {"rngs": rngs, "mutable": list(collections)}
        options: dict[str, Any] = {**net.kwargs, **kwargs, **own}
        return forward(net, params, connections, collections, *args, seen=fused.append, **options)

    jax.eval_shape(run, params, connections, collections, *net.args)
    return sum(fused)


def expanded_layers(net: Network) -> dict[str, bool]:
    """Of each layer but matrices, whether its dense kernel is made for the moment of the call."""
    expanded: dict[str, bool] = {}
    if all(layer.matrix for layer in net.layers.values()):
        return expanded  # without a trace of the model

    def record(layer, module, h, y, call):
        if not layer.matrix:
            x = jax.ShapeDtypeStruct(jnp.shape(h), y.dtype)
            expanded[layer.path] = not covered(layer, jax.ShapeDtypeStruct((), jnp.float32), x)

    with nn.intercept_methods(across_devices), skipping(net.layers, record):
        jax.eval_shape(lambda *a: net.model.init(jax.random.key(0), *a, **net.kwargs), *net.args)
    return expanded
