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
from dst.layers import Layer
from dst.network import Network, skipping
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

    def make(layer: Layer, module: Any, h: Any, y: Array, call: Callable[[], Any]) -> None:
        seen(layer.path, module)
        if layer.path in paths:
            call()
        else:
            layer.init(module, call)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), net.args)
    with nn.intercept_methods(across_devices), skipping(net.layers, make):
        variables = flax.core.unfreeze(net.model.init(key, *zeros, **net.kwargs))
    return nn.meta.unbox(variables)
