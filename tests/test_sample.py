"""S: distinct, inactive, of the asked size, and drawn from f x g without replacement."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from dst import sample

F = np.array([0.0, 1.0, 2.0, 5.0])
G = np.array([3.0, 0.0, 1.0, 2.0, 0.5])


@pytest.fixture(params=["categorical", "inverse CDF"])
def branch(request, monkeypatch):
    """Both ways of drawing units, whatever the width."""
    monkeypatch.setattr(
        sample, "CATEGORICAL_ELEMENTS", 2**40 if request.param == "categorical" else 0
    )
    return request.param


def draw(key, f, g, mask, asked, size, rounds=8):
    return sample.draw_subset(key, f, g, mask, asked, size, rounds)


draw_jit = jax.jit(draw, static_argnums=(5, 6))


def chi_square_p(counts, p):
    return stats.chisquare(counts, counts.sum() * (p / p.sum(dtype=np.float64))).pvalue


# ------------------------------------------------------------------------------------- single draws
def test_units_are_drawn_with_their_probabilities(branch):
    p = np.array([0.0, 0.1, 0.0, 3.0, 1.0, 0.0, 1e-3, 0.5, 0.0], np.float32)
    units = np.asarray(sample.draw_units(jax.random.key(0), jnp.asarray(p), 200_000))
    counts = np.bincount(units, minlength=9)
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


def test_units_of_a_wide_layer_are_drawn_without_an_array_of_draws_by_units():
    n, draws = 65_536, 40_000
    rng = np.random.default_rng(0)
    p = np.where(rng.random(n) < 0.5, rng.random(n) ** 4, 0).astype(np.float32)
    draw_units = jax.jit(sample.draw_units, static_argnums=2)
    compiled = draw_units.lower(jax.random.key(0), p, draws).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * (n + draws)
    units = np.concatenate([np.asarray(draw_units(jax.random.key(s), p, draws)) for s in range(10)])
    assert (p[units] > 0).all()
    groups = np.add.reduceat(np.bincount(units, minlength=n), np.arange(0, n, 1024))
    expected = np.add.reduceat(p.astype(np.float64), np.arange(0, n, 1024)) / p.sum(dtype=float)
    assert chi_square_p(groups, expected) > 1e-4


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), active=st.sampled_from([0.0, 0.3, 0.8]), asked=st.integers(0, 16))
def test_rounds_that_are_not_needed_would_change_nothing(seed, active, asked):
    """S is the first of all draws of all rounds that are inactive and new, one at a time."""
    size, rounds = 12, 5
    rng = np.random.default_rng(seed)
    mask, key = rng.random((6, 8)) < active, jax.random.key(seed)
    f, g = (rng.random(n).astype(np.float32) ** 3 for n in mask.shape)
    found: list[int] = []
    for i in range(rounds):
        columns, outputs = pairs_jit(jax.random.fold_in(key, i), f, g, mask.shape, size)
        for at in (np.asarray(columns) * 8 + np.asarray(outputs)).tolist():
            if not mask.ravel()[at] and at not in found:
                found.append(at)
    S, valid = draw_jit(key, f, g, mask, jnp.int32(asked), size, rounds)
    if asked < (~mask).sum():
        assert np.asarray(S)[np.asarray(valid)].tolist() == found[: min(asked, size)]


pairs_jit = jax.jit(sample.draw_pairs, static_argnums=(3, 4))


def steered(monkeypatch, bits):
    """Draws as if these were the random bits."""
    monkeypatch.setattr(sample, "CATEGORICAL_ELEMENTS", 0)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.broadcast_to(bits, shape))


def test_the_inverse_cdf_has_no_steps_at_units_of_weight_zero(monkeypatch):
    # A cumulative sum of floats is a tree: rounding would leave small steps where nothing is added.
    # Draws are steered to the first and last number of every step.
    rng = np.random.default_rng(1)
    p = np.where(rng.random(65_536) < 0.5, rng.random(65_536) ** 4, 0).astype(np.float32)
    cumulative = np.cumsum(np.asarray(sample._shares(jnp.asarray(p))), dtype=np.uint64)
    total = int(cumulative[-1])
    begin, end = np.append(0, cumulative[:-1]), cumulative - 1
    into = lambda u: -(-(u.astype(object) * 2**32) // total)  # the least bits that fall on u  # noqa: E731
    bits = np.array([*into(begin[p > 0]), *into(end[p > 0])], np.uint32)
    steered(monkeypatch, bits)
    units = jax.jit(lambda p: sample.draw_units(jax.random.key(0), p, bits.size))(p)
    np.testing.assert_array_equal(units, np.tile(np.flatnonzero(p), 2))


@settings(deadline=None, max_examples=200)
@given(random=st.integers(0, 2**32 - 1), total=st.integers(0, 2**32 - 1))
@example(random=2**32 - 1, total=2**32 - 1)
@example(random=2**32 - 1, total=2**31)
@example(random=0xFFFF, total=0x10001)
def test_random_bits_are_scaled_exactly(random, total):
    assert int(scale(np.uint32(random), np.uint32(total))) == random * total >> 32


scale = jax.jit(sample._scale)


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


shares = jax.jit(sample._shares)


def test_a_unit_that_is_alone_is_always_drawn(monkeypatch):
    for bits in (0, 2**32 - 1):
        steered(monkeypatch, jnp.uint32(bits))
        for n in (0, 3, 8):
            p = jnp.zeros(9).at[n].set(1e-30)
            assert sample.draw_units(jax.random.key(0), p, 2).tolist() == [n, n]


def test_each_of_a_million_units_is_drawn_with_its_probability(monkeypatch):
    n, draws = 1_000_000, 2**21
    rng = np.random.default_rng(2)
    p = rng.random(n).astype(np.float32)
    p[rng.random(n) < 0.25] = 0
    heavy = rng.permutation(np.flatnonzero(p))[:50]
    p[heavy] = np.float32(n * 0.01) * (1 + rng.random(50, np.float32))
    draw_units = jax.jit(sample.draw_units, static_argnums=2)
    random = np.asarray(draw_units(jax.random.key(0), p, draws))
    counts, exact = np.bincount(random, minlength=n), draws * (p / p.sum(dtype=np.float64))
    assert not counts[p == 0].any()
    coarse = np.arange(0, n, 5000)
    assert chi_square_p(np.add.reduceat(counts, coarse), np.add.reduceat(exact, coarse)) > 1e-4

    steered(monkeypatch, jnp.arange(draws, dtype=jnp.uint32) * np.uint32(2**32 // draws))
    even = np.asarray(jax.jit(lambda p: sample.draw_units(jax.random.key(0), p, draws))(p))
    assert (np.diff(even) >= 0).all()
    counts = np.bincount(even, minlength=n)
    assert not counts[p == 0].any()
    # Evenly spaced bits give each unit its share to one draw, up to the rounding of its share.
    np.testing.assert_allclose(counts, exact, rtol=2e-3, atol=1.01)
    assert (counts[heavy] > 1000).all()


def test_positions_of_a_convolution_are_uniform_in_the_window(branch):
    shape = (2, 3, F.size, G.size)
    f, g = jnp.asarray(F), jnp.asarray(G)
    column, output = sample.draw_pairs(jax.random.key(1), f, g, shape, 100_000)
    at = column * G.size + output
    counts = np.bincount(np.asarray(at), minlength=120).reshape(shape)
    p = np.broadcast_to(np.outer(F, G) / F.sum() / G.sum() / 6, shape)
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


def test_columns_of_a_convolution_are_drawn_place_and_all(branch):
    shape = (2, 3, F.size, G.size)
    f = np.random.default_rng(3).integers(0, 4, 6 * F.size).astype(np.float32)
    pairs = sample.draw_pairs(jax.random.key(1), jnp.asarray(f), jnp.asarray(G), shape, 100_000)
    column, output = map(np.asarray, pairs)
    counts = np.bincount(column * G.size + output, minlength=120)
    p = np.outer(f / f.sum(dtype=np.float64), G / G.sum()).ravel()
    assert not counts[p == 0].any()
    assert chi_square_p(counts[p > 0], p[p > 0]) > 1e-4


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 5), (5, 1), (1, 5)])
def test_a_pair_is_an_input_and_an_output_drawn_apart(branch, n_in, n_out):
    f, g = np.array([0.0, 1, 2, 5, 3])[:n_in] + (n_in == 1), np.array([3.0, 0, 1, 2, 0.5])[:n_out]
    pairs = jax.jit(lambda key: sample.draw_pairs(key, f, g, (n_in, n_out), 50_000))
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
    i, o = sample.draw_pairs(jax.random.key(2), f, g, (n, n), 1000)
    assert set(zip(i.tolist(), o.tolist(), strict=True)) == {
        (3, 0), (3, n - 2), (n - 1, 0), (n - 1, n - 2)
    }  # fmt: skip


# ------------------------------------------------------------------------------------ whole subsets
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), density=st.floats(0, 1), asked=st.integers(0, 24))
def test_a_subset_is_distinct_inactive_and_never_larger_than_asked(seed, density, asked):
    rng = np.random.default_rng(seed)
    mask = rng.random((2, 2, 3, 4)) < density
    f, g = rng.integers(0, 3, 3).astype(np.float32), rng.integers(0, 3, 4).astype(np.float32)
    S, valid = draw_jit(jax.random.key(seed), f, g, mask, np.int32(asked), 24, 8)
    chosen = np.asarray(S)[np.asarray(valid)]
    inactive = np.flatnonzero(~mask)
    assert len(set(chosen.tolist())) == len(chosen) <= asked
    assert np.isin(chosen, inactive).all()
    assert (np.asarray(S) >= 0).all()
    assert (np.asarray(S) < mask.size).all()
    if len(inactive) <= asked:
        np.testing.assert_array_equal(chosen, inactive)
    else:
        product = np.broadcast_to(np.outer(f, g), mask.shape)
        assert (product.ravel()[chosen] > 0).all()


def test_every_asked_size_is_met_exactly():
    rng = np.random.default_rng(0)
    mask = rng.random((12, 20)) < 0.3
    f, g = rng.random(12, np.float32) + 0.5, rng.random(20, np.float32) + 0.5
    for asked in range(0, 101):
        _, valid = draw_jit(jax.random.key(asked), f, g, mask, np.int32(asked), 100, 8)
        assert int(valid.sum()) == asked


def test_a_smaller_subset_is_the_beginning_of_a_larger_one():
    f, g = jnp.asarray(F), jnp.asarray(G)
    mask = np.zeros((4, 5), bool)
    S, valid = draw_jit(jax.random.key(5), f, g, mask, np.int32(8), 8, 8)
    assert bool(valid.all())
    for asked in range(8):
        first, counts = draw_jit(jax.random.key(5), f, g, mask, np.int32(asked), 8, 8)
        np.testing.assert_array_equal(first[:asked], S[:asked])
        np.testing.assert_array_equal(counts, np.arange(8) < asked)


def test_without_any_weight_there_are_no_candidates(branch):
    sampled = jax.jit(lambda f, g: draw(jax.random.key(0), f, g, jnp.zeros((4, 5), bool), 6, 6))
    for f, g in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (np.nan, 1.0)):
        S, valid = sampled(np.full(4, f), np.full(5, g))
        assert not valid.any()
        assert not S.any()


def test_an_empty_subset_is_possible():
    S, valid = draw(jax.random.key(0), jnp.ones(4), jnp.ones(5), jnp.zeros((4, 5), bool), 0, 0)
    assert S.shape == valid.shape == (0,)


def test_leaving_out_the_enumeration_changes_no_draw():
    mask = jnp.arange(20).reshape(4, 5) % 3 == 0  # 13 inactive ones
    for exhaustible in (True, False):
        sampled = jax.jit(
            lambda asked, e=exhaustible: sample.draw_subset(
                jax.random.key(2), jnp.asarray(F), jnp.asarray(G), mask, asked, 12, 8, e
            )
        )
        S, valid = sampled(7)
        if exhaustible:
            expected = S
        np.testing.assert_array_equal(S, expected)
        assert valid.sum() == 7


# ------------------------------------------------------------------------------- the law of subsets
def inclusion(p, size):
    """P(i in S) of Plackett-Luce: `size` draws without replacement, every order summed."""
    share = np.zeros(p.size)
    for order in itertools.permutations(np.flatnonzero(p), size):
        chosen = p[list(order)]
        gone = np.concatenate([[0.0], np.cumsum(chosen)[:-1]])
        share[list(order)] += np.prod(chosen / (p.sum() - gone))
    return share


@pytest.mark.parametrize("size", [2, 4])
def test_sampling_without_replacement_is_gumbel_top_k(size, branch):
    trials = 10_000
    f, g = np.array([0.5, 1.0, 3.0]), np.array([1.0, 0.5, 2.0])
    mask = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    p = np.where(mask, 0, np.outer(f, g)).ravel()
    keys = jax.random.split(jax.random.key(size), trials)
    one = lambda key: draw(key, jnp.asarray(f), jnp.asarray(g), jnp.asarray(mask), size, size, 40)  # noqa: E731
    S, valid = jax.jit(jax.vmap(one))(keys)
    assert bool(valid.all())
    noise = jax.random.gumbel(jax.random.key(99), (trials, p.size))
    oracle = jax.lax.top_k(np.log(np.maximum(p, 1e-300)).astype(np.float32)[None] + noise, size)[1]
    exact = inclusion(p, size)
    error = np.sqrt(exact * (1 - exact) / trials) + 1e-12
    for drawn in (S, oracle):
        counts = np.bincount(np.asarray(drawn).ravel(), minlength=p.size) / trials
        assert np.abs((counts - exact) / error).max() < 4.5
    # The first draw is f x g itself; the law holds for the order, too.
    first = np.bincount(np.asarray(S)[:, 0], minlength=p.size)
    assert chi_square_p(first[p > 0], p[p > 0] / p.sum()) > 1e-4


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_first_distinct_keeps_the_first_of_each_in_order(values):
    padded = values + [9] * (12 - len(values))  # 9 is `nowhere`
    found = np.asarray(sample.first_distinct(jnp.asarray(padded, jnp.int32), 9)).tolist()
    expected = [v for v in dict.fromkeys(padded) if v != 9]
    assert found == expected + [9] * (12 - len(expected))
