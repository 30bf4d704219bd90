"""C++ kernels over whole maps around sparse convolutions: sums, max-pooling and residual additions.

Maps are (N, H, W, C) float32 that lie in memory as those of `cpp.py`. A map k is (2, C), what batch
normalisation makes of y: u = k[0] y + k[1]. `sums` (2, C) are of du and of du y, in double.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dst.connections.backends import cpp as kernels
from dst.connections.backends.cpp import MAP, Read, as_read, kernel, layouts, like

Array = jax.Array


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel, summed in double: (N, H, W, C) -> (C,), (C,)."""
    mean, variance = _channel_sums(x, x, True)
    return mean, variance


def channel_sums(a: Array, b: Array) -> tuple[Array, Array]:
    """Sums of a and of a b of each channel, in double: (N, H, W, C) twice -> (C,), (C,)."""
    one, two = _channel_sums(a, b, False)
    return one, two


def _channel_sums(a: Array, b: Array, moments: bool) -> Array:
    call = kernel("dst_channel_sums", _two_a_channel(a), input_layouts=[MAP, MAP])
    return call(a, b, moments=moments, threads=np.int64(kernels.THREADS))


def magnitudes(x: Read) -> Array:
    """The sum of |x| of each channel, of x as it is read: (N, H, W, C) -> (C,)."""
    sums = jax.ShapeDtypeStruct(x.map.shape[3:], jnp.float32)
    call = kernel("dst_magnitudes", sums, input_layouts=[MAP, *layouts(x)])
    return call(*as_read(x), threads=np.int64(kernels.THREADS))


def pool(y: Array, k: Array) -> Array:
    """Maxima of 2x2 windows of relu(k[0] y + k[1]): (N, H, W, C), (2, C) -> (N, H/2, W/2, C)."""
    n, height, width, channels = y.shape
    small = jax.ShapeDtypeStruct((n, height // 2, width // 2, channels), jnp.float32)
    call = kernel("dst_pool", small, input_layouts=[MAP, None], output_layouts=MAP)
    return call(y, k, threads=np.int64(kernels.THREADS))


def pool_backward(y: Array, k: Array, g: Array) -> tuple[Array, Array]:
    """du, g at the first maximum of its window if relu(u) > 0 there, else 0; its sums.

    Shapes: y (N, H, W, C), k (2, C), g (N, H/2, W/2, C) -> du as y, sums (2, C).
    """
    call = kernel(
        "dst_pool_backward",
        (like(y), _two_a_channel(y)),
        input_layouts=[MAP, None, MAP],
        output_layouts=[MAP, None],
    )
    du, sums = call(y, k, g, threads=np.int64(kernels.THREADS))
    return du, sums


def join(y: Array, k: Array, r: Array) -> Array:
    """z = relu(k[0] y + k[1] + r): (N, H, W, C), (2, C), (N, H, W, C) -> (N, H, W, C)."""
    call = kernel("dst_join", like(y), input_layouts=[MAP, None, MAP], output_layouts=MAP)
    return call(y, k, r, threads=np.int64(kernels.THREADS))


def join_backward(ga: Array, gb: Array, z: Array, y: Array) -> tuple[Array, Array]:
    """du = ga + gb where z > 0, else 0, in place of ga if XLA can give it away; its sums.

    Shapes: (N, H, W, C) all -> du (N, H, W, C), sums (2, C). A gb of no entries, (0,), is none.
    """
    call = kernel(
        "dst_join_backward",
        (like(y), _two_a_channel(y)),
        input_layouts=[MAP, MAP if gb.ndim == 4 else None, MAP, MAP],
        output_layouts=[MAP, None],
        input_output_aliases={0: 0},
    )
    du, sums = call(ga, gb, z, y, threads=np.int64(kernels.THREADS))
    return du, sums


def _two_a_channel(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, a.shape[3]), jnp.float32)
