"""Drawing units, and pairs of an input and an output unit, from weights that need no norm."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

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
    cumulative = cumulative_shares(p)
    random = jax.random.bits(key, shape, jnp.uint32)
    one = jnp.vectorize(unit_at, signature="(n),(m)->(m)")
    return one(cumulative, scaled(random, cumulative[..., -1:]))


def cumulative_shares(p: Array) -> Array:
    """The integers of `_shares`, summed up: uint32 (..., n)."""
    return jnp.cumsum(_shares(p), axis=-1)


def _shares(p: Array) -> Array:
    """Integers in proportion to p, in sum about 2^31: float32 would lose units among a million."""
    top = p.max(-1, keepdims=True)
    p = p / jnp.where(top > 0, top, 1)
    share = (p / jnp.maximum(p.sum(-1, keepdims=True), 1) * 2.0**31).astype(jnp.uint32)
    return jnp.where(p > 0, jnp.maximum(share, 1), 0)


def unit_at(cumulative: Array, u: Array) -> Array:
    """The unit whose share holds u: int32."""
    found = jnp.searchsorted(cumulative, u, side="right")
    return jnp.minimum(found, cumulative.size - 1).astype(jnp.int32)


def scaled(random: Array, total: Array) -> Array:
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
