"""Sharing out growth to the layers, on the device: SNFS's and DSR's redistribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dst.connections.base import Candidates, bits
from dst.connections.masks import Masks
from dst.connections.select import highest
from dst.methods.memory import Own
from dst.vocabulary import Names

Array = jax.Array


def share_out(total: Array, weights: Array, room: Array) -> Array:
    """Splits `total` over layers in proportion to their weights, none above its room.

    Shapes: int32 (), float32 (L,) >= 0, int32 (L,) -> int32 (L,), in sum min(total, room's sum).
    What a full layer cannot take goes to the others in proportion. Whole parts first, then one each
    by the largest remainder; of equals the first layer. Layers without weight come last, in
    proportion to their room.
    """
    total = jnp.minimum(jnp.asarray(total, jnp.int32), room.sum())

    def quotas(open_, left):
        w = jnp.where(open_, weights, 0)
        w = jnp.where(w.sum() > 0, w, jnp.where(open_, room, 0))  # only layers without have room
        return left * (w / jnp.maximum(w.sum(), 1e-30))

    def left_for(open_):
        return total - jnp.where(open_, 0, room).sum()

    def full(open_):
        return open_ & (quotas(open_, left_for(open_)) >= room)

    # Layers that are filled leave more to the others, which may fill them too.
    open_ = lax.while_loop(lambda o: full(o).any(), lambda o: o & ~full(o), room > 0)
    left = left_for(open_)
    quota = quotas(open_, left)
    # Float32 may round the whole parts up, in sum beyond what is left.
    whole = jnp.where(open_, jnp.floor(quota), 0).astype(jnp.int32)
    whole = jnp.clip(left - (jnp.cumsum(whole) - whole), 0, whole)
    order = jnp.argsort(jnp.where(open_, jnp.floor(quota) - quota, 1.0), stable=True)
    rank = jnp.zeros(room.size, jnp.int32).at[order].set(jnp.arange(room.size, dtype=jnp.int32))
    one_more = open_ & (rank < left - whole.sum())
    counts = jnp.where(open_, whole + one_more, room)
    # Above 2^24 float32 loses some more: whoever has room, takes it.
    free = room - counts
    return counts + jnp.clip(total - counts.sum() - (jnp.cumsum(free) - free), 0, free)


# ----------------------------------------------------------------------------- by what it is shared
def by_momentum(A: Masks, survivors: Array, memory: Own) -> Array:
    """SNFS: mean |momentum| of what was active in each layer: float32 (L,)."""
    means = [
        jnp.where(mask, jnp.abs(memory["momentum"][path]), 0).sum() / jnp.maximum(mask.sum(), 1)
        for path, mask in A.items()
    ]
    return jnp.stack(means)


def by_survivors(A: Masks, survivors: Array, memory: Own) -> Array:
    """DSR: how many connections of each layer have survived: float32 (L,)."""
    return A.count_by_layer(survivors).astype(jnp.float32)


class Share(NamedTuple):
    """By what growth is shared out: (A, survivors (n,), memory) -> float32 (L,), >= 0."""

    weights: Callable[[Masks, Array, Own], Array]
    memory: tuple[str, ...] = ()  # names of `MEMORIES` that the growth must keep


SHARES = Names(
    "share",
    Share,
    dict(
        momentum=Share(by_momentum, memory=("momentum",)),
        survivors=Share(by_survivors),
    ),
)


def shared_out(A: Masks, found: Candidates, k: Array, weights: Array) -> Candidates:
    """The k best of everything inactive, shared out to the layers in proportion to `weights` (L,).

    Of equals the first.
    """
    room = A.count_by_layer(found.valid)
    counts = share_out(k, weights, room)

    def chosen(l: int, A: Array, score: Array, ties: Callable[[], Array]) -> Array:
        return highest(bits(jnp.maximum(score, 0)), score >= 0, counts[l])

    best = A.by_layer(chosen, found.score, jnp.zeros(A.parts[-1].end, jnp.uint32))
    return found._replace(score=jnp.where(best, found.score, -1))
