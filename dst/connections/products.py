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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import sparse

from dst.connections.arena import Arena, Part, rows_of
from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps
from dst.layers.base import Layer

Array = jax.Array

CHUNK = 1024  # connections a step of the pure tier: 2 x 1024 rows of 128 float32 are 1 MiB


def on_cpu() -> bool:
    """Whether the C++ kernels run here: on a CPU, if they were built."""
    return jax.default_backend() == "cpu" and kernels.available()


def compiled(values: Array) -> bool:
    """Whether the C++ kernels compute this: where they run, in float32."""
    return on_cpu() and values.dtype == jnp.float32


def tier() -> str:
    """Which of the two tiers computes here, in words, for the log."""
    if jax.default_backend() != "cpu":
        return "pure JAX"
    return "compiled kernels" if kernels.available() else f"pure JAX, as {kernels.why_not()}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(part: Part, values: Array, arena: Arena, h: Array) -> tuple[Array, Array]:
    """y = W h and `values` unchanged: h (n_in, B) of the values' dtype -> (n_out, B), (K,)."""
    multiply = kernels.multiply if compiled(values) else functools.partial(_multiply, part)
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
    return _backward(part, values, arena, h, delta, gradient)


@jax.custom_vjp
def add_bias(y: Array, bias: Array) -> Array:
    """y + b: (n_out, B), (n_out,) -> (n_out, B)."""
    return y + bias[:, None]


def _bias_backward(_, delta):
    # A product with ones: for a sum, XLA would transpose all of delta first.
    ones = jnp.ones(delta.shape[1], delta.dtype)
    return delta, jnp.matmul(delta, ones, precision=lax.Precision.HIGHEST)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _bias_backward)


def covered(layer: Layer, values: Any, x: Any) -> bool:
    """Whether the C++ kernels convolve this: a convolution, `compiled`, of 11 x 11 taps at most.

    XLA fails to compile their layout for a map of no images.
    """
    floats = layer.convolves and x.dtype == jnp.float32 and compiled(values)
    return floats and max(layer.shape[:2]) <= kernels.MOST_TAPS and x.size > 0


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
    kernel = over_connections(part, values, arena, add, kernel)
    return kernel.reshape(part.layer.shape), values


def _expand_forward(part, values, arena):
    return expand(part, values, arena), (values, arena)


def _expand_backward(part, saved, cotangents):
    values, arena = saved
    dense, gradient = cotangents
    dense = dense.reshape(part.n_in, part.n_out)

    def collect(gradient, at, value, i, o):
        return _add_at(gradient, at, dense[i, o])

    return over_connections(part, values, arena, collect, gradient), None


expand.defvjp(_expand_forward, _expand_backward)


# ------------------------------------------------------------------------------------ pure JAX tier
def _multiply(part: Part, values: Array, column: Array, pointer: Array, h: Array, n_out: int):
    """W h by jaxlib's CSR kernel on CPUs, block after block; elsewhere by sums over chunks."""
    y = jnp.zeros((n_out, h.shape[1]), h.dtype)
    if jax.default_backend() != "cpu":
        arena = Arena(column, pointer, ())
        local = part._replace(first=0)
        add = lambda y, at, value, i, o: y.at[o].add(value[:, None] * h[i])  # noqa: E731
        return over_connections(local, values, arena, add, y)

    def block(b, y):
        rows = lax.dynamic_slice(pointer, (b * n_out,), (n_out + 1,))
        W = sparse.BCSR((values, column, rows), shape=(n_out, part.n_in))
        return y + sparse.bcsr_dot_general(W, h, dimension_numbers=(((1,), (0,)), ((), ())))

    return lax.fori_loop(0, part.blocks, block, y)


def _backward(part: Part, values: Array, arena: Arena, h: Array, delta: Array, gradient: Array):
    """W^T delta, and dL/dw added to `gradient`: by chunks of connections."""
    # A sum over the batch as a product with ones is a vectorised one.
    ones = jnp.ones((h.shape[1], 1), h.dtype)

    def add(carry, at, value, i, o):
        dh, gradient = carry
        seen = delta[o]
        dh = dh.at[i].add(value[:, None] * seen)
        total = jnp.matmul(h[i] * seen, ones, precision=lax.Precision.HIGHEST)
        return dh, _add_at(gradient, at, total[:, 0])

    return over_connections(part, values, arena, add, (jnp.zeros_like(h), gradient))


def over_connections(part: Part, values: Array, arena: Arena, step: Callable, carry: Any) -> Any:
    """Folds `step(carry, at, value, i, o)` over the layer's connections, a chunk at a time.

    `at` (start, inside) says where the chunk stands in the arena; outside the layer value is 0.
    """
    rows = rows_of(arena.pointer, arena.column.size) - part.first
    begin, end = arena.pointer[part.first], arena.pointer[part.end]

    def within(carry, at, value, i, row):
        return step(carry, at, value, i, row % part.n_out)

    return over_range((values, arena.column, rows), begin, end, within, carry)


def over_range(arrays: tuple, begin: Array, end: Array, step: Callable, carry: Any) -> Any:
    """Folds `step(carry, at, *slices)` over entries `begin` to `end` of arrays (K,), in chunks.

    `at` (start, inside) says where the chunk stands; outside the range the slices are 0.
    """
    K = arrays[0].size
    size = min(CHUNK, K)
    if not size:
        return carry

    def chunk(c, carry):
        due = begin + c * size
        start = jnp.minimum(due, K - size)
        index = start + jnp.arange(size, dtype=jnp.int32)
        inside = (index >= due) & (index < end)
        slices = (
            jnp.where(inside, lax.dynamic_slice(a, (start,), (size,)), jnp.zeros((), a.dtype))
            for a in arrays
        )
        return step(carry, (start, inside), *slices)

    return lax.fori_loop(0, -((begin - end) // size), chunk, carry)


def _add_at(gradient: Array, at: tuple[Array, Array], amount: Array) -> Array:
    start, inside = at
    old = lax.dynamic_slice(gradient, (start,), amount.shape)
    return lax.dynamic_update_slice(gradient, old + jnp.where(inside, amount, 0), (start,))
