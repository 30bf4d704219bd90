"""Sampling S: distinct inactive connections from the product distribution f x g, static shapes.

Both executions call this with the same keys and differ only in how they tell whether a connection
`exists`. The law is that of successive draws without replacement (Plackett-Luce). A layer whose S
fits in a chunk is drawn at once, in rounds; a larger one, a chunk at a time, by `arrivals.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.base import Part, table
from dst.methods import arrivals
from dst.methods.arrivals import LAST, Exists, Pairs
from dst.methods.base import Method
from dst.methods.earliest import earliest, intervals
from dst.methods.plan import Plan, most_active
from dst.methods.units import cumulative_shares, draw_pairs
from dst.network import Network

Array = jax.Array
Visit = Callable[[Any, Pairs, Array], Any]  # visit(carry, pairs, which of them are in S) -> carry

LEAST, MOST = 2**15, 2**20  # pairs of a chunk


class Sampling(NamedTuple):
    """How a network is sampled, static: the same in both executions."""

    chunk: int  # pairs that are drawn at a time
    rounds: int
    sizes: tuple[int, ...]  # the most that each layer's S can be
    exhaustible: tuple[bool, ...]  # whether a layer's S can be all that is inactive


def sampling(net: Network, method: Method, planned: Plan) -> Sampling:
    """The chunk is a quarter of the largest |P|: less memory than what exists."""
    chunk = int(np.clip(planned.grown.max() // 4, LEAST, MOST))
    layers, most = list(net.layers.values()), planned.subset.max(0)
    of_shape: dict[tuple[int, ...], int] = {}  # layers of one shape share one compiled program
    for layer, size in zip(layers, most, strict=True):
        of_shape[layer.dims] = max(of_shape.get(layer.dims, 1), int(size))
    sizes = tuple(of_shape[layer.dims] for layer in layers)
    K = most_active(net, method, planned.active)
    exhaustible = tuple(
        size >= layer.size - K and layer.size < 2**31
        for size, layer in zip(sizes, layers, strict=True)
    )
    return Sampling(chunk, method.rounds, sizes, exhaustible)


def group_by_shape(parts: Sequence[Part]) -> list[list[int]]:
    """Layers of one shape, which share one compiled program: ResNet-56 has 7 of them, not 57."""
    groups: dict[Any, list[int]] = {}
    for l, part in enumerate(parts):
        groups.setdefault((part.layer.dims, part.block, part.layer.large), []).append(l)
    return list(groups.values())


def fold_subset(
    how: Sampling,
    l: int,
    part: Part,
    key: Array,
    fg: tuple[Array, Array],
    asked: Array,
    active: Array,
    exists: Exists,
    visit: Visit,
    carry: Any,
) -> tuple[Any, Array]:
    """Folds `visit(carry, pairs, in S)` over S_l, each time sorted by block, output and column.

    `l` is a layer of this one's shape; `key` is its own. Also |S_l|: int32.
    """
    size, (f, g) = how.sizes[l], fg
    if size <= how.chunk and part.layer.size < 2**31:
        S, valid = draw_subset(
            key, f, g, part.layer.dims, exists, active, asked, size, how.rounds, how.exhaustible[l]
        )
        pairs = _sorted(part, S, valid)
        return visit(carry, pairs, pairs.valid), valid.sum(dtype=jnp.int32)
    possible = (f.max() > 0) & (g.max() > 0)
    columns, outputs = cumulative_shares(jnp.tile(f, part.n_in // f.size)), cumulative_shares(g)
    sizes = arrivals.Sizes(part.n_in, part.n_out, part.block)
    layer = arrivals.large(key, l, sizes, how.chunk, columns, outputs, exists)
    rate = jnp.where(possible, arrivals.pilot(layer, asked, how.rounds), 0)
    layer = layer._replace(rate=rate)

    def some(carry: Any) -> tuple[Any, Array]:
        walk = lambda see, carry: arrivals.sweep(layer, see, carry)  # noqa: E731
        return earliest(walk, visit, asked, intervals(how.chunk), carry)

    def every(carry: Any) -> tuple[Any, Array]:
        see = lambda carry, pairs: visit(carry, pairs, pairs.valid)  # noqa: E731
        return arrivals.enumerate_pairs(layer, see, carry), part.layer.size - active

    if not how.exhaustible[l]:
        return some(carry)
    return lax.cond(part.layer.size - active <= asked, every, some, carry)


def hold_subset(
    how: Sampling,
    l: int,
    part: Part,
    key: Array,
    fg: tuple[Array, Array],
    asked: Array,
    active: Array,
    exists: Exists,
) -> tuple[Array, Array]:
    """S_l held whole, in `fold_subset`'s order: flat positions int32 (size,), and |S_l|."""
    start = jnp.zeros(how.sizes[l], jnp.int32), jnp.int32(0)
    hold = functools.partial(held, lambda pairs: pairs.column * part.n_out + pairs.output)
    return fold_subset(how, l, part, key, fg, asked, active, exists, hold, start)[0]


