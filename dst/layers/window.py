"""The window of a convolution as `nn.Conv` describes it, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

ZEROS = ("SAME", "SAME_LOWER", "VALID")  # lax's paddings, in upper case or in lower
# Paddings that repeat h itself, and `jnp.pad`'s names of them.
REPEATING = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class Window(NamedTuple):
    """Where a kernel of some size reads for each output position, an entry a dimension."""

    strides: tuple[int, ...]
    padding: Any  # one of ZEROS, or how many before and after
    dilation: tuple[int, ...]
    repeats: str = ""  # how h is padded with itself beforehand, a value of REPEATING

    def extent(self, size: Sequence[int]) -> list[int]:
        """Positions from the first to the last that a kernel of this size reads."""
        return [(k - 1) * d + 1 for k, d in zip(size, self.dilation, strict=True)]

    def pads(self, size: Sequence[int], sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros around a map of these sides."""
        if not isinstance(self.padding, str):
            return self.padding
        return tuple(lax.padtype_to_pads(sides, self.extent(size), self.strides, self.padding))

    def output_sides(self, size: Sequence[int], sides: Sequence[int]) -> list[int]:
        """Positions for which a kernel of this size reads a map of these sides."""
        each = zip(self.extent(size), self.strides, self.pads(size, sides), sides, strict=True)
        return [(n + sum(pad) - extent) // stride + 1 for extent, stride, pad, n in each]

    def last(self, axes: int) -> Window:
        """Its last axes alone."""
        padding = self.padding if isinstance(self.padding, str) else self.padding[-axes:]
        return Window(self.strides[-axes:], padding, self.dilation[-axes:])

    def repeated(self, size: Sequence[int], h: Array) -> Array:
        """h padded with itself, (..., sides, n)."""
        if not self.repeats:
            return h
        around = [((k - 1) // 2, k // 2) for k in self.extent(size)]
        before = [(0, 0)] * (h.ndim - len(around) - 1)
        return jnp.pad(h, [*before, *around, (0, 0)], mode=self.repeats)


POINT, PIXEL = Window((1,), "SAME", (1,)), Window((1, 1), "SAME", (1, 1))


def each(value: Any, dimensions: int) -> tuple[int, ...]:
    """Strides or dilations as Flax takes them: None, a number or one a dimension."""
    if value is None:
        return (1,) * dimensions
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def window_of(module: Any) -> tuple[tuple[int, ...], Window]:
    """The size of an `nn.Conv`'s kernel and its window."""
    size = each(module.kernel_size, 1)
    n = len(size)
    strides, dilation = each(module.strides, n), each(module.kernel_dilation, n)
    padding = module.padding
    if isinstance(padding, str) and padding in REPEATING:
        return size, Window(strides, "VALID", dilation, REPEATING[padding])
    if isinstance(padding, str) and padding.upper() in ZEROS:
        padding = padding.upper()
    elif padding == "CAUSAL":
        padding = (((size[0] - 1) * dilation[0], 0),)
    elif not isinstance(padding, str):
        padding = tuple(each(side, 2) for side in each(padding, n))
    return size, Window(strides, padding, dilation)


def uncovered(module: Any) -> str | None:
    """Why the window of an `nn.Conv` is not covered; None if it is."""
    size = each(module.kernel_size, 1)
    if set(each(module.input_dilation, len(size))) != {1}:
        return f"input_dilation {module.input_dilation}"
    padding, own = module.padding, (*REPEATING, *(("CAUSAL",) if len(size) == 1 else ()))
    if isinstance(padding, str) and padding not in own and padding.upper() not in ZEROS:
        return f"padding {padding!r}"
    return None
