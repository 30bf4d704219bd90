"""What the kernels compute at once: convolution and batch norm, pooling, addition and ReLU.

Batch normalisation makes u = k[0] y + k[1] of a convolution's y, with k (2, C) from y's moments. u
is never stored: whatever reads it gets the pair (y, k), and the kernels compute u as they read y.
The cotangent of such a pair is, by convention, (du, [sum du, sum du y]), sums of each channel: what
batch normalisation needs on its way back, summed where du was made. Both are linear in du, so that
autodiff may add up those of several readers; but it is no true cotangent. So nothing may see a pair
but these functions: `dst.connections.fusion` keeps them in a type of its own.

    x ──convolution──> y, moments ──> k          forwards
                       (y, k) ──> ReLU inside the next convolution, pooling, joining
    dx <── dy = k'[0] du + k'[1] y + k'[2] <── (du, sums)     backwards, dy never stored either
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.arena import Arena
from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps
from dst.connections.backends.cpp import Read
from dst.connections.base import Part
from dst.connections.normalization import backwards

Array = jax.Array


class Normed(NamedTuple):
    """What `convolution_norm` gives: the pair (y, k), moments (C,), the values for the chain."""

    y: Array
    k: Array
    mean: Array
    variance: Array
    values: Array


class How(NamedTuple):
    """What is the same in every step."""

    part: Part
    epsilon: float
    frozen: bool = False  # no gradient of the values is wanted
    tap: str = ""  # of `dst.observe`: "sums" of |h| and |delta|, or the gradient on a "subset"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution_norm(
    how: How, values: Array, arena: Arena, x: Read, scale: Array, bias: Array, probes: tuple = ()
) -> Normed:
    """Batch normalisation in train mode of W * x; x is a map, or the pair of a ReLU's output.

    Shapes: x (N, H, W, n_in), scale and bias (n_out,) -> y (N, H', W', n_out). Probes are what the
    tap reads beside h and y, and what is asked for comes back as their cotangents.
    """
    return _norm_forward(how, values, arena, x, scale, bias, probes)[0]


def _norm_forward(how, values, arena, x, scale, bias, probes):
    part, epsilon = how.part, how.epsilon
    pointer = arena.pointer_of(part)
    y, (mean, variance) = kernels.convolve(
        values, arena.column, pointer, x, part.layer, moments=True
    )
    factor = scale * lax.rsqrt(variance + epsilon)
    k = jnp.stack([factor, bias - mean * factor])
    saved = values, arena, x, y, mean, variance, scale, probes
    return Normed(y, k, mean, variance, values), saved


def _norm_backward(how, saved, cotangents):
    values, arena, x, y, mean, variance, scale, probes = saved
    du, sums_of_du, *d_moments, gradient = cotangents
    moments = mean, variance
    d_scale, (a, b, c) = backwards(how.epsilon, y, moments, scale, sums_of_du, d_moments)
    dy = Read(du, jnp.stack([a, b, c - b * mean]), y)
    wanted = jnp.zeros(0, values.dtype) if how.frozen else gradient
    dx, found, sums = kernels.convolve_backward(
        values, arena.column, arena.pointer_of(how.part), x, dy, wanted, how.part.layer
    )
    d_x = Read(dx, None if x.k is None else sums)
    d_values = gradient if how.frozen else found
    return d_values, None, d_x, d_scale, sums_of_du[0], _tapped(how, x, dy, probes)


def _tapped(how: How, x: Read, dy: Read, probes: tuple) -> tuple:
    """The cotangents of the probes, as of `tap_sums` and `tap_subset`."""
    if how.tap == "sums":
        return maps.magnitudes(x), maps.magnitudes(dy)
    if how.tap == "subset":
        column, output = jnp.divmod(probes[1], how.part.n_out)
        return kernels.convolve_gradient_on(column, output, x, dy, how.part.layer), None
    return ()


convolution_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def materialised(relu: bool, y: Array, k: Array) -> Array:
    """u of a pair, or relu(u), as a map: where something else reads it."""
    u = affine(y, k)
    return jnp.maximum(u, 0) if relu else u


def affine(y: Array, k: Array) -> Array:
    """u = k[0] y + k[1]."""
    return k[0, None, None, None] * y + k[1, None, None, None]


def _materialised_backward(relu, saved, delta):
    y, k = saved
    du = jnp.where(affine(y, k) > 0, delta, 0) if relu else delta
    return du, jnp.stack(maps.channel_sums(du, y))


materialised.defvjp(lambda relu, y, k: (materialised(relu, y, k), (y, k)), _materialised_backward)


@jax.custom_vjp
def pooled(y: Array, k: Array) -> Array:
    """2x2 max-pooling of relu(u): (N, H, W, C) -> (N, H/2, W/2, C)."""
    return maps.pool(y, k)


pooled.defvjp(
    lambda y, k: (pooled(y, k), (y, k)), lambda yk, delta: maps.pool_backward(yk[0], yk[1], delta)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined(readers: int, y: Array, k: Array, r: Array) -> tuple[Array, ...]:
    """relu(u + r), once or twice: each of two readers takes its own, so that the kernel adds up."""
    return (maps.join(y, k, r),) * readers


def _joined_forward(readers, y, k, r):
    z = joined(readers, y, k, r)
    return z, (z[0], y)


def _joined_backward(readers, saved, deltas):
    first, second = (*deltas, jnp.zeros(0, jnp.float32))[:2]
    du, sums = maps.join_backward(first, second, *saved)
    return du, sums, du


joined.defvjp(_joined_forward, _joined_backward)