def held(position: Callable[[Pairs], Array], carry: tuple[Array, Array], pairs: Pairs, in_S: Array):
    """The positions found so far and how many, with these behind them."""
    S, count = carry
    to = jnp.where(in_S, count + jnp.cumsum(in_S, dtype=jnp.int32) - 1, S.size)
    return S.at[to].set(position(pairs), mode="drop"), count + in_S.sum(dtype=jnp.int32)


def _sorted(part: Part, S: Array, valid: Array) -> Pairs:
    """Flat positions, most of them valid, as sorted pairs."""
    rows, width = np.uint32(part.n_out), np.uint32(part.block)
    number = arrivals.numbered(*jnp.divmod(S, part.n_out), rows, width)
    number = lax.sort(jnp.where(valid, number, LAST), is_stable=False)
    valid = number != LAST
    column, output = arrivals.pair_of(jnp.where(valid, number, 0), rows, width)
    return Pairs(jnp.int32(0), column, output, number, valid)


def fold_by_chance(
    chunk: int,
    most: int,
    free: int,
    parts: Sequence[Part],
    key: Array,
    asked: Array,
    active: Array,
    exists: Callable[[Array, Array, Array], Array],
    visit: Visit,
    carry: Any,
) -> tuple[Any, Array]:
    """Folds `visit(carry, pairs, in S)` over `asked` inactive connections of the network by chance.

    Every set of them, of all layers together, is equally likely. `key` and `active` are the
    network's; asked <= `most`, and at least `free` are inactive. Also how many there were.
    """
    possible = sum(part.layer.size for part in parts)
    all_pairs = _all_pairs(possible, most, free)
    rate = _rate(jnp.float32(possible) - active, asked)
    see_layer = by_chance(chunk, parts, key, exists, all_pairs)

    def walk(see: Callable, carry: Any) -> Any:
        one = lambda l, carry: see_layer(l, rate, see, carry)  # noqa: E731
        return lax.fori_loop(0, len(parts), one, carry)

    return _earliest(walk, visit, asked, chunk, all_pairs, carry)


def fold_by_chance_of_each(
    chunk: int,
    most: Sequence[int],
    free: Sequence[int],
    parts: Sequence[Part],
    key: Array,
    asked: Array,
    active: Array,
    exists: Callable[[Array, Array, Array], Array],
    visit: Visit,
    carry: Any,
) -> tuple[Any, Array]:
    """`fold_by_chance` of each layer alone: `most`, `free`, `asked` and `active` are (L,)."""
    numbers = zip(parts, most, free, strict=True)
    whole = [_all_pairs(part.layer.size, int(m), int(f)) for part, m, f in numbers]
    inactive = jnp.array([part.layer.size for part in parts], jnp.float32) - active
    total = jnp.int32(0)
    for all_pairs in sorted({*whole}):
        index = jnp.array([l for l, w in enumerate(whole) if w == all_pairs], jnp.int32)
        see_layer = by_chance(chunk, parts, key, exists, all_pairs)

        def one(n: Array, so_far: tuple, index=index, see_layer=see_layer, all_pairs=all_pairs):
            carry, total = so_far
            l = index[n]
            rate = _rate(inactive[l], asked[l])
            walk = lambda see, carry: see_layer(l, rate, see, carry)  # noqa: E731
            carry, count = _earliest(walk, visit, asked[l], chunk, all_pairs, carry)
            return carry, total + count

        carry, total = lax.fori_loop(0, index.size, one, (carry, total))
    return carry, total


def _enough(n: Any) -> Any:
    return n + 6 * n**0.5 + 10


def _all_pairs(possible: int, most: int, free: int) -> bool:
    """Whether pairs, whose hashes are times too, cost less than arrivals, as nearly all arrive."""
    return possible < 2**31 and 4 * _enough(most) >= free


def _rate(inactive: Array, asked: Array) -> Array:
    """Arrivals to expect of each pair."""
    share = jnp.minimum(_enough(asked.astype(jnp.float32)) / jnp.maximum(inactive, 1), 0.999)
    return -jnp.log1p(-share)


