"""How many of the best candidates are wanted: of the network, or of each layer (`keep_counts`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.base import Candidates, Connections, Part, bits, no_candidates
from dst.connections.hashing import hashed
from dst.connections.select import best, highest, lowest

Array = jax.Array


class Quota:
    """An event's list of candidates, the best so far: held in O(|G|), whatever is looked at.

    Of the network it is the best P. With `each` (E, L), |G_l| of every event, a layer has a part of
    the list of its own; the parts follow one another as the layers do.
    """

    def __init__(
        self,
        P: Array,
        room: int,
        salt: Array,
        each: np.ndarray | None = None,
        event: Array | int = 0,
    ):
        self.P, self.room, self.salt = P, room, salt
        self.by_layer = each is not None
        if each is not None:
            self.each = jnp.asarray(each)[event]
            self.longest = max(1, int(each.max(initial=0)))
            self.begin = jnp.cumsum(self.each, dtype=jnp.int32) - self.each

    def at_most(self, candidates: int) -> Quota:
        """The same, if no more than so many will ever be looked at."""
        if not self.by_layer:
            self.room = min(self.room, candidates)
            self.P = jnp.minimum(self.P, self.room)
        return self

    def empty(self, dtype: jnp.dtype) -> Candidates:
        """The list before anything was found."""
        return no_candidates(self.room + (self.longest if self.by_layer else 0), dtype)

    def best(self, found: Candidates, new: Candidates, l: Array | int = 0) -> Candidates:
        """The list with what is better among candidates of layer l, or of any if it has no parts.

        Both sorted by (row, column), where they are not empty; of equals as `select.best`.
        """
        if not self.by_layer:
            return best(found, new, self.P, self.salt)
        begin, own = self.begin[l], jnp.arange(self.longest, dtype=jnp.int32) < self.each[l]
        part = Candidates(*(lax.dynamic_slice(a, (begin,), (self.longest,)) for a in found))
        held = part._replace(score=jnp.where(own, part.score, -1))
        held = best(held, new, self.each[l], self.salt)
        merged = (jnp.where(own, a, b) for a, b in zip(held, part, strict=True))
        parts = zip(found, merged, strict=True)
        return Candidates(*(lax.dynamic_update_slice(a, b, (begin,)) for a, b in parts))


def best_of_each(A: Connections, found: Candidates, each: Array, salt: Array) -> Candidates:
    """The each[l] best of layer l, of a candidate for each of A's entries; the others emptied."""

    def some(l: int, _, score: Array, ties) -> Array:
        return highest(bits(jnp.maximum(score, 0)), score >= 0, each[l], ties)

    chosen = A.by_layer(some, found.score, salt)
    return found._replace(score=jnp.where(chosen, found.score, -1))


def exchange_within(
    A: Connections,
    order: Array,
    eligible: Array,
    found: Candidates,
    each: Array,
    salt: Array,
) -> tuple[Array, Candidates, Array]:
    """P and G, as many of each layer: the weakest entries, the best candidates; and |G|.

    At most each[l], or fewer where fewer are eligible or found. Shapes: unsigned (n,), bool (n,),
    int32 (L,) -> bool (n,), candidates, int32 ().
    """
    l = layer_of(A.parts, found.row)
    there = jnp.zeros(len(A.parts), jnp.int32).at[l].add(found.valid.astype(jnp.int32), mode="drop")
    k = jnp.minimum(jnp.minimum(each, there), A.count_by_layer(eligible))
    last = jnp.array(jnp.iinfo(order.dtype).max, order.dtype)  # in the order of a NaN, if of any
    order = jnp.where(eligible, jnp.minimum(order, last - 1), last)

    def weakest(l: int, A: Array, order: Array, ties) -> Array:
        return lowest(order, A & (order != last), k[l], ties)

    def fewer() -> Array:
        def one(n: Array, chosen: Array) -> Array:
            own = found.valid & (l == n)
            ties = lambda: hashed(salt[found.row], found.column)  # noqa: E731
            return chosen | highest(bits(jnp.maximum(found.score, 0)), own, k[n], ties)

        return lax.fori_loop(0, len(A.parts), one, jnp.zeros(found.row.size, bool))

    G = lax.cond((k < there).any(), fewer, lambda: found.valid)
    P = A.by_layer(weakest, order, salt)
    return P, found._replace(score=jnp.where(G, found.score, -1)), k.sum(dtype=jnp.int32)


def layer_of(parts: tuple[Part, ...], row: Array) -> Array:
    """The layer of each row among all, L for the row of an empty candidate: int32 (n,)."""
    ends = jnp.array([part.end for part in parts], jnp.int32)
    return jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
