"""`nn.Conv` in three dimensions or over groups of channels, depthwise too: the general defaults.

An output o of a grouped convolution reads the channels of its own group only. So its kernel has
n_in = channels / groups inputs, and the pairs (i, o) of a channel and an output that there are is
no product of two sets: `paired` says what f x g is on them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dst.layers.base import Layer, init_bias, signed_total
from dst.layers.window import Window

Array = jax.Array


POINT = Window((1,), "SAME", (1,))


@dataclasses.dataclass(frozen=True)
class ConvGeneral(Layer):
    """A kernel (k..., channels / groups, n_out) on maps (..., sides, channels)."""

    window: Window = POINT
    groups: int = 1

    module_type = nn.Conv
    plural = "convolutions of three dimensions or of groups"

    def init(self, module: Any, call: Any) -> None:
        init_bias(module, (self.n_out,))

    def inputs(self, h: Array) -> Array:
        return self.window.repeated(self.kernel_size, h)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Its window's sides."""
        return self.shape[:-2]

    @property
    def channels(self) -> int:
        return self.n_in * self.groups

    def apply(self, h: Array, kernel: Array) -> Array:
        """(..., sides, channels), (k..., n_in, n_out) -> (..., sides', n_out)."""
        n = len(self.kernel_size)
        axes = "XYZUVW"[:n]
        y = lax.conv_general_dilated(
            h.reshape(-1, *h.shape[-n - 1 :]),
            kernel,
            self.window.strides,
            self.window.pads(self.kernel_size, h.shape[-n - 1 : -1]),
            rhs_dilation=self.window.dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.groups,
            precision=self.precision,
        )
        return y.reshape(*h.shape[: -n - 1], *y.shape[1:])

    def by_unit(self, h: Array, delta: Array) -> tuple[Array, Array]:
        n = len(self.kernel_size)
        h, delta = (a.reshape(-1, *a.shape[-n - 1 :]) for a in (h, delta))
        return super().by_unit(h, delta)

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
        total = f.sum((0, 2))
        return jnp.einsum("pgi,go->pi", f, g).ravel(), (g * total[:, None]).ravel()

    def signed_sums(self, h: Array, delta: Array, sign: Array) -> tuple[Array, Array]:
        """What the columns of a group's first output read, those of all its outputs read."""
        one = jnp.zeros_like(delta).at[:: self.n_out // self.groups].set(sign.astype(delta.dtype))
        f = self.kernel_gradient(h, one).reshape(
            -1, self.n_in, self.groups, self.n_out // self.groups
        )
        return f[..., 0].transpose(0, 2, 1).ravel(), signed_total(delta, sign)
