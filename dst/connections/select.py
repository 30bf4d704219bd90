"""Choosing connections of an arena without sorting it: the weakest, the best, and their exchange.

All are exact; of equals the connection with the lower hash is chosen (`hashing.py`), which is the
same one in both executions. Like the products they come in two tiers that agree bit for bit, C++
kernels and pure JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.arena import Arena, rows_of
from dst.connections.backends import cpp as kernels
from dst.connections.hashing import hashed, salts
from dst.connections.products import compiled, on_cpu

Array = jax.Array
NOWHERE = 2**31 - 1  # the row of an empty entry


class Found(NamedTuple):
    """Candidates sorted by (row, column); those with a score below 0 are empty."""

    row: Array  # int32 (n,), in the whole arena
    column: Array  # int32 (n,)
    score: Array  # float (n,)


def nothing(size: int, dtype=jnp.float32) -> Found:
    """No candidate yet, room for `size`."""
    return Found(
        jnp.full(size, NOWHERE, jnp.int32), jnp.zeros(size, jnp.int32), jnp.full(size, -1, dtype)
    )


def bits(magnitude: Array) -> Array:
    """Unsigned integers in the order of floats >= 0."""
    return lax.bitcast_convert_type(magnitude, f"uint{magnitude.dtype.itemsize * 8}")


def lowest(
    order: Array, eligible: Array, k: Array, ties: Callable[[], Array] | None = None
) -> Array:
    """Which entries are the k lowest of the eligible ones: unsigned (n,), bool (n,) -> bool (n,).

    Of equals those that are lowest in ties(), unsigned (n,), else the first. The k-th lowest is
    found bit by bit, by counting: no sort, no copy.
    """
    k = jnp.minimum(k, eligible.sum(dtype=jnp.int32))
    width = order.dtype.itemsize * 8
    one = jnp.ones((), order.dtype)

    def settle(n, cut):
        bit = one << (width - 1 - n).astype(order.dtype)
        below = eligible & (order <= (cut | (bit - one)))
        return jnp.where(below.sum(dtype=jnp.int32) >= k, cut, cut | bit)

    cut = lax.fori_loop(0, width, settle, jnp.zeros((), order.dtype))
    less, equal = eligible & (order < cut), eligible & (order == cut)
    left = k - less.sum(dtype=jnp.int32)
    if ties is None:
        equal &= jnp.cumsum(equal, dtype=jnp.int32) <= left
    else:
        more = equal.sum(dtype=jnp.int32) > left
        equal = lax.cond(more, lambda: lowest(ties(), equal, left), lambda: equal)
    return (less | equal) & (k > 0)


def row_salts(arena: Arena, key: Array) -> Array:
    """The salt of each row's output: uint32 (R,)."""
    each = (jnp.tile(salts(key, l, part.n_out), part.blocks) for l, part in enumerate(arena.parts))
    return jnp.concatenate([*each])


def hashes_of(arena: Arena, salt: Array) -> Array:
    """The hash of each connection, from the rows' salts: uint32 (K,)."""
    return hashed(salt[rows_of(arena.pointer, arena.column.size)], arena.column)


def protected(
    arena: Arena, magnitude: Array, keep: list[int], ties: Callable[[], Array] | None = None
) -> Array:
    """The keep[l] strongest connections of each layer l: bool (K,)."""
    index = jnp.arange(magnitude.size, dtype=jnp.int32)
    safe = jnp.zeros(magnitude.size, bool)
    for part, count in zip(arena.parts, keep, strict=True):
        begin, end = arena.pointer[part.first], arena.pointer[part.end]
        own = (index >= begin) & (index < end)
        safe |= lowest(~bits(magnitude), own, jnp.int32(count), ties)
    return safe


def locate(arena: Arena, longest: int, row: Array, column: Array) -> tuple[Array, Array]:
    """Where (row, column) stands in the arena, or would stand, and whether it exists.

    Rows are at most `longest`, as a block is. Shapes: row int32 (n,) in the whole arena, column
    int32 (n,) -> int32 (n,), bool (n,).
    """
    columns, pointer = arena.column, arena.pointer
    low, end = pointer[row], pointer[row + 1]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        beyond = (low < high) & (columns[jnp.minimum(middle, columns.size - 1)] < column)
        return jnp.where(beyond, middle + 1, low), jnp.where(beyond, high, middle)

    steps = math.ceil(math.log2(longest + 1)) + 1
    low, _ = lax.fori_loop(0, steps, halve, (low, end))
    return low, (low < end) & (columns[jnp.minimum(low, columns.size - 1)] == column)


def exists(arena: Arena, longest: int, row: Array, column: Array) -> Array:
    """Whether there is a connection at (row, column), as `locate` tells: bool (n,)."""
    if on_cpu():
        return kernels.exists(arena.column, arena.pointer, row, column)
    return locate(arena, longest, row, column)[1]


def best(found: Found, new: Found, k: Array, salt: Array) -> Found:
    """The k best distinct candidates of both, as many entries as `found` has.

    Of equal scores the lower hashes; `salt` uint32 (R,) is that of each row.
    """
    if compiled(found.score):
        return Found(*kernels.best(*found, *new, k, salt))
    row, column, score = (jnp.concatenate(pair) for pair in zip(found, new, strict=True))
    row = jnp.where(score >= 0, row, NOWHERE)
    row, column, score = lax.sort((row, column, score), num_keys=2, is_stable=True)
    again = (row[1:] == row[:-1]) & (column[1:] == column[:-1])
    eligible = (score >= 0) & ~jnp.append(jnp.zeros(1, bool), again)
    chosen = lowest(~bits(score), eligible, k, lambda: hashed(salt[row], column))
    size = found.row.size
    to = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, size)
    entries = zip(nothing(size, score.dtype), (row, column, score), strict=True)
    return Found(*(empty.at[to].set(entry, mode="drop") for empty, entry in entries))


def exchange(arena: Arena, dropped: Array, grown: Found, k: Array) -> tuple[Arena, Array]:
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
    at, _ = locate(arena, max(part.block for part in arena.parts), row, grown.column)
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
