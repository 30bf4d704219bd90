"""Units and pairs are drawn with their probabilities, among few and among a million."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from dst.methods import units

F = np.array([0.0, 1.0, 2.0, 5.0])
G = np.array([3.0, 0.0, 1.0, 2.0, 0.5])


def chi_square_p(counts, p):
    return stats.chisquare(counts, counts.sum() * (p / p.sum(dtype=np.float64))).pvalue


def test_units_are_drawn_with_their_probabilities(branch):
    p = np.array([0.0, 0.1, 0.0, 3.0, 1.0, 0.0, 1e-3, 0.5, 0.0], np.float32)
    drawn = np.asarray(units.draw_units(jax.random.key(0), jnp.asarray(p), 200_000))
    counts = np.bincount(drawn, minlength=9)
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


def test_units_of_a_wide_layer_are_drawn_without_an_array_of_draws_by_units():
    n, draws = 65_536, 40_000
    rng = np.random.default_rng(0)
    p = np.where(rng.random(n) < 0.5, rng.random(n) ** 4, 0).astype(np.float32)
    draw_units = jax.jit(units.draw_units, static_argnums=2)
    compiled = draw_units.lower(jax.random.key(0), p, draws).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * (n + draws)
    drawn = np.concatenate([np.asarray(draw_units(jax.random.key(s), p, draws)) for s in range(10)])
    assert (p[drawn] > 0).all()
    groups = np.add.reduceat(np.bincount(drawn, minlength=n), np.arange(0, n, 1024))
    expected = np.add.reduceat(p.astype(np.float64), np.arange(0, n, 1024)) / p.sum(dtype=float)
    assert chi_square_p(groups, expected) > 1e-4


def steered(monkeypatch, bits):
    """Draws as if these were the random bits."""
    monkeypatch.setattr(units, "CATEGORICAL_ELEMENTS", 0)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.broadcast_to(bits, shape))


def test_the_inverse_cdf_has_no_steps_at_units_of_weight_zero(monkeypatch):
    # A cumulative sum of floats is a tree: rounding would leave small steps where nothing is added.
    # Draws are steered to the first and last number of every step.
    rng = np.random.default_rng(1)
    p = np.where(rng.random(65_536) < 0.5, rng.random(65_536) ** 4, 0).astype(np.float32)
    cumulative = np.cumsum(np.asarray(units._shares(jnp.asarray(p))), dtype=np.uint64)
    total = int(cumulative[-1])
    begin, end = np.append(0, cumulative[:-1]), cumulative - 1
    into = lambda u: -(-(u.astype(object) * 2**32) // total)  # the least bits that fall on u  # noqa: E731
    bits = np.array([*into(begin[p > 0]), *into(end[p > 0])], np.uint32)
    steered(monkeypatch, bits)
    drawn = jax.jit(lambda p: units.draw_units(jax.random.key(0), p, bits.size))(p)
    np.testing.assert_array_equal(drawn, np.tile(np.flatnonzero(p), 2))


@settings(deadline=None, max_examples=200)
@given(random=st.integers(0, 2**32 - 1), total=st.integers(0, 2**32 - 1))
@example(random=2**32 - 1, total=2**32 - 1)
@example(random=2**32 - 1, total=2**31)
@example(random=0xFFFF, total=0x10001)
def test_random_bits_are_scaled_exactly(random, total):
    assert int(scale(np.uint32(random), np.uint32(total))) == random * total >> 32


scale = jax.jit(units.scaled)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31 - 1), spread=st.sampled_from([0, 1, 5, 18]))
def test_shares_are_proportional_and_never_lost(seed, spread):
    rng = np.random.default_rng(seed)
    p = (10 ** rng.uniform(-spread, spread, 200)).astype(np.float32)
    p[rng.random(200) < 0.3] = 0
    found = np.asarray(shares(p)).astype(np.float64)
    exact = 2.0**31 * (p / p.sum(dtype=np.float64))
    assert (found[p == 0] == 0).all()
    assert (found[p > 0] >= 1).all()
    np.testing.assert_allclose(found[p > 0], np.maximum(exact[p > 0], 1), rtol=1e-5, atol=1)


shares = jax.jit(units._shares)


def test_a_unit_that_is_alone_is_always_drawn(monkeypatch):
    for bits in (0, 2**32 - 1):
        steered(monkeypatch, jnp.uint32(bits))
        for n in (0, 3, 8):
            p = jnp.zeros(9).at[n].set(1e-30)
            assert units.draw_units(jax.random.key(0), p, 2).tolist() == [n, n]


def test_each_of_a_million_units_is_drawn_with_its_probability(monkeypatch):
    n, draws = 1_000_000, 2**21
    rng = np.random.default_rng(2)
    p = rng.random(n).astype(np.float32)
    p[rng.random(n) < 0.25] = 0
    heavy = rng.permutation(np.flatnonzero(p))[:50]
    p[heavy] = np.float32(n * 0.01) * (1 + rng.random(50, np.float32))
    draw_units = jax.jit(units.draw_units, static_argnums=2)
    random = np.asarray(draw_units(jax.random.key(0), p, draws))
    counts, exact = np.bincount(random, minlength=n), draws * (p / p.sum(dtype=np.float64))
    assert not counts[p == 0].any()
    coarse = np.arange(0, n, 5000)
    assert chi_square_p(np.add.reduceat(counts, coarse), np.add.reduceat(exact, coarse)) > 1e-4

    steered(monkeypatch, jnp.arange(draws, dtype=jnp.uint32) * np.uint32(2**32 // draws))
    even = np.asarray(jax.jit(lambda p: units.draw_units(jax.random.key(0), p, draws))(p))
    assert (np.diff(even) >= 0).all()
    counts = np.bincount(even, minlength=n)
    assert not counts[p == 0].any()
    # Evenly spaced bits give each unit its share to one draw, up to the rounding of its share.
    np.testing.assert_allclose(counts, exact, rtol=2e-3, atol=1.01)
    assert (counts[heavy] > 1000).all()


def test_positions_of_a_convolution_are_uniform_in_the_window(branch):
    shape = (2, 3, F.size, G.size)
    f, g = jnp.asarray(F), jnp.asarray(G)
    column, output = units.draw_pairs(jax.random.key(1), f, g, shape, 100_000)
    at = column * G.size + output
    counts = np.bincount(np.asarray(at), minlength=120).reshape(shape)
    p = np.broadcast_to(np.outer(F, G) / F.sum() / G.sum() / 6, shape)
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


def test_columns_of_a_convolution_are_drawn_place_and_all(branch):
    shape = (2, 3, F.size, G.size)
    f = np.random.default_rng(3).integers(0, 4, 6 * F.size).astype(np.float32)
    pairs = units.draw_pairs(jax.random.key(1), jnp.asarray(f), jnp.asarray(G), shape, 100_000)
    column, output = map(np.asarray, pairs)
    counts = np.bincount(column * G.size + output, minlength=120)
    p = np.outer(f / f.sum(dtype=np.float64), G / G.sum()).ravel()
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 5), (5, 1), (1, 5)])
def test_a_pair_is_an_input_and_an_output_drawn_apart(branch, n_in, n_out):
    f, g = np.array([0.0, 1, 2, 5, 3])[:n_in] + (n_in == 1), np.array([3.0, 0, 1, 2, 0.5])[:n_out]
    pairs = jax.jit(lambda key: units.draw_pairs(key, f, g, (n_in, n_out), 50_000))
    i, o = pairs(jax.random.key(1))
    assert i.dtype == o.dtype == jnp.int32
    counts = np.bincount(np.asarray(i) * n_out + np.asarray(o), minlength=n_in * n_out)
    p = np.outer(f, g).ravel()
    assert counts.size == p.size
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


def test_pairs_reach_layers_of_more_than_2_to_the_32_connections():
    n = 2**20
    f = jnp.zeros(n).at[jnp.array([3, n - 1])].set(1.0)
    g = jnp.zeros(n).at[jnp.array([0, n - 2])].set(1.0)
    i, o = units.draw_pairs(jax.random.key(2), f, g, (n, n), 1000)
    assert set(zip(i.tolist(), o.tolist(), strict=True)) == {
        (3, 0), (3, n - 2), (n - 1, 0), (n - 1, n - 2)
    }  # fmt: skip
