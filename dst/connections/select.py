"""Choosing connections of an arena without sorting it: the weakest, the best, and their exchange.

All are exact; of equals the connection with the lower hash is chosen (`hashing.py`), which is the
same one in both executions. Like the products they come in two tiers that agree bit for bit, C++
kernels and pure JAX.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.backends import cpp as kernels
from dst.connections.backends.dispatch import compiled, on_cpu
from dst.connections.base import NOWHERE, Candidates, bits, lowest, no_candidates
from dst.connections.hashing import hashed

if TYPE_CHECKING:
    from dst.connections.arena import Arena

Array = jax.Array


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
    row, column, score = (jnp.concatenate(pair) for pair in zip(found, new, strict=True))
    row = jnp.where(score >= 0, row, NOWHERE)
    row, column, score = lax.sort((row, column, score), num_keys=2, is_stable=True)
    again = (row[1:] == row[:-1]) & (column[1:] == column[:-1])
    eligible = (score >= 0) & ~jnp.append(jnp.zeros(1, bool), again)
    chosen = lowest(~bits(score), eligible, k, lambda: hashed(salt[row], column))
    size = found.row.size
    to = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, size)
    entries = zip(no_candidates(size, score.dtype), (row, column, score), strict=True)
    return Candidates(*(empty.at[to].set(entry, mode="drop") for empty, entry in entries))


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
    K, rank = column.size, jnp.arange(grown.row.size, dtype=jnp.int32)
    before = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(~dropped, dtype=jnp.int32))
    row = jnp.where(rank < k, grown.row, 0)
    at, _ = locate(arena, row, grown.column)
    to = jnp.where(rank < k, before[at] + rank, K)
    is_grown = jnp.zeros(K, bool).at[to].set(True, mode="drop")
    kept = jnp.nonzero(~dropped, size=K, fill_value=0)[0].astype(jnp.int32)
    older = jnp.arange(K, dtype=jnp.int32) - jnp.cumsum(is_grown, dtype=jnp.int32)
    source = jnp.where(is_grown, -1, kept[jnp.clip(older, 0, K - 1)])
    longer = jnp.zeros(pointer.size, jnp.int32).at[row + 1].add((rank < k).astype(jnp.int32))
    return (
        arena.replace(
            column=column[jnp.maximum(source, 0)].at[to].set(grown.column, mode="drop"),
            pointer=before[pointer] + jnp.cumsum(longer, dtype=jnp.int32),
        ),
        source,
    )
