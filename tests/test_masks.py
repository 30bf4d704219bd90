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

from dst.connections import initial
from dst.connections.initial import fan_in_weights, random_positions
from dst.connections.masks import Masks
from dst.errors import ConfigError
from dst.layers import Conv
from dst.methods.distributions import DISTRIBUTIONS, active_count, layer_counts, layer_densities
from dst.training.loop import collapsed_layers
from tests.tiny import kernels as kernels_of
from tests.tiny import setup

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
    distribution=st.sampled_from([*DISTRIBUTIONS]),
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
    sentence = "^distribution must be 'uniform', 'er', 'er_unfolded' or 'erk', not 'erdos'"
    with pytest.raises(ConfigError, match=sentence):
        layer_counts({"a": (2, 2)}, 0.5, "erdos")


# -------------------------------------------------------------------------------- G(n, M) positions
@settings(deadline=None, max_examples=80)
@given(
    size=st.one_of(st.integers(0, 60), st.integers(2**32 + 1, 2**62)),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_positions_are_distinct_and_sorted_whatever_the_size(size, share, seed):
    for count in {0, round(share * min(size, 60)), min(size, 60)}:
        found = random_positions(jax.random.key(seed), size, count)
        assert (found.shape, found.dtype) == ((count,), np.int64)
        assert (np.diff(found) > 0).all()
        assert count == 0 or (found[0] >= 0 and found[-1] < size)


def test_positions_of_a_matrix_of_2_to_the_40_are_uniform():
    size, count = 2**40, 20_000
    found = random_positions(jax.random.key(1), size, count)
    assert stats.kstest(found / size, "uniform").pvalue > 1e-4
    assert stats.kstest(found % 2**20 / 2**20, "uniform").pvalue > 1e-4  # the low bits: outputs
    other = random_positions(jax.random.key(2), size, count)
    assert len(np.intersect1d(found, other)) < 5


def peak_memory(run):
    """The most bytes that `run` held at once."""
    run()  # whatever is imported or compiled on the first call
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("size", [2**40, 2**20 + 2**19])  # sparse; the complement is drawn
def test_positions_take_a_few_copies_of_themselves(size):
    count, key = 2**20, jax.random.key(0)
    assert peak_memory(lambda: random_positions(key, size, count)) < 3 * 8 * count


@pytest.mark.parametrize(("count", "most"), [(4096, 0), (4000, 100), (2048, 3000)])
def test_few_are_drawn_of_a_dense_layer(monkeypatch, count, most):
    """Without the complement the last of n positions would take about n draws."""
    drawn, make = [], initial._generator

    class Counting:
        def __init__(self, key):
            self.rng = make(key)

        def integers(self, high, size):
            drawn.append(size)
            return self.rng.integers(high, size=size)

    monkeypatch.setattr(initial, "_generator", Counting)
    assert len(random_positions(jax.random.key(0), 4096, count)) == count
    assert sum(drawn) <= most


# ------------------------------------------------------------------------------------ G(n, M) masks
def random_mask(key, shape, count):
    """What `init_state` makes of the positions in masked execution."""
    mask = np.zeros(math.prod(shape), bool)
    mask[random_positions(key, mask.size, count)] = True
    return mask.reshape(shape)


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
    peak = peak_memory(lambda: random_mask(key, (4096, 4096), count))
    assert peak < 1.2 * 4096 * 4096 + 4 * 8 * count


@pytest.mark.parametrize("count", [-1, 7])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ConfigError, match=rf"^count is {count}; allowed is 0 to 6, .*\.$"):
        random_mask(jax.random.key(0), (2, 3), count)


