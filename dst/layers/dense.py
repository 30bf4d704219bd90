"""`nn.Dense`: y = h W, over the last axis of h; `nn.DenseGeneral`: over any axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dst.layers.base import Layer, block_product, chunk_size, init_bias, signed_total
from dst.layers.obstacle import changed

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """A kernel (n_in, n_out). By unit h is (n_in, B), delta (n_out, B), B rows of all axes."""

    module_type: ClassVar[type[nn.Module]] = nn.Dense
    matrix = True
    large = False

    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> Dense:
        return cls(path, (h.shape[-1], module.features), module.precision)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if why := changed(module, cls.module_type):
            return why
        custom = module.dot_general is not None or module.dot_general_cls is not None
        return "a custom dot_general" if custom else None

    def init(self, module: Any, call: Any) -> None:
        init_bias(module, (self.n_out,))

    def apply(self, h: Array, kernel: Array) -> Array:
        over = (((h.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(h, kernel, over, precision=self.precision)

    def by_unit(self, h: Array, delta: Array) -> tuple[Array, Array]:
        return h.reshape(-1, h.shape[-1]).T, delta.reshape(-1, delta.shape[-1]).T

    def never_called(self) -> tuple[Array, Array]:
        return jnp.zeros((self.n_in, 1)), jnp.zeros((self.n_out, 1))

    def gradient_at(self, h: Array, delta: Array, column: Array, output: Array) -> Array:
        """sum_b h[i, b] delta[o, b]."""
        dtype = jnp.promote_types(h.dtype, jnp.float32)

        def one(position):
            return jnp.sum(h[position[0]] * delta[position[1]], dtype=dtype)

        return lax.map(one, (column, output), batch_size=chunk_size(h.shape[1], column.size))

    def gradient_block(self, h, delta, corner, size):
        *_, i, o = corner
        rows = lax.dynamic_slice_in_dim(h, i, size[0])
        return block_product(rows, lax.dynamic_slice_in_dim(delta, o, size[1]))

    def signed_sums(self, h: Array, delta: Array, sign: Array) -> tuple[Array, Array]:
        return signed_total(h, sign), signed_total(delta, sign)


@dataclasses.dataclass(frozen=True)
class DenseGeneral(Dense):
    """A kernel (inputs..., outputs...) over several axes of h, as in attention: one matrix."""

    axis: tuple[int, ...] = (-1,)  # of h, below 0 and rising, in whose order Flax takes them

    module_type = nn.DenseGeneral

    @classmethod
    def describe(cls, path: str, module: Any, h: Any) -> DenseGeneral:
        axis = tuple(sorted(a % h.ndim - h.ndim for a in as_tuple(module.axis)))
        shape = (*(h.shape[a] for a in axis), *as_tuple(module.features))
        return cls(path, shape, module.precision, axis)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        batch = as_tuple(module.batch_dims)
        return f"batch_dims {batch}" if batch else super().obstacle(module)

    def init(self, module: Any, call: Any) -> None:
        init_bias(module, self._features)

    @property
    def _features(self) -> tuple[int, ...]:
        return self.shape[len(self.axis) :]

    @property
    def dims(self) -> tuple[int, ...]:
        return math.prod(self.shape[: len(self.axis)]), math.prod(self._features)

    def inputs(self, h: Array) -> Array:
        last = range(-len(self.axis), 0)
        h = jnp.moveaxis(h, self.axis, last)
        return h.reshape(*h.shape[: h.ndim - len(self.axis)], self.n_in)

    def units(self, y: Array) -> Array:
        return y.reshape(*y.shape[: y.ndim - len(self._features)], self.n_out)

    def outputs(self, y: Array) -> Array:
        return y.reshape(*y.shape[:-1], *self._features)


def as_tuple(value: Any) -> tuple[int, ...]:
    """A number, or several."""
    return (value,) if isinstance(value, int) else tuple(value)
