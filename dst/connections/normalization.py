"""Batch normalisation between sparse convolutions: XLA's, but for the sums over a channel.

XLA sums in a layout of its own and would transpose every map for it, forwards and backwards, which
takes several times as long as the convolutions. Here kernels sum maps as they lie in memory, in
double; the rest stays elementwise and XLA's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.backends import maps

Array = jax.Array


def fits(module: nn.Module, x: Any, args: tuple, kwargs: dict) -> bool:
    """Whether `batch_norm` does what this call does: in train mode, in float32, per channel."""
    if type(module).__call__ is not nn.BatchNorm.__call__ or module.is_initializing():
        return False
    given = args[0] if args else kwargs.get("use_running_average")
    frozen = module.use_running_average if given is None else given
    plain = (
        module.axis in (-1, 3)
        and module.axis_name is None
        and module.use_fast_variance
        and module.dtype in (None, jnp.float32)
        and module.param_dtype == jnp.float32
        and kwargs.get("mask") is None
    )
    is_map = isinstance(x, jax.Array) and x.ndim == 4 and x.dtype == jnp.float32 and x.size > 0
    return frozen is False and plain and is_map


def batch_norm(module: nn.BatchNorm, x: Array, mark: Callable) -> Array:
    """The module's output; its running averages are updated: (N, H, W, C) -> (N, H, W, C).

    `mark(what, body, *args)` calls the body, see `fusion.region`.
    """
    # Constants of the trace, which are there when the convolution before them is met.
    ones, zeros = np.ones(x.shape[3], np.float32), np.zeros(x.shape[3], np.float32)
    scale = module.get_variable("params", "scale") if module.use_scale else ones
    bias = module.get_variable("params", "bias") if module.use_bias else zeros
    body = functools.partial(normalise, module.epsilon)
    y, mean, variance = mark(("norm", module.epsilon), body, x, scale, bias)
    for name, new in (("mean", mean), ("var", variance)):
        old: Array = module.get_variable("batch_stats", name)
        new = module.momentum * old + (1 - module.momentum) * new
        module.put_variable("batch_stats", name, new)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(epsilon: float, x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """(x - E x) / sqrt(Var x + epsilon) scale + bias, E x, Var x: (N, H, W, C), (C,), (C,)."""
    mean, variance = maps.moments(x)
    y = (x - _wide(mean)) * _wide(lax.rsqrt(variance + epsilon) * scale) + _wide(bias)
    return y, mean, variance


def _wide(channels: Array) -> Array:
    return channels[None, None, None]


def _forward(epsilon, x, scale, bias):
    y, mean, variance = normalise(epsilon, x, scale, bias)
    return (y, mean, variance), (x, mean, variance, scale)


def _backward(epsilon, saved, cotangents):
    x, mean, variance, scale = saved
    delta, *d_moments = cotangents
    sums = maps.channel_sums(delta, x)
    d_scale, (a, b, c) = backwards(epsilon, x, (mean, variance), scale, sums, d_moments)
    dx = _wide(a) * delta + (_wide(b) * (x - _wide(mean)) + _wide(c))
    return dx, d_scale, sums[0]


def backwards(epsilon: float, x: Array, moments: tuple, scale: Array, sums: Any, d_moments: Any):
    """dL/dscale, and (a, b, c) of dx = a delta + b (x - E x) + c; a channel each, (C,).

    `moments` are E x and Var x, `d_moments` their cotangents; `sums` those of delta and of delta x,
    of which the first is dL/dbias.
    """
    mean, variance = moments
    d_mean, d_variance = d_moments
    count = x.size // x.shape[3]
    inverse = lax.rsqrt(variance + epsilon)
    d_scale = inverse * (sums[1] - mean * sums[0])
    a = scale * inverse
    b = (2 * d_variance - a * inverse * d_scale) / count
    return d_scale, (a, b, (d_mean - a * sums[0]) / count)


normalise.defvjp(_forward, _backward)
