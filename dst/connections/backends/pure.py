"""The products of sparse layers and the choices of a rewire in pure JAX: everywhere, exact, slow.

What `cpp.py` does for float32 on CPUs, in the same order where ties are broken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import sparse

from dst.connections.base import NOWHERE, Candidates, Part, bits, no_candidates
from dst.connections.hashing import hashed
from dst.connections.ranges import over_range, rows_of

Array = jax.Array


# ------------------------------------------------------------------------------------ the products
def multiply(
    part: Part, values: Array, column: Array, pointer: Array, h: Array, n_out: int
) -> Array:
    """y = W h, `pointer` the layer's slice.

    By jaxlib's CSR kernel on CPUs, block after block; elsewhere by segment sums over pieces.
    """
    y = jnp.zeros((n_out, h.shape[1]), h.dtype)
    if jax.default_backend() != "cpu":
        local, rising = part._replace(first=0), part.blocks == 1

        def add(y, at, value, i, o):
            o = lax.cummax(o) if rising else o  # behind the layer it would begin anew
            return y.at[o].add(value[:, None] * h[i], indices_are_sorted=rising)

        return over_connections(local, values, column, pointer, add, y, h.shape[1])

    def block(b, y):
        rows = lax.dynamic_slice(pointer, (b * n_out,), (n_out + 1,))
        W = sparse.BCSR((values, column, rows), shape=(n_out, part.n_in))
        return y + sparse.bcsr_dot_general(W, h, dimension_numbers=(((1,), (0,)), ((), ())))

    return lax.fori_loop(0, part.blocks, block, y)


def backward(
    part: Part,
    values: Array,
    column: Array,
    pointer: Array,
    h: Array,
    delta: Array,
    gradient: Array,
) -> tuple[Array, Array]:
    """W^T delta, and dL/dw added to `gradient`, `pointer` the arena's: by pieces."""
    # A sum over the batch as a product with ones is a vectorised one.
    ones = jnp.ones((h.shape[1], 1), h.dtype)

    def add(carry, at, value, i, o):
        dh, gradient = carry
        seen = delta[o]
        dh = dh.at[i].add(value[:, None] * seen)
        total = jnp.matmul(h[i] * seen, ones, precision=lax.Precision.HIGHEST)
        return dh, add_at(gradient, at, total[:, 0])

    start = jnp.zeros_like(h), gradient
    return over_connections(part, values, column, pointer, add, start, h.shape[1])


def over_connections(
    part: Part,
    values: Array,
    column: Array,
    pointer: Array,
    step: Callable,
    carry: Any,
    columns: int = 1,
) -> Any:
    """Folds `step(carry, at, value, i, o)` over the layer's connections, a piece at a time.

    `at` (start, inside) says where the piece stands in the arena; outside the layer value and o are
    0. A connection stands for work on so many `columns`.
    """
    rows = rows_of(pointer, column.size) - part.first
    begin, end = pointer[part.first], pointer[part.end]

    def within(carry, at, value, i, row):
        return step(carry, at, value, i, row % part.n_out)

    return over_range((values, column, rows), begin, end, within, carry, columns)


def add_at(gradient: Array, at: tuple[Array, Array], amount: Array) -> Array:
    start, inside = at
    old = lax.dynamic_slice(gradient, (start,), amount.shape)
    return lax.dynamic_update_slice(gradient, old + jnp.where(inside, amount, 0), (start,))


# ------------------------------------------------------------------------------------ the rewire
def lowest(
    order: Array, eligible: Array, k: Array, ties: Callable[[], Array] | None = None
) -> Array:
    """The k lowest of the eligible entries, as `select.lowest`, bit by bit, by counting."""
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


def best(found: Candidates, new: Candidates, k: Array, salt: Array) -> Candidates:
    """The k best distinct candidates of both, as `select.best`, by a sort."""
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


def exchange(
    dropped: Array,
    column: Array,
    pointer: Array,
    grown: Candidates,
    at: Array,
    k: Array,
) -> tuple[Array, Array, Array]:
    """Column, pointer and source after an exchange, as `select.exchange`; `at` where G would stand.

    Shapes: `at` int32 (n,) of the first k grown.
    """
    K, rank = column.size, jnp.arange(grown.row.size, dtype=jnp.int32)
    before = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(~dropped, dtype=jnp.int32))
    row = jnp.where(rank < k, grown.row, 0)
    to = jnp.where(rank < k, before[at] + rank, K)
    is_grown = jnp.zeros(K, bool).at[to].set(True, mode="drop")
    kept = jnp.nonzero(~dropped, size=K, fill_value=0)[0].astype(jnp.int32)
    older = jnp.arange(K, dtype=jnp.int32) - jnp.cumsum(is_grown, dtype=jnp.int32)
    source = jnp.where(is_grown, -1, kept[jnp.clip(older, 0, K - 1)])
    longer = jnp.zeros(pointer.size, jnp.int32).at[row + 1].add((rank < k).astype(jnp.int32))
    column = column[jnp.maximum(source, 0)].at[to].set(grown.column, mode="drop")
    return column, before[pointer] + jnp.cumsum(longer, dtype=jnp.int32), source