def _earliest(
    walk: Callable, visit: Visit, asked: Array, chunk: int, all_pairs: bool, carry: Any
) -> tuple[Any, Array]:
    # Enumerated pairs come in an order that the executions do not share: the cut is exact, 32 bits.
    cells, counts = (2**16, 2) if all_pairs else (intervals(chunk), 1)
    return earliest(walk, visit, asked, cells, carry, counts)


def by_chance(
    chunk: int,
    parts: Sequence[Part],
    key: Array,
    exists: Callable[[Array, Array, Array], Array],
    all_pairs: bool,
) -> Callable[[Array, Array, Callable, Any], Any]:
    """`see_layer(l, rate of a pair, see, carry)` folds `see` over l's arrivals, or all pairs."""
    n_in, n_out, block = (table(parts, field) for field in ("n_in", "n_out", "block"))
    widest, longest = (max(getattr(part, n) for part in parts) for n in ("n_in", "n_out"))

    def see_layer(l: Array, rate: Array, see: Callable, carry: Any) -> Any:
        f, g = (
            cumulative_shares((jnp.arange(size) < n[l]).astype(jnp.float32))
            for size, n in ((widest, n_in), (longest, n_out))
        )
        there = lambda column, output: exists(l, column, output)  # noqa: E731
        sizes = arrivals.Sizes(n_in[l], n_out[l], block[l])
        layer = arrivals.large(jax.random.fold_in(key, l), l, sizes, chunk, f, g, there)
        pairs = n_in[l].astype(jnp.float32) * n_out[l]
        fold = arrivals.enumerate_pairs if all_pairs else arrivals.sweep
        return fold(layer._replace(rate=rate * pairs), see, carry)

    return see_layer


# ------------------------------------------------------------------------------------- small layers
def draw_subset(
    key: Array,
    f: Array,
    g: Array,
    shape: tuple[int, ...],
    exists: Exists,
    active: Array,
    asked: Array,
    size: int,
    rounds: int,
    exhaustible: bool = True,
) -> tuple[Array, Array]:
    """S_l: at most `asked` distinct inactive positions in draw order, and which of them count.

    Shapes: f (n_in,) or (columns,), g (n_out,) -> flat positions int32 (size,), bool (size,). What
    is active or was drawn before is thrown away and drawn again, of at most `rounds` x `asked`
    draws. If `asked` reaches the number of inactive connections, S_l is all of them;
    `exhaustible=False` says that it never does.
    """
    nowhere, n_out = math.prod(shape), shape[-1]
    possible = (f.max() > 0) & (g.max() > 0)
    wanted = jnp.arange(size) < asked

    def unfilled(carry):
        i, held = carry
        # What a round finds stands behind what is held: more would not change the first `asked`.
        return (i < rounds) & ((held == nowhere) & wanted).any()

    def one_round(carry):
        i, held = carry
        column, output = draw_pairs(jax.random.fold_in(key, i), f, g, shape, size)
        due = i * size + jnp.arange(size) < rounds * asked
        new = possible & due & ~exists(column, output)
        drawn = jnp.where(new, column * n_out + output, nowhere)
        return i + 1, first_distinct(jnp.concatenate([held, drawn]), nowhere)[:size]

    def draw():
        start = jnp.int32(0), jnp.full(size, nowhere, jnp.int32)
        return lax.while_loop(unfilled, one_round, start)[1]

    def enumerate_all():
        position = jnp.arange(nowhere, dtype=jnp.int32)
        there = exists(*jnp.divmod(position, n_out))
        return lax.sort(jnp.where(there, nowhere, position))[:size]

    S = lax.cond(nowhere - active <= asked, enumerate_all, draw) if exhaustible else draw()
    valid = (S != nowhere) & wanted
    return jnp.where(valid, S, 0), valid


def first_distinct(drawn: Array, nowhere: int) -> Array:
    """The first of every value in draw order, then `nowhere`. Shapes: int32 (n,) -> int32 (n,)."""
    order = jnp.arange(drawn.size, dtype=jnp.int32)
    value, when = lax.sort((drawn, order), num_keys=1, is_stable=True)
    again = jnp.concatenate([jnp.zeros(1, bool), value[1:] == value[:-1]]) | (value == nowhere)
    when = jnp.where(again, drawn.size, when)
    return lax.sort((when, jnp.where(again, nowhere, value)), num_keys=1, is_stable=True)[1]
