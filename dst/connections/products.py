"""What a sparse layer computes from the arena: W h, W^T delta, and dL/dw of what exists.

A convolution's W is a matrix, too. The C++ kernels apply it to maps (N, H, W, C), batch innermost
in memory; where they do not, `expand` makes its dense kernel for the moment of the convolution.

Activations of dense layers are feature-major, h (n_in, B) and y (n_out, B): a connection reads and
writes whole rows. Two tiers do the same: C++ kernels (`backends/cpp.py`) on CPUs, where they were
built, and pure JAX everywhere. `values` pass through every product, (y, values), so that their
cotangent is one vector of K numbers into which each layer writes its range; if autodiff summed the
cotangents of L layers, there would be L such vectors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.arena import Arena
from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps, pure
from dst.connections.backends.dispatch import compiled
from dst.connections.base import Part

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(part: Part, values: Array, arena: Arena, h: Array) -> tuple[Array, Array]:
    """y = W h and `values` unchanged: h (n_in, B) of the values' dtype -> (n_out, B), (K,)."""
    multiply = kernels.multiply if compiled(values) else functools.partial(pure.multiply, part)
    return multiply(values, arena.column, arena.pointer_of(part), h, part.n_out), values


def _product_forward(part, values, arena, h):
    return product(part, values, arena, h), (values, arena, h)


def _product_backward(part, saved, cotangents):
    values, arena, h = saved
    dh, gradient = _gradients(part, values, arena, h, *cotangents)
    return gradient, None, dh


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_product(part: Part, values: Array, arena: Arena, h: Array) -> Array:
    """y = W h where no gradient of the values is wanted: it takes neither time nor memory."""
    return product(part, values, arena, h)[0]


def _frozen_forward(part, values, arena, h):
    return frozen_product(part, values, arena, h), (values, arena, h)


def _frozen_backward(part, saved, delta):
    values, arena, h = saved
    # XLA drops what the pure tier computes in vain.
    gradient = jnp.zeros(0 if compiled(values) else values.size, values.dtype)
    return None, None, _gradients(part, values, arena, h, delta, gradient)[0]


frozen_product.defvjp(_frozen_forward, _frozen_backward)


def _gradients(part: Part, values: Array, arena: Arena, h: Array, delta: Array, gradient: Array):
    """W^T delta, and dL/dw added to `gradient`."""
    if compiled(values):
        pointer = arena.pointer_of(part)
        return kernels.backward(values, arena.column, pointer, h, delta, gradient)
    return pure.backward(part, values, arena.column, arena.pointer, h, delta, gradient)


@jax.custom_vjp
def add_bias(y: Array, bias: Array) -> Array:
    """y + b: (n_out, B), (n_out,) -> (n_out, B)."""
    return y + bias[:, None]


def _bias_backward(_, delta):
    # A product with ones: for a sum, XLA would transpose all of delta first.
    ones = jnp.ones(delta.shape[1], delta.dtype)
    return delta, jnp.matmul(delta, ones, precision=lax.Precision.HIGHEST)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution(part: Part, values: Array, arena: Arena, x: Array) -> tuple[Array, Array]:
    """y = W * x, `covered`, and `values` unchanged: (N, H, W, n_in) -> (N, H', W', n_out), (K,)."""
    pointer = arena.pointer_of(part)
    return kernels.convolve(values, arena.column, pointer, kernels.Read(x), part.layer)[0], values


def _convolution_forward(part, values, arena, x):
    return convolution(part, values, arena, x), (values, arena, x)


def _convolution_backward(part, saved, cotangents):
    values, arena, x = saved
    dx, gradient = _convolution_gradients(part, values, arena, x, *cotangents)
    return gradient, None, dx


convolution.defvjp(_convolution_forward, _convolution_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def frozen_convolution(part: Part, values: Array, arena: Arena, x: Array) -> Array:
    """y = W * x where no gradient of the values is wanted."""
    return convolution(part, values, arena, x)[0]


def _frozen_convolution_forward(part, values, arena, x):
    return frozen_convolution(part, values, arena, x), (values, arena, x)


def _frozen_convolution_backward(part, saved, delta):
    values, arena, x = saved
    nothing = jnp.zeros(0, values.dtype)
    return None, None, _convolution_gradients(part, values, arena, x, delta, nothing)[0]


frozen_convolution.defvjp(_frozen_convolution_forward, _frozen_convolution_backward)


@jax.custom_vjp
def add_channel_bias(y: Array, bias: Array) -> Array:
    """y + b of a map that is `covered`: (N, H', W', n_out), (n_out,) -> (N, H', W', n_out)."""
    return y + bias[None, None, None]


def _channel_bias_backward(_, delta):
    # XLA would transpose all of delta for its sum.
    return delta, maps.channel_sums(delta, delta)[0]


add_channel_bias.defvjp(lambda y, bias: (add_channel_bias(y, bias), None), _channel_bias_backward)


def _convolution_gradients(part, values, arena, x, delta, gradient):
    pointer = arena.pointer_of(part)
    maps = kernels.Read(x), kernels.Read(delta)
    return kernels.convolve_backward(values, arena.column, pointer, *maps, gradient, part.layer)[:2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand(part: Part, values: Array, arena: Arena) -> tuple[Array, Array]:
    """The layer's dense kernel, for the moment of a convolution, and `values` unchanged."""

    def add(kernel, at, value, i, o):
        return kernel.at[i, o].add(value)

    kernel = jnp.zeros((part.n_in, part.n_out), values.dtype)
    kernel = pure.over_connections(part, values, arena.column, arena.pointer, add, kernel)
    return kernel.reshape(part.layer.shape), values


def _expand_forward(part, values, arena):
    return expand(part, values, arena), (values, arena)


def _expand_backward(part, saved, cotangents):
    values, arena = saved
    dense, gradient = cotangents
    dense = dense.reshape(part.n_in, part.n_out)

    def collect(gradient, at, value, i, o):
        return pure.add_at(gradient, at, dense[i, o])

    given = part, values, arena.column, arena.pointer
    return pure.over_connections(*given, collect, gradient), None


expand.defvjp(_expand_forward, _expand_backward)
