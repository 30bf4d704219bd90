"""What a model's own initialisers give: all but the sparse kernels, or some of these alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from dst.axis import across_devices
from dst.network import Network, is_foreign, layer_call, zero_output
from dst.sown import without

Array = jax.Array


def init_rest(
    net: Network, key: Array, seen: Callable[[str, Any], Any] = lambda path, module: None
) -> dict[str, Any]:
    """The model's variables from its own initialisers, without sparse kernels and what is sown.

    `seen` is told each sparse layer's path and module.
    """

    @jax.jit
    def init(key):
        kernels = frozenset(("params", *path.split("/"), "kernel") for path in net.layers)
        return without(_init(net, key, frozenset(), seen), net.sown | kernels)

    return {"params": {}, **init(key)}


def init_kernels(net: Network, key: Array, paths: frozenset[str]) -> dict[str, Array]:
    """The dense kernels of these sparse layers as `model.init(key, ...)` makes them; no others."""

    @jax.jit
    def init(key):
        variables = traverse_util.flatten_dict(_init(net, key, paths)["params"], sep="/")
        return {path: variables[f"{path}/kernel"] for path in sorted(paths)}

    return init(key)


def _init(
    net: Network,
    key: Array,
    paths: frozenset[str],
    seen: Callable[[str, Any], Any] = lambda path, module: None,
) -> dict[str, Any]:
    """What `model.init` gives where no sparse layer is computed, of `paths` with kernels.

    The others' may be there, for what XLA makes nothing of.
    """

    def without_kernels(next_fun, args, kwargs, context):
        module = context.module
        call = layer_call(net.layers, args, kwargs, context)
        if call is None or is_foreign(module):
            return next_fun(*args, **kwargs)
        layer, h = call
        seen(layer.path, module)
        if layer.path in paths:
            next_fun(*args, **kwargs)
        else:
            layer.init(module, lambda: next_fun(*args, **kwargs))
        return zero_output(layer, module, h)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), net.args)
    with nn.intercept_methods(across_devices), nn.intercept_methods(without_kernels):
        variables = flax.core.unfreeze(net.model.init(key, *zeros, **net.kwargs))
    return nn.meta.unbox(variables)
