"""S: distinct, inactive, of the asked size, and drawn from f x g without replacement."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.methods import sample, units
from tests.test_units import F, G, chi_square_p


def draw(key, f, g, mask, asked, size, rounds=8, exhaustible=True):
    """`draw_subset` of a mask, as masked execution calls it."""
    mask = jnp.asarray(mask)
    flat = mask.ravel()
    exists = lambda column, output: flat[column * mask.shape[-1] + output]  # noqa: E731
    active = flat.sum(dtype=jnp.int32)
    return sample.draw_subset(
        key, f, g, mask.shape, exists, active, asked, size, rounds, exhaustible
    )


draw_jit = jax.jit(draw, static_argnums=(5, 6))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), active=st.sampled_from([0.0, 0.3, 0.8]), asked=st.integers(0, 16))
def test_rounds_that_are_not_needed_would_change_nothing(seed, active, asked):
    """S is the first of rounds x asked draws that are inactive and new, one at a time."""
    size, rounds = 12, 5
    rng = np.random.default_rng(seed)
    mask, key = rng.random((6, 8)) < active, jax.random.key(seed)
    f, g = (rng.random(n).astype(np.float32) ** 3 for n in mask.shape)
    found: list[int] = []
    for i in range(rounds):
        columns, outputs = pairs_jit(jax.random.fold_in(key, i), f, g, mask.shape, size)
        for at in (np.asarray(columns) * 8 + np.asarray(outputs)).tolist()[
            : max(0, rounds * asked - i * size)
        ]:
            if not mask.ravel()[at] and at not in found:
                found.append(at)
    S, valid = draw_jit(key, f, g, mask, jnp.int32(asked), size, rounds)
    if asked < (~mask).sum():
        assert np.asarray(S)[np.asarray(valid)].tolist() == found[: min(asked, size)]


pairs_jit = jax.jit(units.draw_pairs, static_argnums=(3, 4))


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
            lambda asked, e=exhaustible: draw(
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
