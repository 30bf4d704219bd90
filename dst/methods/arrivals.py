"""S of a layer, or of a network, that no chunk could hold: the earliest arrivals.

Pair (a, b) is a Poisson process of rate M f_a g_b on [0, 1], and S is the |S| inactive pairs of the
earliest first arrivals: successive draws without replacement (Plackett-Luce). Arrivals are drawn
bucket by bucket, so that those of a pair meet in one; `earliest.py` sweeps over them repeatedly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.backends import cpp as kernels
from dst.connections.backends.dispatch import on_cpu
from dst.connections.hashing import hashed, mix, salts
from dst.methods.units import scaled, unit_at

Array = jax.Array
Exists = Callable[[Array, Array], Array]  # (column, output) -> whether there is a connection

LAST, GOLDEN = np.uint32(2**32 - 1), np.uint32(0x9E3779B9)
PILOT = 2**13  # draws that tell how many arrivals are repeats or active
PILOT_STREAM, SALT_STREAM = 2**31 - 1, 2**31 - 2  # of a layer's key, beside its buckets'
STEP = 1.1  # between the rates that the pilot compares


class Pairs(NamedTuple):
    """Distinct inactive pairs of a layer, sorted by block of columns, output and column."""

    l: Array  # int32 (), the layer
    column: Array  # int32 (n,)
    output: Array  # int32 (n,)
    time: Array  # uint32 (n,), the first arrival; 2^32 is time 1
    valid: Array  # bool (n,)


class Sizes(NamedTuple):
    """Of a layer; static, or traced, so that one program serves layers of many shapes."""

    n_in: Array | int  # columns
    n_out: Array | int
    block: Array | int  # columns of a block


class Large(NamedTuple):
    """A layer, and how its pairs arrive; f, g and salt may be longer than it has units."""

    key: Array
    l: Array  # int32 ()
    sizes: Sizes
    chunk: int  # static: pairs of a bucket, at most
    f: Array  # uint32, cumulative shares of the columns
    g: Array  # uint32, and of the outputs
    salt: Array  # uint32, of each output
    exists: Exists
    rate: Array  # float32 (), M: arrivals to expect of the layer


def large(
    key: Array, l: Array | int, sizes: Sizes, chunk: int, f: Array, g: Array, exists: Exists
) -> Large:
    """The layer, at which nothing arrives yet; `f` and `g` are cumulative shares."""
    salt = salts(key, SALT_STREAM, g.size)
    return Large(key, jnp.int32(l), sizes, chunk, f, g, salt, exists, jnp.float32(0))


def sum_before(cumulative: Array, n: Array) -> Array:
    """The sum of the first n."""
    return jnp.where(n > 0, cumulative[jnp.maximum(n - 1, 0)], 0)


def _share(cumulative: Array, begin: Array, end: Array) -> Array:
    """What units begin to end - 1 have of the whole: float32."""
    total = jnp.maximum(cumulative[-1], 1).astype(jnp.float32)
    return (sum_before(cumulative, end) - sum_before(cumulative, begin)).astype(jnp.float32) / total


def _reach(cumulative: Array, begin: Array, share: Array) -> Array:
    """The end of the units from `begin` on that have at most `share` of the whole: int32."""
    limit = cumulative[-1].astype(jnp.float32) * jnp.minimum(share, 1)
    target = sum_before(cumulative, begin) + limit.astype(jnp.uint32)
    return jnp.searchsorted(cumulative, target, side="right").astype(jnp.int32)


def _bucket(layer: Large, b: Array, a: Array) -> tuple[Array, Array]:
    """(end of outputs, end of columns) of the bucket that begins at output b and column a.

    Several whole outputs, or of one that is too likely some columns; at least one pair, whatever
    its rate. So that more than a chunk arrive only once in a billion buckets, six standard
    deviations are left free; what does not fit is left out.
    """
    room, (n_in, n_out, _) = layer.chunk - 6 * math.sqrt(layer.chunk), layer.sizes
    most = jnp.uint32(2**31) // jnp.uint32(n_in)  # a bucket's pairs are numbered in 32 bits
    end = b + jnp.minimum(most, (n_out - b).astype(jnp.uint32)).astype(jnp.int32)
    ends = jnp.minimum(_reach(layer.g, b, room / layer.rate), end)
    row = jnp.maximum(layer.rate * _share(layer.g, b, b + 1), 1e-30)
    some = jnp.clip(_reach(layer.f, a, room / row), a + 1, n_in)
    whole = (a == 0) & (ends > b)
    return jnp.where(whole, ends, b + 1), jnp.where(whole, n_in, some)


def _arrivals(layer: Large, b: Array, a: Array, b_end: Array, a_end: Array) -> Pairs:
    """What arrives in outputs b to b_end - 1 and columns a to a_end - 1: a draw of their own."""
    key = jax.random.fold_in(jax.random.fold_in(layer.key, b), a)
    expected = layer.rate * _share(layer.g, b, b_end) * _share(layer.f, a, a_end)
    # Poisson numbers are written for one kind of key only.
    seed = jax.random.bits(jax.random.fold_in(key, 0), (), jnp.uint32)
    own = jax.random.key(seed, impl="threefry2x32")
    count = jax.random.poisson(own, expected, dtype=jnp.int32)
    random = jax.random.bits(jax.random.fold_in(key, 1), (2, layer.chunk), jnp.uint32)
    bounds = jnp.stack([b, b_end, a, a_end])
    draw = kernels.arrivals if on_cpu() else pairs_of
    column, output, time, valid = draw(
        random,
        jnp.minimum(count, layer.chunk),
        bounds,
        layer.f,
        layer.g,
        layer.salt,
        jnp.uint32(layer.sizes.block),
    )
    return Pairs(layer.l, column, output, time, valid & ~layer.exists(column, output))


def pairs_of(
    random: Array, count: Array, bounds: Array, f: Array, g: Array, salt: Array, block: Array
) -> tuple[Array, Array, Array, Array]:
    """Column, output, time and validity of a bucket's distinct pairs, of `count` that arrive.

    A pair's first arrival is the least of as many uniform times as it has arrivals, made from its
    own hash, so that times are not sorted with the pairs; of 256 of them none will matter.
    """
    n, (b, b_end, a, a_end) = random.shape[1], bounds
    (g0, g1), (f0, f1) = (
        (sum_before(c, i), sum_before(c, end)) for c, i, end in ((g, b, b_end), (f, a, a_end))
    )
    output = unit_at(g, g0 + scaled(random[0], g1 - g0))
    column = unit_at(f, f0 + scaled(random[1], f1 - f0))
    rows = (b_end - b).astype(jnp.uint32)
    number = numbered(column, output - b, rows, block)
    number = lax.sort(jnp.where(jnp.arange(n) < count, number, LAST), is_stable=False)
    first = jnp.append(jnp.ones(1, bool), number[1:] != number[:-1])
    at = jnp.where(first, jnp.cumsum(first, dtype=jnp.int32) - 1, n)
    # The distinct ones to the front, and where each begins.
    begin = jnp.full(n + 1, n, jnp.int32).at[at].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    number = jnp.append(number, LAST)[begin[:n]]
    valid, times = number != LAST, jnp.minimum(jnp.diff(begin), 256)
    column, row = pair_of(number, rows, block)
    column, output = jnp.where(valid, column, a), jnp.where(valid, row, 0) + b
    hashes = hashed(salt[output], column)

    def another(j: Array, least: Array) -> Array:
        again = mix(hashes + j.astype(jnp.uint32) * GOLDEN)
        return jnp.where(j < times, jnp.minimum(least, again), least)

    time = lax.fori_loop(1, jnp.where(valid, times, 0).max(), another, hashes)
    return column, output, jnp.where(valid, time, 0), valid


def numbered(column: Array, row: Array, rows: Any, width: Any) -> Array:
    """The pair's number in its bucket, in the order of `Pairs`: uint32."""
    block, within = jnp.divmod(column.astype(jnp.uint32), width)
    return (block * rows + row.astype(jnp.uint32)) * width + within


