"""Sampling S: distinct inactive connections from the product distribution f x g, static shapes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# jax.random.categorical builds draws x n noise. 2^20 float32 (4 MiB) bound that; above, the same
# law comes from inverting the cumulative sum.
CATEGORICAL_ELEMENTS = 2**20


def draw_units(key: Array, p: Array, draws: int) -> Array:
    """`draws` units with probabilities proportional to p >= 0: (..., n) -> int32 (..., draws).

    Units of weight 0 are never drawn (if all are 0, what is drawn means nothing).
    """
    shape = (*p.shape[:-1], draws)
    if draws * p.size <= CATEGORICAL_ELEMENTS:
        logits = jnp.log(p)[..., None, :]
        return jax.random.categorical(key, logits, shape=shape).astype(jnp.int32)
    cumulative = jnp.cumsum(_shares(p), axis=-1)
    u = _scale(jax.random.bits(key, shape, jnp.uint32), cumulative[..., -1:])
    search = jnp.vectorize(
        lambda c, v: jnp.searchsorted(c, v, side="right"), signature="(n),(m)->(m)"
    )
    return jnp.minimum(search(cumulative, u), p.shape[-1] - 1).astype(jnp.int32)


def _shares(p: Array) -> Array:
    """Integers in proportion to p, in sum about 2^31: float32 would lose units among a million."""
    top = p.max(-1, keepdims=True)
    p = p / jnp.where(top > 0, top, 1)
    share = (p / jnp.maximum(p.sum(-1, keepdims=True), 1) * 2.0**31).astype(jnp.uint32)
    return jnp.where(p > 0, jnp.maximum(share, 1), 0)


def _scale(random: Array, total: Array) -> Array:
    """floor(random total / 2^32) in uint32, from products of 16 bits."""
    (a, b), (c, d) = ((x >> 16, x & 0xFFFF) for x in (random, total))
    middle = (b * d >> 16) + (a * d & 0xFFFF) + (b * c & 0xFFFF)
    return a * c + (a * d >> 16) + (b * c >> 16) + (middle >> 16)


def draw_pairs(key: Array, f: Array, g: Array, shape: tuple[int, ...], draws: int):
    """Columns and outputs from f x g, the place in a convolution's window uniform (App. C).

    Shapes: f (n_in,), g (n_out,) -> int32 (draws,), (draws,); column is (kx, ky, i) flattened. From
    f (kx ky n_in,) the column is drawn, place and all.
    """
    alike = math.prod(shape[:-1]) // f.size  # places that f does not tell apart
    marginals = [f, g] if alike == 1 else [f, g, jnp.ones(alike, f.dtype)]
    n = max(p.size for p in marginals)
    # One call for all marginals: random bits are what takes long to compile.
    p = jnp.stack([jnp.pad(p, (0, n - p.size)) for p in marginals])
    i, o, *xy = draw_units(key, p, draws)
    return sum(xy) * shape[-2] + i, o


def draw_subset(
    key: Array,
    f: Array,
    g: Array,
    mask: Array,
    asked: Array,
    size: int,
    rounds: int,
    exhaustible: bool = True,
) -> tuple[Array, Array]:
    """S_l: at most `asked` distinct inactive positions in draw order, and which of them count.

    Shapes: f (n_in,) or (columns,), g (n_out,), mask (..., n_in, n_out) -> int32 (size,), bool
    (size,). Draws that are active or were drawn before are thrown away and drawn again, `rounds`
    times at most, which is sampling without replacement (Plackett-Luce). If `asked` reaches the
    number of inactive connections, S_l is all of them; `exhaustible=False` says that it never does.
    """
    flat, nowhere = mask.ravel(), mask.size
    inactive = nowhere - flat.sum(dtype=jnp.int32)
    possible = (f.max() > 0) & (g.max() > 0)
    wanted = jnp.arange(size) < asked

    def unfilled(carry):
        i, held = carry
        # What a round finds stands behind what is held: more would not change the first `asked`.
        return (i < rounds) & ((held == nowhere) & wanted).any()

    def one_round(carry):
        i, held = carry
        column, output = draw_pairs(jax.random.fold_in(key, i), f, g, mask.shape, size)
        drawn = column * mask.shape[-1] + output
        drawn = jnp.where(possible & ~flat[drawn], drawn, nowhere)
        return i + 1, first_distinct(jnp.concatenate([held, drawn]), nowhere)[:size]

    def draw():
        start = jnp.int32(0), jnp.full(size, nowhere, jnp.int32)
        return lax.while_loop(unfilled, one_round, start)[1]

    def enumerate_all():
        return lax.sort(jnp.where(flat, nowhere, jnp.arange(nowhere, dtype=jnp.int32)))[:size]

    S = lax.cond(inactive <= asked, enumerate_all, draw) if exhaustible else draw()
    valid = (S != nowhere) & wanted
    return jnp.where(valid, S, 0), valid


def first_distinct(drawn: Array, nowhere: int) -> Array:
    """The first of every value in draw order, then `nowhere`. Shapes: int32 (n,) -> int32 (n,)."""
    order = jnp.arange(drawn.size, dtype=jnp.int32)
    value, when = lax.sort((drawn, order), num_keys=1, is_stable=True)
    again = jnp.concatenate([jnp.zeros(1, bool), value[1:] == value[:-1]]) | (value == nowhere)
    when = jnp.where(again, drawn.size, when)
    return lax.sort((when, jnp.where(again, nowhere, value)), num_keys=1, is_stable=True)[1]
