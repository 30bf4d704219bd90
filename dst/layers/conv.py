"""`nn.Conv` as CPUs compute it best: on maps of rows and columns, channels last.

A convolution over sequences is one over maps of one row; one over volumes is one over maps with the
slices that it reads side by side as channels. All mathematics are in `conv_nd.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dst.layers.base import Layer
from dst.layers.conv_nd import ConvND
from dst.layers.convolution import convolve
from dst.layers.obstacle import changed
from dst.layers.window import PIXEL, Window, uncovered, window_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Conv(ConvND):
    """A kernel (kx, ky, n_in, n_out) on maps (..., H, W, channels); with one place more or less.

    (k, n_in, n_out) on sequences, (kz, kx, ky, n_in, n_out) on volumes.
    """

    window: Window = PIXEL  # of maps

    convolves = True
    plural = "convolutions"

    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> Layer:
        size, window = window_of(module)
        groups = module.feature_group_count
        shape = (*size, h.shape[-1] // groups, module.features)
        if len(size) > 3:
            return ConvND(path, shape, module.precision, window, groups)
        return cls(path, shape, module.precision, on_maps(window), groups)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if why := changed(module, cls.module_type) or uncovered(module):
            return why
        if module.mask is not None:
            return "a mask= of its own"
        if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
            return "a custom conv_general_dilated"
        return None

    def inputs(self, h: Array) -> Array:
        return super().inputs(h[..., None, :, :] if len(self.shape) == 3 else h)

    def units(self, y: Array) -> Array:
        return y[..., None, :, :] if len(self.shape) == 3 else y

    def outputs(self, y: Array) -> Array:
        return y[..., 0, :, :] if len(self.shape) == 3 else y

    @property
    def dims(self) -> tuple[int, ...]:
        return (1, *self.shape) if len(self.shape) == 3 else self.shape

    @property
    def places(self) -> tuple[int, int]:
        return self.dims[0], math.prod(self.dims[1:-2])

    def apply_fast(self, h: Array, kernel: Array) -> Array:
        if jax.default_backend() != "cpu" or len(self.kernel_size) > 2 or self.groups > 1:
            return self.apply(h, kernel)
        y = convolve(self, self.maps(h), kernel)
        return y.reshape(*h.shape[:-3], *y.shape[1:])

    # -------------------------------------------------------------------- as compiled kernels read
    @property
    def plane(self) -> tuple[tuple[int, ...], Window]:
        """Rows and columns of the kernel, and their window."""
        return self.kernel_size[-2:], self.window.last(2)

    def slices(self, x: Array) -> Array:
        if len(self.kernel_size) == 2:
            return x
        x = jnp.concatenate(self.along(x, 0), -1)
        return x.reshape(-1, *x.shape[2:])

    def output_sides(self, sides: tuple[int, ...]) -> list[int]:
        size, window = self.plane
        return window.output_sides(size, sides)

    def taps(self, sides: tuple[int, ...]) -> list[int]:
        size, window = self.plane
        (top, _), (left, _) = window.pads(size, sides)
        depth = math.prod(self.kernel_size[:-2])
        return [depth, self.groups, *size, *window.strides, top, left, *window.dilation]


def on_maps(window: Window) -> Window:
    """The window of a convolution over sequences as one over maps of one row."""
    strides, padding, dilation, repeats = window
    if len(strides) > 1:
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
