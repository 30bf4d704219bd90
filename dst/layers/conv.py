"""`nn.Conv` in one and two dimensions: strides, padding and kernel dilation, channels last.

A convolution over sequences is one over maps of one row. Three dimensions and groups of channels
are in `conv_nd.py`, and all mathematics.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from dst.layers.base import Layer
from dst.layers.conv_nd import ConvND
from dst.layers.convolution import convolve
from dst.layers.obstacle import changed
from dst.layers.window import PIXEL, Window, uncovered, window_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Conv(ConvND):
    """A kernel (kx, ky, n_in, n_out) on maps (..., H, W, n_in); (k, n_in, n_out) on sequences."""

    window: Window = PIXEL  # of maps

    convolves = True
    plural = "convolutions"

    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> Layer:
        size, window = window_of(module)
        groups = module.feature_group_count
        shape = (*size, h.shape[-1] // groups, module.features)
        if len(size) > 2 or groups > 1:
            return ConvND(path, shape, module.precision, window, groups)
        return cls(path, shape, module.precision, on_maps(window))

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
        return self.dims[0], self.dims[1]

    def apply_fast(self, h: Array, kernel: Array) -> Array:
        if jax.default_backend() != "cpu":
            return self.apply(h, kernel)
        y = convolve(self, self.maps(h), kernel)
        return y.reshape(*h.shape[:-3], *y.shape[1:])

    def output_sides(self, sides: tuple[int, ...]) -> list[int]:
        extent = self.window.extent(self.places)
        steps = zip(extent, self.window.strides, self.pads(sides), sides, strict=True)
        return [(n + sum(pad) - extent) // stride + 1 for extent, stride, pad, n in steps]

    def taps(self, sides: tuple[int, ...]) -> list[int]:
        (top, _), (left, _) = self.pads(sides)
        return [*self.places, *self.window.strides, top, left, *self.window.dilation]


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
