"""The mathematics of convolutions: any number of dimensions, and groups of channels.

An output o of a grouped convolution reads the channels of its own group only. So its kernel has
n_in = channels / groups inputs, and the pairs (i, o) of a channel and an output that there are is
no product of two sets: `paired` says what f x g is on them.
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

from dst.layers.base import Layer, block_product, chunk_size, init_bias, signed_total
from dst.layers.window import POINT, Window

Array = jax.Array
AXES = "XYZUVW"


@dataclasses.dataclass(frozen=True)
class ConvND(Layer):
    """A kernel (k..., channels / groups, n_out) on maps (..., sides, channels).

    By unit h is (channels, B, sides) with its padding, delta (n_out, B, sides').
    """

    window: Window = POINT
    groups: int = 1

    module_type = nn.Conv
    plural = "convolutions of four dimensions or more"

    def init(self, module: Any, call: Any) -> None:
        init_bias(module, (self.n_out,))

    def inputs(self, h: Array) -> Array:
        return self.window.repeated(self.kernel_size, h)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Its window's sides."""
        return self.dims[:-2]

    @property
    def channels(self) -> int:
        return self.n_in * self.groups

    def pads(self, sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros around a map of these sides."""
        return self.window.pads(self.kernel_size, sides)

    def along(self, x: Array, axis: int) -> list[Array]:
        """What each place of the window along one axis reads: (B, sides, n), one of them sides'."""
        window, size, sides = self.window, self.kernel_size, x.shape[1:-1]
        stride, step = window.strides[axis], window.dilation[axis]
        pads = [(0, 0, 0)] * x.ndim
        pads[axis + 1] = (*self.pads(sides)[axis], 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
        reach = (window.output_sides(size, sides)[axis] - 1) * stride + 1
        starts = [place * step for place in range(size[axis])]
        return [lax.slice_in_dim(x, t, t + reach, stride, axis=axis + 1) for t in starts]

    # ------------------------------------------------------------------------------------- forward
    def apply(self, h: Array, kernel: Array) -> Array:
        """(..., sides, channels), (k..., n_in, n_out) -> (..., sides', n_out)."""
        axes, x = AXES[: len(self.kernel_size)], self.maps(h)
        y = lax.conv_general_dilated(
            x,
            kernel,
            self.window.strides,
            self.pads(x.shape[1:-1]),
            rhs_dilation=self.window.dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.groups,
            precision=self.precision,
        )
        return y.reshape(*h.shape[: h.ndim - len(axes) - 1], *y.shape[1:])

    # ------------------------------------------------------------------------------ h and delta
    def by_unit(self, h: Array, delta: Array) -> tuple[Array, Array]:
        h, delta = self.maps(h), self.maps(delta)
        h = jnp.pad(h, ((0, 0), *self.pads(h.shape[1:-1]), (0, 0)))
        return jnp.moveaxis(h, -1, 0), jnp.moveaxis(delta, -1, 0)

    def never_called(self) -> tuple[Array, Array]:
        extent = self.window.extent(self.kernel_size)
        pixel = (1,) * (len(extent) + 1)
        return jnp.zeros((self.channels, 1, *extent)), jnp.zeros((self.n_out, *pixel))

    def windows(self, h: Array, delta: Array, place: Sequence[Any], i: Any, channels: int) -> Array:
        """What a place of the kernel reads for every output position: h[i:, b, x s + k d].

        Place (k...) and i int32; h and delta by unit -> (channels, B, sides').
        """
        batch, *sides = delta.shape[1:]
        steps = self.window.strides
        reach = ((n - 1) * step + 1 for n, step in zip(sides, steps, strict=True))
        at = (k * d for k, d in zip(place, self.window.dilation, strict=True))
        read = lax.dynamic_slice(h, (i, jnp.zeros_like(i), *at), (channels, batch, *reach))
        return read[(..., *(slice(None, None, step) for step in steps))]

    def gradient_at(self, h: Array, delta: Array, column: Array, output: Array) -> Array:
        """sum_bx h[i, b, x s + k d] delta[o, b, x], i a channel of o's group."""
        dtype = jnp.promote_types(h.dtype, jnp.float32)
        *place, i = jnp.unravel_index(column, self.dims[:-1])
        i += output // (self.n_out // self.groups) * self.n_in

        def one(position):
            *place, i, o = position
            return jnp.sum(self.windows(h, delta, place, i, 1)[0] * delta[o], dtype=dtype)

        chunk = chunk_size(math.prod(delta.shape[1:]), column.size)
        return lax.map(one, (*place, i, output), batch_size=chunk)

    def gradient_block(self, h, delta, corner, size):
        x, y, i, o = corner
        place = x * self.places[1] + y
        if self.groups == 1:
            delta = lax.dynamic_slice_in_dim(delta, o, size[1])
            place = jnp.unravel_index(place, self.kernel_size)
            return block_product(self.windows(h, delta, place, i, size[0]), delta)
        rows, outputs = i + jnp.arange(size[0]), o + jnp.arange(size[1])
        pairs = jnp.meshgrid(place * self.n_in + rows, outputs, indexing="ij")
        column, output = (a.ravel().astype(jnp.int32) for a in pairs)
        return self.gradient_at(h, delta, column, output).reshape(size)

    def signed_sums(self, h: Array, delta: Array, sign: Array) -> tuple[Array, Array]:
        """Every output position of every example has a sign: (B, sides')."""

        def read_at(place: Array) -> Array:
            read = self.windows(h, delta, [*place], jnp.int32(0), self.channels)
            return signed_total(read, sign)

        places = jnp.array([*np.ndindex(self.kernel_size)], jnp.int32)
        return lax.map(read_at, places).ravel(), signed_total(delta, sign)

    def paired(self, f: Array, g: Array) -> tuple[Array, Array]:
        """The marginals of f_a g_o on the pairs of one group: exact if that is a product.

        As it is of one group, and of depthwise convolutions.
        """
        if self.groups == 1:
            return f, g
        f = f.reshape(-1, self.groups, self.n_in)
        g = g.reshape(self.groups, -1)
        # Scaled to one: the sums of a long batch, squared, would leave float32.
        f, g = (a / jnp.maximum(a.max(), jnp.finfo(a.dtype).tiny) for a in (f, g))
        total = f.sum((0, 2))  # of each group's channels
        return jnp.einsum("pgi,go->pi", f, g).ravel(), (g * total[:, None]).ravel()
