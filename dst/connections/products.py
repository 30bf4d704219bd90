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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.arena import Arena
from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps, pure
from dst.connections.backends.dispatch import compiled
from dst.connections.base import Part

Array = jax.Array


Gradients = Callable[..., tuple[Array, Array]]  # dL/dh and dL/dw, added to the last argument


def differentiable(apply: Callable[..., Array], gradients: Gradients) -> tuple[Callable, Callable]:
    """(part, values, arena, h) -> (apply(...), values), and one for which no dL/dw is wanted.

    The second gives apply(...) alone, and takes neither time nor memory for the values' gradient.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def trained(part: Part, values: Array, arena: Arena, h: Array) -> tuple[Array, Array]:
        return apply(part, values, arena, h), values

    def forward(part, values, arena, h):
        return trained(part, values, arena, h), (values, arena, h)

    def backward(part, saved, cotangents):
        dh, gradient = gradients(part, *saved, *cotangents)
        return gradient, None, dh

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def frozen(part: Part, values: Array, arena: Arena, h: Array) -> Array:
        return apply(part, values, arena, h)

    def frozen_forward(part, values, arena, h):
        return frozen(part, values, arena, h), (values, arena, h)

    def frozen_backward(part, saved, delta):
        values = saved[0]
        # XLA drops what the pure tier computes in vain.
        nothing = jnp.zeros(0 if compiled(values) else values.size, values.dtype)
        return None, None, gradients(part, *saved, delta, nothing)[0]

    trained.defvjp(forward, backward)
    frozen.defvjp(frozen_forward, frozen_backward)
    return trained, frozen


def _multiply(part: Part, values: Array, arena: Arena, h: Array) -> Array:
    """y = W h: h (n_in, B) of the values' dtype -> (n_out, B)."""
    multiply = kernels.multiply if compiled(values) else functools.partial(pure.multiply, part)
    return multiply(values, arena.column, arena.pointer_of(part), h, part.n_out)


def _product_gradients(part, values, arena, h, delta, gradient):
    if compiled(values):
        pointer = arena.pointer_of(part)
        return kernels.backward(values, arena.column, pointer, h, delta, gradient)
    return pure.backward(part, values, arena.column, arena.pointer, h, delta, gradient)


def _convolve(part: Part, values: Array, arena: Arena, x: Array) -> Array:
    """y = W * x, `covered`: (B, sides, channels) -> (N, H', W', n_out), see `Layer.slices`."""
    pointer, read = arena.pointer_of(part), kernels.Read(part.layer.slices(x))
    return kernels.convolve(values, arena.column, pointer, read, part.layer)[0]


def _convolution_gradients(part, values, arena, x, delta, gradient):
    # The slices of a volume are k times as large. XLA would keep them on the way forwards.
    again = x if x.ndim == 4 else kernels.after(x, delta)
    slices, pull = jax.vjp(part.layer.slices, again)
    given = values, arena.column, arena.pointer_of(part), kernels.Read(slices), kernels.Read(delta)
    dx, gradient, _ = kernels.convolve_backward(*given, gradient, part.layer)
    return pull(dx)[0], gradient


# (y, values) of connections whose values are trained, and y alone of others.
product, frozen_product = differentiable(_multiply, _product_gradients)
convolution, frozen_convolution = differentiable(_convolve, _convolution_gradients)


@jax.custom_vjp
def add_bias(y: Array, bias: Array) -> Array:
    """y + b: (n_out, B), (n_out,) -> (n_out, B)."""
    return y + bias[:, None]


def _bias_backward(_, delta):
    # A product with ones: for a sum, XLA would transpose all of delta first.
    ones = jnp.ones(delta.shape[1], delta.dtype)
    return delta, jnp.matmul(delta, ones, precision=lax.Precision.HIGHEST)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _bias_backward)


@jax.custom_vjp
def add_channel_bias(y: Array, bias: Array) -> Array:
    """y + b of a map that is `covered`: (N, H', W', n_out), (n_out,) -> (N, H', W', n_out)."""
    return y + bias[None, None, None]


def _channel_bias_backward(_, delta):
    # XLA would transpose all of delta for its sum.
    return delta, maps.channel_sums(delta, delta)[0]


add_channel_bias.defvjp(lambda y, bias: (add_channel_bias(y, bias), None), _channel_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand(part: Part, values: Array, arena: Arena) -> tuple[Array, Array]:
    """The layer's dense kernel, `dims`, for the moment of a convolution, and `values` unchanged."""

    def add(kernel, at, value, i, o):
        return kernel.at[i, o].add(value)

    kernel = jnp.zeros((part.n_in, part.n_out), values.dtype)
    kernel = pure.over_connections(part, values, arena.column, arena.pointer, add, kernel)
    return kernel.reshape(part.layer.dims), values


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
