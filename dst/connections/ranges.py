"""Walking over a range of an arena's entries in pieces of one size, for pure JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

CHUNK = 1024  # connections a step on a CPU: 2 x 1024 rows of 128 float32 are 1 MiB
ELEMENTS = 2**24  # elsewhere connections x columns: steps wait for each other, so few large ones


def piece(columns: int) -> int:
    """Connections a step, where each reads or writes so many columns."""
    if jax.default_backend() == "cpu":
        return CHUNK
    return max(1, ELEMENTS // max(1, columns))


def rows_of(pointer: Array, connections: int) -> Array:
    """The row of every connection: int32 (R + 1,) -> int32 (K,)."""
    begun = jnp.zeros(connections + 1, jnp.int32).at[pointer[1:-1]].add(1)
    return jnp.cumsum(begun[:-1])


def over_range(
    arrays: tuple, begin: Array, end: Array, step: Callable, carry: Any, columns: int = 1
) -> Any:
    """Folds `step(carry, at, *slices)` over entries `begin` to `end` of arrays (K,), in pieces.

    `at` (start, inside) says where the piece stands; outside the range the slices are 0. Each entry
    stands for work on so many `columns`.
    """
    K = arrays[0].size
    size = min(piece(columns), K)
    if not size:
        return carry

    def chunk(c, carry):
        due = begin + c * size
        start = jnp.minimum(due, K - size)
        index = start + jnp.arange(size, dtype=jnp.int32)
        inside = (index >= due) & (index < end)
        slices = (
            jnp.where(inside, lax.dynamic_slice(a, (start,), (size,)), jnp.zeros((), a.dtype))
            for a in arrays
        )
        return step(carry, (start, inside), *slices)

    return lax.fori_loop(0, -((begin - end) // size), chunk, carry)
