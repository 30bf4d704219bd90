"""Convolutions for XLA's CPU backend, where two cases are far from the arithmetic they cost.

The weight gradient is written there as a convolution whose window is the whole image, behind
transposes; and a convolution over 2x2 pixels takes 10 times its arithmetic. Both are products of
matrices, and `convolve` computes them as such. The results are those of `lax.conv_general_dilated`
but for the order of the sums.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from dst.layers.conv import Conv

Array = jax.Array

# Output pixels up to which a sum of k x k matrix products beats XLA's convolution on a CPU.
FEW_PIXELS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(layer: Conv, x: Array, kernel: Array) -> Array:
    """`layer.apply`, of one group, with dW as one dot.

    Shapes: (B, H, W, I), (k, l, I, O) -> (B, H', W', O).
    """
    return _product(layer, kernel, x)


def _product(layer: Conv, kernel: Array, x: Array) -> Array:
    out = jax.eval_shape(layer.apply, x, kernel)
    if out.shape[1] * out.shape[2] > FEW_PIXELS:
        return layer.apply(x, kernel)
    y = jnp.zeros(out.shape, out.dtype)
    for a, row in enumerate(layer.along(x, 0)):
        for b, pixel in enumerate(layer.along(row, 1)):
            tap = kernel[a, b]
            y += jnp.einsum("bhwi,io->bhwo", pixel, tap, precision=layer.precision)
    return y


def _weight_gradient(layer: Conv, x: Array, delta: Array) -> Array:
    """dW[a, b, i, o]: the columns' shifts go to x, the rows' to delta, and one dot sums them."""
    height, strides = x.shape[1], layer.window.strides
    (top, _), _ = layer.pads(x.shape[1:3])
    columns = layer.along(x, 1)
    last = (delta.shape[1] - 1) * strides[0]
    rows = []
    for tap in range(layer.dims[0]):
        start = tap * layer.window.dilation[0] - top
        pad = (start, height - 1 - last - start, strides[0] - 1)
        rows.append(lax.pad(delta, jnp.zeros((), delta.dtype), [(0, 0, 0), pad, *[(0, 0, 0)] * 2]))
    left, right = (
        jnp.concatenate(p, -1).reshape(-1, len(p) * p[0].shape[-1]) for p in (columns, rows)
    )
    # Without the barrier XLA builds both operands anew in every tile of the dot.
    left, right = lax.optimization_barrier((left, right))
    product = lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=layer.precision)
    k, l, n_in, n_out = layer.dims
    return product.reshape(l, n_in, k, n_out).transpose(2, 0, 1, 3)


def _forward(layer, x, kernel):
    return _product(layer, kernel, x), (x, kernel)


def _backward(layer, saved, delta):
    x, kernel = saved
    # The product is linear in x, so its transpose is exact; XLA's own is fast there.
    (dx,) = jax.linear_transpose(functools.partial(_product, layer, kernel), x)(delta)
    return dx, _weight_gradient(layer, x, delta)


convolve.defvjp(_forward, _backward)