# ---------------------------------------------------------------------------- fan-in scaled weights
def test_weights_scale_with_the_fan_in_of_their_own_unit():
    key, output = jax.random.key(0), np.array([0, 2, 0, 1])
    weights = fan_in_weights(key, output, 4, gain=2.0)
    assert (weights.shape, weights.dtype) == ((4,), np.float32)
    normal = fan_in_weights(key, np.arange(4), 4, gain=1.0)  # fan-in 1 and gain 1: std 1
    std = np.array([1.0, math.sqrt(2), 1.0, math.sqrt(2)])
    np.testing.assert_allclose(weights, normal * std, rtol=1e-6)
    np.testing.assert_allclose(fan_in_weights(key, output, 4, gain=0.5), weights / 2, rtol=1e-6)
    assert fan_in_weights(key, np.zeros(0, np.int64), 4).shape == (0,)


def test_variance_is_one_over_the_fan_in_in_every_unit():
    fan_in = (40_000, 10_000, 400)
    output = np.random.default_rng(0).permutation(np.repeat(np.arange(3), fan_in))
    weights = fan_in_weights(jax.random.key(9), output, 3).astype(np.float64)
    for unit, count in enumerate(fan_in):
        w = weights[output == unit]
        assert stats.kstest(w * math.sqrt(count), "norm").pvalue > 1e-4


def test_weights_are_drawn_for_the_connections_alone():
    n_out, count = 2**12, 2**16  # of 2^24 possible ones
    output = random_positions(jax.random.key(0), n_out**2, count) % n_out
    peak = peak_memory(lambda: fan_in_weights(jax.random.key(1), output, n_out))
    assert peak < 3 * 4 * count + 4 * 8 * n_out


@pytest.mark.parametrize("name", ["gse", "dense"])
def test_a_new_network_is_its_positions_and_weights(name):
    """What any other execution must start from, given the same key: these bits."""
    parts = setup(name, sparsity=0.7, seed=5)
    mask_key, weight_key, *_ = jax.random.split(jax.random.key(5), 4)
    shapes = {path: layer.shape for path, layer in parts.net.layers.items()}
    counts = layer_counts(shapes, parts.method.sparsity)
    found = kernels_of(parts.state.params, parts.state)
    for l, (path, shape) in enumerate(shapes.items()):
        key = jax.random.fold_in(mask_key, l)
        position = random_positions(key, math.prod(shape), counts[path])
        key = jax.random.fold_in(weight_key, l)
        weights = fan_in_weights(key, position % shape[-1], shape[-1])
        np.testing.assert_array_equal(np.flatnonzero(parts.state.masks[path]), position)
        np.testing.assert_array_equal(found[path].ravel()[position], weights)
        assert np.count_nonzero(found[path]) == counts[path]


# ------------------------------------------------------------------------------------- what is left
def test_a_layer_below_a_tenth_of_its_first_count_is_told_once():
    tell = collapsed_layers({"a": 30, "b": 5, "c": 0, "d": 1000})
    assert tell({"a": 3, "b": 1, "c": 0, "d": 100}) == []  # a tenth is enough, c never had any
    assert tell({"a": 2, "b": 1, "c": 0, "d": 99}) == [("a", 2, 30), ("d", 99, 1000)]
    assert tell({"a": 30, "b": 0, "c": 0, "d": 98}) == [("b", 0, 5)]
    assert tell({"a": 0, "b": 0, "c": 0, "d": 0}) == []


def test_dead_units_are_counted():
    mask = np.zeros((2, 2, 3, 5), bool)
    mask[0, 1, 2, 3] = mask[1, 1, 0, 0] = True
    layer = Conv("a", mask.shape)
    assert int(Masks([layer], {"a": jax.numpy.asarray(mask)}).dead_units()["a"]) == 3


@pytest.mark.parametrize("mask", [np.ones((72, 20)), np.ones(20, bool)], ids=["floats", "shape"])
def test_a_mask_that_is_none_is_refused(mask):
    masks = setup("set").state.masks
    with pytest.raises(ConfigError, match=r"mask of layer 'Dense_0' must be bool of shape \("):
        masks.but({"Dense_0": mask})