def pair_of(number: Array, rows: Any, width: Any) -> tuple[Array, Array]:
    """Column and row of a pair's number: int32."""
    row, within = jnp.divmod(number, width)
    block, row = jnp.divmod(row, rows)
    return (block * width + within).astype(jnp.int32), row.astype(jnp.int32)


def sweep(layer: Large, see: Callable[[Any, Pairs], Any], carry: Any) -> Any:
    """Folds `see(carry, pairs)` over the layer's buckets; again with the same key, the same."""

    def one(at):
        b, a, carry = at
        b_end, a_end = _bucket(layer, b, a)
        carry = see(carry, _arrivals(layer, b, a, b_end, a_end))
        done = a_end == layer.sizes.n_in
        return jnp.where(done, b_end, b), jnp.where(done, 0, a_end), carry

    start = jnp.int32(0), jnp.int32(0), carry
    return lax.while_loop(lambda at: at[0] < layer.sizes.n_out, one, start)[2]


def enumerate_pairs(layer: Large, see: Callable[[Any, Pairs], Any], carry: Any) -> Any:
    """Folds `see(carry, pairs)` over every inactive pair; their hashes are their times."""
    n_in, n_out, block = (jnp.uint32(n) for n in layer.sizes)
    total = (n_in + block - 1) // block * block * n_out

    def one(n, carry):
        number = (n * layer.chunk + jnp.arange(layer.chunk, dtype=jnp.int32)).astype(jnp.uint32)
        column, output = pair_of(number, n_out, block)
        inside = (number < total) & (column < layer.sizes.n_in)
        column, output = jnp.where(inside, column, 0), jnp.where(inside, output, 0)
        valid = inside & ~layer.exists(column, output)
        time = hashed(layer.salt[output], column)
        return see(carry, Pairs(layer.l, column, output, time, valid))

    chunks = (total + np.uint32(layer.chunk - 1)) // np.uint32(layer.chunk)
    return lax.fori_loop(0, chunks.astype(jnp.int32), one, carry)


