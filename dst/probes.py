"""What the layers of any Linen model see: |h| and |delta| sums, and gradients on a subset S.

`nn.intercept_methods` wraps every `nn.Dense` and `nn.Conv` of an unmodified model. Each hands its
output through a `custom_vjp` identity that takes zero-valued probes, and what is wanted comes back
as the probes' cotangents: sums of |h| and |delta| for the marginals of Eq. 7, dL/dw for the
connections in S. Parameters are not differentiated, so no dense weight gradient ever exists.

Probes travel as a variable collection, not by closure: so `nn.remat` and `nn.jit` see them as
arguments, and a layer that is called several times sums its calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from dst.network import Layer, is_layer, layer_path

Array = jax.Array
Tree = Mapping[str, Any]

# Products of one chunk of candidates: 2^20 float32 (4 MiB) keeps them in cache, whatever |S| is.
CHUNK_ELEMENTS = 2**20


@jax.custom_vjp
def tap_sums(h: Array, y: Array, f: Array, g: Array) -> Array:
    """y, unchanged; cotangents of f (n_in,) and g (n_out,) are sums of |h| and |delta| (Eq. 7)."""
    return y


def _abs_sum(x: Array, dtype: Any) -> Array:
    return jnp.sum(jnp.abs(x), axis=tuple(range(x.ndim - 1)), dtype=dtype)


def _sums_forward(h, y, f, g):
    return y, (_abs_sum(h, f.dtype), jnp.zeros_like(g))


def _sums_backward(residual, delta):
    f, g = residual
    return None, delta, f, _abs_sum(delta, g.dtype)


tap_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tap_subset(layer: Layer, h: Array, y: Array, c: Array, subset: Array) -> Array:
    """y, unchanged; the cotangent of c (|S_l|,) is dL/dw at the flat kernel positions `subset`."""
    return y


def _subset_forward(layer, h, y, c, subset):
    return y, (h, subset)


def _subset_backward(layer, residual, delta):
    h, subset = residual
    gradient = dense_gradient_on if layer.kind == "dense" else conv_gradient_on
    return None, delta, gradient(layer, h, delta, subset), None


tap_subset.defvjp(_subset_forward, _subset_backward)


def dense_gradient_on(layer: Layer, h: Array, delta: Array, subset: Array) -> Array:
    """sum_b h[b, i] delta[b, o] for each (i, o) in S. (..., n_in), (..., n_out) -> (|S_l|,)."""
    i, o = jnp.unravel_index(subset, layer.shape)
    h_t = h.reshape(-1, h.shape[-1]).T
    delta_t = delta.reshape(-1, delta.shape[-1]).T

    def one(position):
        return jnp.sum(h_t[position[0]] * delta_t[position[1]], dtype=jnp.float32)

    return lax.map(one, (i, o), batch_size=_chunk(h_t.shape[1], subset.size))


def conv_gradient_on(layer: Layer, h: Array, delta: Array, subset: Array) -> Array:
    """sum_bxy h[b, x s + kx d, y s + ky d, i] delta[b, x, y, o] for each (kx, ky, i, o) in S."""
    kx, ky, i, o = jnp.unravel_index(subset, layer.shape)
    h = h.reshape(-1, *h.shape[-3:])
    delta = delta.reshape(-1, *delta.shape[-3:])
    pads = layer.pads(h.shape[1:3])
    channels = jnp.pad(h, ((0, 0), *pads, (0, 0))).transpose(3, 0, 1, 2)
    errors = delta.transpose(3, 0, 1, 2)
    (sx, sy), (dx, dy) = layer.strides, layer.dilation
    batch, out_x, out_y = errors.shape[1:]
    window = (1, batch, (out_x - 1) * sx + 1, (out_y - 1) * sy + 1)

    def one(position):
        kx, ky, i, o = position
        corner = (i, jnp.zeros_like(i), kx * dx, ky * dy)
        seen = lax.dynamic_slice(channels, corner, window)[0, :, ::sx, ::sy]
        return jnp.sum(seen * errors[o], dtype=jnp.float32)

    return lax.map(one, (kx, ky, i, o), batch_size=_chunk(batch * out_x * out_y, subset.size))


def _chunk(elements: int, candidates: int) -> int:
    return max(1, min(candidates, CHUNK_ELEMENTS // elements))


def intercepted(layers: Mapping[str, Layer], tap: Callable[..., Array]):
    """A context in which the output y of each sparse layer is tap(layer, module, h, y)."""

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not is_layer(module):
            return next_fun(*args, **kwargs)
        layer = layers.get(layer_path(module))
        if layer is None:
            return next_fun(*args, **kwargs)
        h = jnp.asarray(args[0] if args else kwargs["inputs"])
        return tap(layer, module, h, next_fun(*args, **kwargs))

    return nn.intercept_methods(interceptor)


def nested(by_path: Mapping[str, Any]) -> Tree:
    """{'a/b': leaf} -> {'a': {'b': leaf}}, the form of a Linen variable collection."""
    return traverse_util.unflatten_dict(dict(by_path), sep="/")


def marginals(layers: Mapping[str, Layer], loss: Callable[[Tree], Array], dtype=jnp.float32):
    """Sums of |h| (n_in,) and |delta| (n_out,) of every layer: {path: (f, g)}, not normalised.

    `loss(collections)` runs the model with these extra variable collections.
    """

    def tap(layer, module, h, y):
        probe = module.get_variable("probes", "marginals")
        return tap_sums(h, y, probe["f"], probe["g"])

    zeros = {
        path: {"f": jnp.zeros(layer.n_in, dtype), "g": jnp.zeros(layer.n_out, dtype)}
        for path, layer in layers.items()
    }

    def probed(probes):
        collection = nested({path: {"marginals": p} for path, p in probes.items()})
        with intercepted(layers, tap):
            return loss({"probes": collection})

    cotangents = jax.grad(probed)(zeros)
    return {path: (c["f"], c["g"]) for path, c in cotangents.items()}


def gradient_on(layers: Mapping[str, Layer], loss: Callable[[Tree], Array], S: Mapping[str, Array]):
    """dL/dw on the subset: {path: flat kernel positions (|S_l|,)} -> {path: float32 (|S_l|,)}."""

    def tap(layer, module, h, y):
        if not module.has_variable("probes", "c"):
            return y
        c, subset = module.get_variable("probes", "c"), module.get_variable("subset", "S")
        return tap_subset(layer, h, y, c, subset)

    subset = nested({path: {"S": positions} for path, positions in S.items()})

    def probed(probes):
        collection = nested({path: {"c": c} for path, c in probes.items()})
        with intercepted(layers, tap):
            return loss({"probes": collection, "subset": subset})

    return jax.grad(probed)({path: jnp.zeros(s.size, jnp.float32) for path, s in S.items()})
