"""The earliest of what arrives, without holding it: S is what came before a cut in time.

A first sweep counts first arrivals by time and finds the cut, a second one draws the same again and
hands on what came before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.select import lowest
from dst.methods.arrivals import Pairs, sum_before

Array = jax.Array


class Cut(NamedTuple):
    """S is what came before a cell of time, and the `left` earliest in it."""

    begin: Array  # uint32 (), where the cell begins
    shift: Array  # uint32 (), of 2^shift times; 32: all of them
    left: Array  # int32 ()
    total: Array  # int32 (), |S|


def intervals(chunk: int) -> int:
    """Into how many intervals time is cut: a power of 2."""
    return 2 ** min(20, chunk.bit_length())


def _within(cut: Cut, time: Array) -> Array:
    """Whether it is in the cell: bool (n,)."""
    return ((time ^ cut.begin) >> jnp.minimum(cut.shift, 31) == 0) | (cut.shift == 32)


def count_times(counted: Array, pairs: Pairs, cut: Cut) -> Array:
    """First arrivals in each part of the cell, those of `pairs` added: int32 (parts,)."""
    shift = cut.shift - (counted.size.bit_length() - 1)
    at = ((pairs.time - cut.begin) >> shift).astype(jnp.int32)
    new = pairs.valid & _within(cut, pairs.time)
    return counted.at[jnp.where(new, at, 0)].add(new.astype(jnp.int32))


def finer(cut: Cut, counted: Array) -> Cut:
    """The part of the cell in which the last of S is."""
    total = jnp.cumsum(counted, dtype=jnp.int32)
    last = jnp.searchsorted(total, cut.left, side="left").astype(jnp.int32)
    last = jnp.minimum(last, counted.size - 1)  # S is all that arrived
    shift = cut.shift - (counted.size.bit_length() - 1)
    found = jnp.where(cut.shift == 32, jnp.minimum(total[-1], cut.left), cut.total)
    begin = cut.begin + (last.astype(jnp.uint32) << shift)
    return Cut(begin, shift, cut.left - sum_before(total, last), found)


def choose(cut: Cut, pairs: Pairs) -> tuple[Cut, Array]:
    """Which pairs are in S, bool (n,), and what is left of its cell."""
    at = pairs.valid & _within(cut, pairs.time)
    some = lax.cond(at.any(), lambda: lowest(pairs.time, at, cut.left), lambda: at)
    left = cut.left - some.sum(dtype=jnp.int32)
    return cut._replace(left=left), (pairs.valid & (pairs.time < cut.begin)) | some


def earliest(
    walk: Callable, visit: Callable, asked: Array, count: int, carry: Any, counts: int = 1
) -> tuple[Any, Array]:
    """Folds `visit(carry, pairs, in S)` over pairs of which the `asked` earliest are S.

    walk(see, carry) folds `see(carry, pairs)` over the same pairs at every call. Time is cut into
    `count` cells, `counts` times over; in the last cell those that are handed on first come first.
    Also |S|.
    """

    def once(n: Array, so_far: tuple) -> tuple:
        cut, carry = so_far

        def see(so_far: Any, pairs: Pairs) -> Any:
            def add(counted, cut, carry):
                return count_times(counted, pairs, cut), cut, carry

            def hand_on(counted, cut, carry):
                cut, chosen = choose(cut, pairs)
                return counted, cut, visit(carry, pairs, chosen)

            return lax.cond(n < counts, add, hand_on, *so_far)

        counted, cut, carry = walk(see, (jnp.zeros(count, jnp.int32), cut, carry))
        cut = lax.cond(n < counts, lambda: finer(cut, counted), lambda: cut)
        return cut, carry

    everything = Cut(jnp.uint32(0), jnp.uint32(32), asked, jnp.int32(0))
    # One loop, so that what draws the pairs is compiled once.
    cut, carry = lax.fori_loop(0, counts + 1, once, (everything, carry))
    return carry, cut.total