def pilot(layer: Large, asked: Array, rounds: int) -> Array:
    """M: arrivals after which `asked` inactive pairs have been seen, at most rounds x asked.

    After M arrivals sum_ab (1 - exp(-M p_ab)) pairs have been; p = f x g. Draws of their own, from
    p, tell it: M E[(1 - exp(-M p)) / (M p)] over those that are inactive. A twentieth and six
    standard deviations more are drawn.
    """
    random = jax.random.bits(jax.random.fold_in(layer.key, PILOT_STREAM), (2, PILOT), jnp.uint32)
    column = unit_at(layer.f, scaled(random[0], layer.f[-1]))
    output = unit_at(layer.g, scaled(random[1], layer.g[-1]))
    p = _share(layer.f, column, column + 1) * _share(layer.g, output, output + 1)
    new = ~layer.exists(column, output)
    asked = asked.astype(jnp.float32)
    steps = math.ceil(math.log(rounds) / math.log(STEP)) if rounds > 1 else 0
    rates = asked * jnp.asarray(np.minimum(STEP ** np.arange(steps + 1), rounds), jnp.float32)
    x = jnp.maximum(rates[:, None] * p[None], 1e-20)
    seen = rates * jnp.where(new[None], -jnp.expm1(-x) / x, 0).mean(1)
    enough = seen >= 1.05 * asked + 6 * jnp.sqrt(asked)
    return jnp.where(enough.any(), rates[jnp.argmax(enough)], rates[-1])
