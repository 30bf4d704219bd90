"""`nn.Conv` in one and two dimensions: strides, padding and kernel dilation, channels last.

A convolution over sequences is one over maps of one row. Three dimensions and groups of channels
are in `conv_general.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.layers import window as windows
from dst.layers.base import Layer, block_product, chunk_size, init_bias, signed_total
from dst.layers.conv_general import ConvGeneral
from dst.layers.convolution import convolve
from dst.layers.obstacle import changed
from dst.layers.window import Window, window_of

Array = jax.Array


PIXEL = Window((1, 1), "SAME", (1, 1))


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """A kernel (kx, ky, n_in, n_out) on maps (..., H, W, n_in), or (k, n_in, n_out) on sequences.

    By unit h is (n_in, B, H, W) with its padding, delta (n_out, B, H', W'); H = 1 of a sequence.
    """

    window: Window = PIXEL  # of maps

    module_type = nn.Conv
    convolves = True
    plural = "convolutions"

    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> Layer:
        size, window = window_of(module)
        groups = module.feature_group_count
        shape = (*size, h.shape[-1] // groups, module.features)
        if len(size) > 2 or groups > 1:
            return ConvGeneral(path, shape, module.precision, window, groups)
        return cls(path, shape, module.precision, on_maps(window))

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if why := changed(module, cls.module_type) or windows.obstacle(module):
            return why
        if module.mask is not None:
            return "a mask= of its own"
        if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
            return "a custom conv_general_dilated"
        return None

    def init(self, module: Any, call: Any) -> None:
        init_bias(module, (self.n_out,))

    def inputs(self, h: Array) -> Array:
        if len(self.shape) == 3:
            h = h[..., None, :, :]
        return self.window.repeated(self.places, h)

    def units(self, y: Array) -> Array:
        return y[..., None, :, :] if len(self.shape) == 3 else y

    def outputs(self, y: Array) -> Array:
        return y[..., 0, :, :] if len(self.shape) == 3 else y

    @property
    def dims(self) -> tuple[int, ...]:
        return (1, *self.shape) if len(self.shape) == 3 else self.shape

    @property
    def places(self) -> tuple[int, int]:
        return self.dims[0], self.dims[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return self.window.strides

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.window.dilation

    @property
    def _extent(self) -> list[int]:
        """Rows and columns from the first to the last that the kernel reads."""
        return self.window.extent(self.places)

    def pads(self, sides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of zeros around a map of H, W."""
        return self.window.pads(self.places, sides)

    # ------------------------------------------------------------------------------------- forward
    def apply(self, h: Array, kernel: Array) -> Array:
        """(..., H, W, n_in), (kx, ky, n_in, n_out) -> (..., H', W', n_out)."""
        y = lax.conv_general_dilated(
            h.reshape(-1, *h.shape[-3:]),
            kernel,
            self.strides,
            self.pads(h.shape[-3:-1]),
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )
        return y.reshape(*h.shape[:-3], *y.shape[1:])

    def apply_fast(self, h: Array, kernel: Array) -> Array:
        if jax.default_backend() != "cpu":
            return self.apply(h, kernel)
        y = convolve(self, h.reshape(-1, *h.shape[-3:]), kernel)
        return y.reshape(*h.shape[:-3], *y.shape[1:])

    def output_sides(self, sides: tuple[int, ...]) -> list[int]:
        steps = zip(self._extent, self.strides, self.pads(sides), sides, strict=True)
        return [(n + sum(pad) - extent) // stride + 1 for extent, stride, pad, n in steps]

    def taps(self, sides: tuple[int, ...]) -> list[int]:
        (top, _), (left, _) = self.pads(sides)
        return [*self.dims[:2], *self.strides, top, left, *self.dilation]

    # ------------------------------------------------------------------------------ h and delta
    def by_unit(self, h: Array, delta: Array) -> tuple[Array, Array]:
        h = h.reshape(-1, *h.shape[-3:])
        h = jnp.pad(h, ((0, 0), *self.pads(h.shape[1:3]), (0, 0)))
        return h.transpose(3, 0, 1, 2), delta.reshape(-1, *delta.shape[-3:]).transpose(3, 0, 1, 2)

    def never_called(self) -> tuple[Array, Array]:
        return jnp.zeros((self.n_in, 1, *self._extent)), jnp.zeros((self.n_out, 1, 1, 1))

    def windows(self, h: Array, delta: Array, corner: Sequence[Any], channels: int) -> Array:
        """What a kernel position reads for every output position: h[i:, b, x s + kx d, y s + ky d].

        Corner (kx, ky, i) int32; h and delta by unit -> (channels, B, H', W').
        """
        (sx, sy), (dx, dy) = self.strides, self.dilation
        batch, out_x, out_y = delta.shape[1:]
        kx, ky, i = corner
        size = (channels, batch, (out_x - 1) * sx + 1, (out_y - 1) * sy + 1)
        start = (i, jnp.zeros_like(i), kx * dx, ky * dy)
        return lax.dynamic_slice(h, start, size)[..., ::sx, ::sy]

    def gradient_at(self, h: Array, delta: Array, column: Array, output: Array) -> Array:
        """sum_bxy h[i, b, x s + kx d, y s + ky d] delta[o, b, x, y]."""
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        kx, ky, i = jnp.unravel_index(column, self.dims[:3])

        def one(position):
            *corner, o = position
            return jnp.sum(self.windows(h, delta, corner, 1)[0] * delta[o], dtype=dtype)

        chunk = chunk_size(math.prod(delta.shape[1:]), column.size)
        return lax.map(one, (kx, ky, i, output), batch_size=chunk)

    def gradient_block(self, h, delta, corner, size):
        *place_and_input, o = corner
        delta = lax.dynamic_slice_in_dim(delta, o, size[1])
        return block_product(self.windows(h, delta, place_and_input, size[0]), delta)

    def signed_sums(self, h: Array, delta: Array, sign: Array) -> tuple[Array, Array]:
        """Every output position of every image has a sign: (B, H', W')."""

        def read_at(place: Array) -> Array:
            read = self.windows(h, delta, (*place, jnp.int32(0)), self.n_in)
            return signed_total(read, sign)

        places = jnp.array([*np.ndindex(self.dims[:2])], jnp.int32)
        return lax.map(read_at, places).ravel(), signed_total(delta, sign)


def on_maps(window: Window) -> Window:
    """The window of a convolution over sequences as one over maps of one row."""
    strides, padding, dilation, repeats = window
    if len(strides) == 2:
        return window
    zeros = padding if isinstance(padding, str) else ((0, 0), *padding)
    return Window((1, *strides), zeros, (1, *dilation), repeats)


def fast_convolution(next_fun, args, kwargs, context):
    """Interceptor for `nn.intercept_methods`: `convolve` in the place of XLA's on a CPU."""
    module = context.module
    plain = isinstance(module, nn.Conv) and context.method_name == "__call__"
    if not plain or jax.default_backend() != "cpu" or Conv.obstacle(module):
        return next_fun(*args, **kwargs)
    x = args[0] if args else kwargs["inputs"]
    layer = Conv.describe("", module, x)
    kernel = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, kernel, bias = module.promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = layer.outputs(layer.apply_fast(layer.inputs(x), kernel.reshape(layer.dims)))
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
