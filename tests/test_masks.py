"""Masks: exact counts, ER and ERK densities, G(n, M) masks, weights scaled to the fan-in."""

from __future__ import annotations

import math
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dst.config import ConfigError
from dst.masks import (
    DISTRIBUTIONS,
    active_count,
    dead_units,
    fan_in_weights,
    layer_counts,
    layer_densities,
    random_mask,
)

ORACLE_8 = {"conv1": (3, 3, 3, 16), "conv2": (3, 3, 16, 32), "fc": (32, 10)}
kernels = st.one_of(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
)


def sizes(shapes):
    return {path: math.prod(shape) for path, shape in shapes.items()}


# -------------------------------------------------------------------------------- counts of a layer
@pytest.mark.parametrize(
    ("kept", "densities"),
    [
        (537, {"conv1": 0.2568296602, "conv2": 0.0520080062, "fc": 0.5824896694}),
        (1073, {"conv1": 0.5515998594, "conv2": 0.1116989715, "fc": 1.0}),
        (2680, {"conv1": 1.0, "conv2": 0.4184027778, "fc": 1.0}),
    ],
)
def test_erk_is_the_hand_computed_split(kept, densities):
    sparsity = 1 - kept / 5360
    assert layer_densities(ORACLE_8, sparsity, "erk") == pytest.approx(densities, abs=1e-9)
    counts = layer_counts(ORACLE_8, sparsity, "erk")
    assert sum(counts.values()) == kept
    for path, size in sizes(ORACLE_8).items():
        assert abs(counts[path] - densities[path] * size) < 1


def test_totals_are_exact_where_rounding_by_layer_is_not():
    # Zeros rounded down in each layer make these 537 and 1073.
    for sparsity, kept in ((0.9, 536), (0.8, 1072), (0.5, 2680)):
        for distribution in DISTRIBUTIONS:
            assert sum(layer_counts(ORACLE_8, sparsity, distribution).values()) == kept


def test_er_looks_at_channels_only():
    square = {"a": (100, 100), "b": (10, 10)}
    for distribution in ("er", "erk"):
        found = layer_densities(square, 0.9, distribution)
        assert found == pytest.approx({"a": 0.0918181818, "b": 0.9181818182}, abs=1e-9)
    # (n_in + n_out) / (n_in n_out) is equal for these two, whatever the window.
    found = layer_densities({"conv": (5, 5, 8, 8), "dense": (8, 8)}, 0.9, "er")
    assert found == pytest.approx({"conv": 0.1, "dense": 0.1})


@settings(deadline=None, max_examples=150)
@given(
    shapes=st.lists(kernels, min_size=1, max_size=6),
    sparsity=st.floats(0, 1, exclude_max=True),
    distribution=st.sampled_from(DISTRIBUTIONS),
)
def test_counts_sum_to_k_within_the_layers(shapes, sparsity, distribution):
    shapes = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    size = sizes(shapes)
    counts = layer_counts(shapes, sparsity, distribution)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == active_count(sum(size.values()), sparsity)
    density = layer_densities(shapes, sparsity, distribution)
    for path in shapes:
        assert 0 <= counts[path] <= size[path]
        assert counts[path] == pytest.approx(
            density[path] * size[path], abs=1.5 + 1e-6 * size[path]
        )


def test_the_budget_is_an_exact_integer():
    assert active_count(848_944, 0.98) == 16_979  # truncation would give 16,978
    assert active_count(100, 0.9) == 10
    assert active_count(7, 0.0) == 7


def test_an_unknown_distribution_is_named():
    with pytest.raises(
        ConfigError, match=r"^distribution is 'erdos'; allowed are uniform, er, erk\.$"
    ):
        layer_counts({"a": (2, 2)}, 0.5, "erdos")


# ------------------------------------------------------------------------------------ G(n, M) masks
@settings(deadline=None, max_examples=60)
@given(shape=kernels, share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_a_mask_has_exactly_m_connections(shape, share, seed):
    size = math.prod(shape)
    for count in {0, round(share * size), size}:  # empty and full ones terminate
        mask = random_mask(jax.random.key(seed), shape, count)
        assert (mask.shape, mask.dtype, mask.sum()) == (shape, bool, count)


def test_masks_depend_on_the_key_alone():
    draw = lambda seed: random_mask(jax.random.key(seed), (40, 50), 100)  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    assert len({draw(seed).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize("count", [3, 9])  # below and above one half
def test_every_position_and_every_pair_is_equally_likely(count):
    draws = 2000
    flat = np.stack([random_mask(jax.random.key(s), (3, 4), count).ravel() for s in range(draws)])
    expected = draws * count / 12
    # Counts of positions drawn without replacement vary less than a multinomial's, by 1 - M/n.
    chi2 = ((flat.sum(0) - expected) ** 2 / (expected * (1 - count / 12))).sum() * 11 / 12
    assert 1e-4 < stats.chi2.sf(chi2, 11) < 1 - 1e-4
    chosen = flat if count < 6 else ~flat
    together = (chosen.T.astype(int) @ chosen)[np.triu_indices(12, 1)]
    pair = 3 * 2 / (12 * 11)
    assert np.abs(together - draws * pair).max() < 4.5 * np.sqrt(draws * pair)


def test_a_mask_needs_no_more_than_itself_and_its_indices():
    count = 4096 * 4096 // 100
    key = jax.random.key(0)
    random_mask(key, (8, 8), 5)  # whatever is imported or compiled on the first call
    tracemalloc.start()
    random_mask(key, (4096, 4096), count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * 4096 * 4096 + 4 * 8 * count


@pytest.mark.parametrize("count", [-1, 7])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ConfigError, match=rf"^count is {count}; allowed is 0 to 6 .*\.$"):
        random_mask(jax.random.key(0), (2, 3), count)


# ---------------------------------------------------------------------------- fan-in scaled weights
def test_weights_scale_with_the_fan_in_of_their_own_unit():
    mask = np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    key = jax.random.key(0)
    sparse = np.asarray(fan_in_weights(key, mask))
    dense = np.asarray(fan_in_weights(key, np.ones_like(mask)))  # std 1 for gain 2, fan-in 2
    std = np.array([1.0, math.sqrt(2), math.sqrt(2), 0.0])
    np.testing.assert_allclose(sparse, np.where(mask, dense * std, 0), rtol=1e-6)
    assert not sparse[~mask].any()
    unit_gain = np.asarray(fan_in_weights(key, mask, gain=1.0))
    np.testing.assert_allclose(unit_gain, sparse / math.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("shape", [(40_000, 3), (5, 8, 1000, 3)])
def test_variance_is_two_over_the_fan_in_in_every_unit(shape):
    fan_in = (40_000, 10_000, 400)  # in a convolution over the window and its channels
    mask = np.zeros((40_000, 3), bool)
    for unit, count in enumerate(fan_in):
        mask[:, unit] = random_mask(jax.random.key(unit), (40_000,), count)
    weights = np.asarray(fan_in_weights(jax.random.key(9), mask.reshape(shape)), np.float64)
    for unit, count in enumerate(fan_in):
        w = weights.reshape(-1, 3)[mask[:, unit], unit]
        assert stats.kstest(w / math.sqrt(2 / count), "norm").pvalue > 1e-4


def test_dead_units_are_counted():
    mask = np.zeros((2, 2, 3, 5), bool)
    mask[0, 1, 2, 3] = mask[1, 1, 0, 0] = True
    assert int(dead_units(jax.numpy.asarray(mask))) == 3
