"""Choosing connections of an arena without sorting it: the weakest, the best, and their exchange.

All are exact; of equals the connection with the lower hash is chosen (`hashing.py`), which is the
same one in both executions. Like the products they come in two tiers that agree bit for bit, C++
kernels and pure JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.backends import cpp as kernels
from dst.connections.backends import pure
from dst.connections.backends.dispatch import compiled, on_cpu
from dst.connections.base import Candidates
from dst.connections.hashing import hashed

if TYPE_CHECKING:
    from dst.connections.arena import Arena

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Ties:
    """What breaks ties between an arena's connections, by their rows' salts: uint32 (K,)."""

    arena: Arena
    salt: Array

    def __call__(self) -> Array:
        return hashed(self.salt[self.arena.rows], self.arena.column)


Tied = Callable[[], Array] | None


def lowest(order: Array, eligible: Array, k: Array, ties: Tied = None) -> Array:
    """Which entries are the k lowest of the eligible ones: unsigned (n,), bool (n,) -> bool (n,).

    Of equals those that are lowest in ties(), unsigned (n,), else the first.
    """
    return _extreme(order, eligible, k, ties, highest=False)


def highest(order: Array, eligible: Array, k: Array, ties: Tied = None) -> Array:
    """Which are the k highest; of equals as `lowest`."""
    return _extreme(order, eligible, k, ties, highest=True)


def _extreme(order: Array, eligible: Array, k: Array, ties: Tied, highest: bool) -> Array:
    if not on_cpu() or order.dtype != jnp.uint32:
        return pure.lowest(~order if highest else order, eligible, k, ties)
    if ties is None or isinstance(ties, Ties):
        own = (ties.arena.column, ties.arena.pointer, ties.salt) if ties else None
        return kernels.lowest(order, eligible, k, highest, own, told=False)[0]
    chosen, equal, left = kernels.lowest(order, eligible, k, highest, None, told=True)
    return lax.cond(left > 0, lambda: chosen | lowest(ties(), equal, left), lambda: chosen)


def locate(arena: Arena, row: Array, column: Array) -> tuple[Array, Array]:
    """Where (row, column) stands in the arena, or would stand, and whether it exists.

    Shapes: row int32 (n,) in the whole arena, column int32 (n,) -> int32 (n,), bool (n,).
    """
    columns, pointer = arena.column, arena.pointer
    longest = max(part.block for part in arena.parts)  # that a row can be
    low, end = pointer[row], pointer[row + 1]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        beyond = (low < high) & (columns[jnp.minimum(middle, columns.size - 1)] < column)
        return jnp.where(beyond, middle + 1, low), jnp.where(beyond, high, middle)

    steps = math.ceil(math.log2(longest + 1)) + 1
    low, _ = lax.fori_loop(0, steps, halve, (low, end))
    return low, (low < end) & (columns[jnp.minimum(low, columns.size - 1)] == column)


def exists(arena: Arena, row: Array, column: Array) -> Array:
    """Whether there is a connection at (row, column), as `locate` tells: bool (n,)."""
    if on_cpu():
        return kernels.exists(arena.column, arena.pointer, row, column)
    return locate(arena, row, column)[1]


def best(found: Candidates, new: Candidates, k: Array, salt: Array) -> Candidates:
    """The k best distinct candidates of both, as many entries as `found` has.

    Of equal scores the lower hashes; `salt` uint32 (R,) is that of each row.
    """
    if compiled(found.score):
        return Candidates(*kernels.best(*found, *new, k, salt))
    return pure.best(found, new, k, salt)


def exchange(arena: Arena, dropped: Array, grown: Candidates, k: Array) -> tuple[Arena, Array]:
    """The arena without the k `dropped` (bool (K,)) and with the first k `grown`.

    Also where each connection was before, int32 (K,), -1 for the grown ones.
    """
    column, pointer = arena.column, arena.pointer
    if compiled(grown.score):
        column, pointer, source = kernels.exchange(
            dropped, column, pointer, grown.row, grown.column, k
        )
        return arena.replace(column=column, pointer=pointer), source
    row = jnp.where(jnp.arange(grown.row.size, dtype=jnp.int32) < k, grown.row, 0)
    at, _ = locate(arena, row, grown.column)
    column, pointer, source = pure.exchange(dropped, column, pointer, grown, at, k)
    return arena.replace(column=column, pointer=pointer), source
