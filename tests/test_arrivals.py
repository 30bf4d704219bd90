"""S of a layer that no chunk holds: the law of successive draws, and no pair twice."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dst.connections.arena import Part
from dst.connections.backends import cpp as kernels
from dst.layers import Dense
from dst.methods import arrivals, sample
from dst.methods.sample import Sampling
from dst.methods.units import cumulative_shares

SHAPE, CHUNK = (24, 40), 64  # 960 pairs, dozens of buckets and heavy outputs of their own
TRIALS, GROUPS = 1000, 5  # groups of 8 outputs


class Setting(NamedTuple):
    """Marginals of a long tail, what exists, and an oracle's subsets: Gumbel-top-k in float64."""

    f: np.ndarray
    g: np.ndarray
    mask: np.ndarray
    size: int

    def oracle(self, trials: int) -> np.ndarray:
        """Shape (trials, size): flat positions of the largest log f + log g + Gumbel noise."""
        rng = np.random.default_rng(self.size)
        score = np.log(np.outer(self.f, self.g)).ravel() + rng.gumbel(size=(trials, self.mask.size))
        score[:, self.mask.ravel()] = -np.inf
        return np.argpartition(-score, self.size, axis=1)[:, : self.size]


def setting(size: int) -> Setting:
    rng = np.random.default_rng(7)
    f, g = (rng.lognormal(sigma=1.5, size=n).astype(np.float32) for n in SHAPE)
    return Setting(f, g, rng.random(SHAPE) < 0.1, size)


def part_of(block: int) -> Part:
    return Part(Dense("layer", SHAPE), block, 0)


@functools.partial(jax.jit, static_argnames=("size", "rounds", "chunk", "block", "exhaustible"))
def subset(key, f, g, mask, asked, size, rounds=40, chunk=CHUNK, block=SHAPE[0], exhaustible=False):
    """S as a mask, |S| as it is told, and how often each pair was handed on."""
    how = Sampling(chunk, rounds, (size,), (exhaustible,))
    flat = mask.ravel()

    def exists(column, output):
        return flat[column * SHAPE[1] + output]

    def visit(times, pairs, chosen):
        return times.at[pairs.column, pairs.output].add(chosen.astype(jnp.int32))

    active, start = flat.sum(dtype=jnp.int32), jnp.zeros(SHAPE, jnp.int32)
    return sample.fold_subset(
        how, 0, part_of(block), key, (f, g), asked, active, exists, visit, start
    )


# A thousand subsets take longer to draw than the program to optimise.
@functools.partial(
    jax.jit,
    static_argnames=("most", "chunk"),
    compiler_options={"xla_backend_optimization_level": 3},
)
def many(keys, f, g, mask, asked, most, chunk):
    return jax.lax.map(lambda key: subset(key, f, g, mask, asked, most, chunk=chunk)[0], keys)


def drawn(case: Setting, trials: int, at_once: bool) -> np.ndarray:
    """bool (trials, pairs)"""
    args = (*map(jnp.asarray, case[:3]), jnp.int32(case.size))
    most, chunk = (200, 2**12) if at_once else (300, CHUNK)
    keys = jax.random.split(jax.random.key(case.size), trials)
    times = np.asarray(many(keys, *args, most, chunk)).reshape(trials, -1)
    assert times.max() == 1 and (times.sum(1) == case.size).all()
    return times.astype(bool)


def variance_of_groups(S: np.ndarray) -> np.ndarray:
    """Of how many of a subset have their output in each group: (GROUPS,)."""
    per_output = S.reshape(len(S), *SHAPE).sum(1, dtype=np.int64)
    return per_output.reshape(len(S), GROUPS, -1).sum(2).var(0, ddof=1)


@pytest.mark.parametrize("at_once", [False, True], ids=["in buckets", "at once"])
@pytest.mark.parametrize("size", [20, 200])
def test_the_law_is_that_of_successive_draws_without_replacement(size, at_once):
    """|P| and 10 |P| of 960 pairs: each pair's frequency, and the spread over groups of outputs.

    A sampler that gives each output its share would have the frequencies, not the spread.
    """
    case, known = setting(size), 10_000
    S = drawn(case, TRIALS, at_once)
    oracle = np.zeros((known, case.mask.size), bool)
    np.put_along_axis(oracle, case.oracle(known), True, axis=1)
    p = (oracle.sum(0) + S.sum(0)) / (known + TRIALS)
    assert not S[:, case.mask.ravel()].any()
    seen = np.minimum(p, 1 - p) * TRIALS > 5
    error = np.sqrt(p * (1 - p) * (1 / TRIALS + 1 / known))[seen]
    z = (S.mean(0) - oracle.mean(0))[seen] / error  # of unit variance
    assert abs(z).max() < 5 and abs((z**2).mean() - 1) < 5 * np.sqrt(2 / seen.sum())
    ratio = variance_of_groups(S) / variance_of_groups(oracle)
    assert abs(ratio - 1).max() < 5 * np.sqrt(2 / TRIALS)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31 - 1),
    asked=st.integers(0, 200),
    block=st.sampled_from([24, 7]),
    dead=st.sampled_from([0.0, 0.5]),
)
def test_s_is_distinct_inactive_and_of_the_asked_size_where_it_can_be(seed, asked, block, dead):
    rng = np.random.default_rng(seed)
    f, g = (rng.lognormal(sigma=1, size=n).astype(np.float32) for n in SHAPE)
    f[rng.random(f.size) < dead], g[rng.random(g.size) < dead] = 0, 0
    mask = rng.random(SHAPE) < 0.2
    times, count = subset(jax.random.key(seed), f, g, mask, np.int32(asked), 300, 40, 64, block)
    possible = (np.outer(f, g) > 0) & ~mask
    assert times.max() <= 1 and not np.asarray(times)[~possible].any()
    assert int(count) == times.sum() <= asked
    if not dead:  # of 768 pairs
        assert count == asked


def test_the_order_of_an_arena_changes_nothing():
    """A part of other blocks hands on the same S, sorted its own way."""
    case = setting(200)
    args = (jax.random.key(1), *map(jnp.asarray, case[:3]), jnp.int32(200), 200)
    S = [np.asarray(subset(*args, block=block, chunk=64)[0]) for block in (24, 7)]
    assert S[0].sum() == 200 and (S[0] == S[1]).all()


def test_all_that_is_inactive_is_enumerated():
    case = setting(900)
    args = (jax.random.key(1), *map(jnp.asarray, case[:3]))
    times, count = subset(*args, jnp.int32(900), 900, 1, 64, 7, True)
    assert count == (~case.mask).sum()
    np.testing.assert_array_equal(times, ~case.mask)
    times, count = subset(*args, jnp.int32(100), 900, 8, 64, 7, True)
    assert count == times.sum() == 100


def test_one_round_is_as_many_arrivals_as_are_asked_for():
    """Repeats and active pairs are not drawn again, as in a small layer of one round."""
    case = setting(300)
    args = (*map(jnp.asarray, case[:3]), jnp.int32(300), 300, 1)
    of = lambda chunk: [  # noqa: E731
        int(subset(jax.random.key(n), *args, chunk)[1]) for n in range(40)
    ]
    few, once = of(64), of(2**12)
    assert 100 < np.mean(once) < 280
    assert abs(np.mean(few) - np.mean(once)) < 5 * np.hypot(np.std(few), np.std(once)) / np.sqrt(40)


def test_pairs_of_a_very_large_layer_are_numbered_in_32_bits():
    """2^20 x 2^20: every bucket's pairs are told apart, up to the last column and output."""
    n = 2**20
    f = cumulative_shares(jnp.zeros(n).at[jnp.array([0, 5, 600, n - 1])].set(1.0))
    g = cumulative_shares(jnp.zeros(n).at[jnp.array([0, 9, n - 1])].set(1.0))
    none = lambda column, output: jnp.zeros(column.shape, bool)  # noqa: E731
    layer = arrivals.large(
        jax.random.key(0), 0, arrivals.Sizes(n, n, 512), 512, f, g, none
    )._replace(rate=jnp.float32(300))

    def see(carry, pairs):
        new = jnp.stack([pairs.column, pairs.output])
        at = jnp.where(pairs.valid, jnp.cumsum(pairs.valid) - 1 + carry[1], 64)
        return carry[0].at[:, at].set(new, mode="drop"), carry[1] + pairs.valid.sum()

    start = jnp.zeros((2, 64), jnp.int32), jnp.int32(0)
    found, count = jax.jit(lambda: arrivals.sweep(layer, see, start))()
    expected = {(a, b) for a in (0, 5, 600, n - 1) for b in (0, 9, n - 1)}
    assert count == 12 and set(zip(*np.asarray(found)[:, :12].tolist(), strict=True)) == expected


def drawn_by_chance(parts, size, mask=None, key=None):
    """How often each connection was drawn of an empty network, or of one with this mask; |S|."""
    start = np.cumsum([0, *(part.layer.size for part in parts)])
    mask = np.zeros(start[-1], bool) if mask is None else mask
    active, exists = int(mask.sum()), jnp.asarray(mask)
    first, n_out = jnp.asarray(start[:-1]), jnp.array([part.n_out for part in parts])
    at = lambda l, column, output: first[l] + column * n_out[l] + output  # noqa: E731

    def visit(times, pairs, chosen):
        return times.at[at(pairs.l, pairs.column, pairs.output)].add(chosen.astype(jnp.int32))

    return sample.fold_by_chance(
        64,
        size,
        mask.size - active,
        parts,
        jax.random.key(0) if key is None else key,
        jnp.int32(size),
        jnp.int32(active),
        lambda *pair: exists[at(*pair)],
        visit,
        jnp.zeros(mask.size, jnp.int32),
    )


@pytest.mark.parametrize("dense", [True, False], ids=["all pairs", "arrivals"])
def test_by_chance_every_connection_of_the_network_is_as_likely(dense):
    """Two shapes, three layers: frequencies, and the spread of how many each layer gets."""
    shapes, size = ((12, 20), (30, 25), (30, 25)), 150 if dense else 40
    parts = [Part(Dense(f"layer{l}", s), s[0], 0) for l, s in enumerate(shapes)]
    start = np.cumsum([0, *(part.layer.size for part in parts)])
    mask = np.random.default_rng(0).random(start[-1]) < 0.1
    one = lambda key: drawn_by_chance(parts, size, mask, key)  # noqa: E731
    keys = jax.random.split(jax.random.key(3), TRIALS)
    times, count = map(np.asarray, jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    assert times.max() == 1 and (count == size).all() and (times.sum(1) == size).all()
    free = ~mask
    assert not times[:, ~free].any()
    p = size / free.sum()
    z = (times.mean(0) - p)[free] / np.sqrt(p * (1 - p) / TRIALS)
    assert abs(z).max() < 5 and abs((z**2).mean() - 1) < 5 * np.sqrt(2 / free.sum())
    in_first = times[:, : start[1]].sum(1)
    share, N = free[: start[1]].sum() / free.sum(), free.sum()
    exact = size * share * (1 - share) * (N - size) / (N - 1)  # of the hypergeometric law
    assert abs(in_first.var() / exact - 1) < 5 * np.sqrt(2 / TRIALS)


def test_layers_of_one_input_or_one_output_are_sampled_too():
    """Their buckets could hold 2^31 outputs, which is one more than an int32 can say."""
    parts = [Part(Dense(f"layer{l}", s), s[0], 0) for l, s in enumerate(((1, 3000), (60, 1)))]
    times, count = drawn_by_chance(parts, 20)
    assert count == times.sum() == 20 and times.max() == 1


@pytest.mark.parametrize("seed", range(5))
def test_enumerated_pairs_are_chosen_alike_whatever_their_order(seed):
    """An arena has its columns in blocks, masks have not; chunks of 64 end elsewhere."""
    chosen = []
    for block in (60, 7):
        parts = [Part(Dense(f"layer{l}", (60, n)), block, 0) for l, n in enumerate((9, 4))]
        times, count = drawn_by_chance(parts, 300, key=jax.random.key(seed))
        assert count == times.sum() == 300 and times.max() == 1
        chosen.append(times)
    np.testing.assert_array_equal(*chosen)


def test_all_that_is_inactive_is_found_where_little_is():
    """Of 2,000 pairs 1,850 exist: arrivals would leave some of the others out."""
    mask = np.random.default_rng(0).permutation(2000) < 1850
    times, count = drawn_by_chance([Part(Dense("layer", (50, 40)), 50, 0)], 150, mask)
    assert count == 150
    np.testing.assert_array_equal(times, ~mask)


@pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), block=st.sampled_from([24, 7, 1]))
def test_both_tiers_find_the_same_pairs(seed, block):
    """To the bit: pairs in order, first arrivals, also of pairs that come hundreds of times."""
    rng = np.random.default_rng(seed)
    f, g = (
        cumulative_shares(jnp.asarray(rng.lognormal(sigma=2, size=n), jnp.float32)) for n in SHAPE
    )
    b, a = rng.integers(SHAPE[1]), rng.integers(SHAPE[0])
    b_end, a_end = rng.integers(b, SHAPE[1]) + 1, rng.integers(a, SHAPE[0]) + 1
    given = (
        rng.integers(2**32, size=(2, 500), dtype=np.uint32),
        np.int32(rng.integers(501)),
        np.array([b, b_end, a, a_end], np.int32),
        f,
        g,
        rng.integers(2**32, size=SHAPE[1], dtype=np.uint32),
        np.uint32(block),
    )
    pure = jax.jit(arrivals.pairs_of)(*given)
    for one, other in zip(kernels.arrivals(*given), pure, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
@pytest.mark.parametrize(("rows", "count"), [(2000, 40_000), (4000, 39_123)])
def test_many_threads_find_the_same_pairs(rows, count):
    """Two digits to sort, and three."""
    rng = np.random.default_rng(rows)
    f, g = (
        cumulative_shares(jnp.asarray(rng.lognormal(sigma=2, size=n), jnp.float32))
        for n in (9000, 4000)
    )
    salt = rng.integers(2**32, size=4000, dtype=np.uint32)
    random = rng.integers(2**32, size=(2, 40_000), dtype=np.uint32)
    bounds = np.array([4000 - rows, 4000, 0, 9000], np.int32)
    given = random, np.int32(count), bounds, f, g, salt, np.uint32(9000)
    pure = jax.jit(arrivals.pairs_of)(*given)
    for one, other in zip(kernels.arrivals(*given), pure, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_of_several_arrivals_is_the_least_of_as_many_uniform_times():
    """One pair, n arrivals: the mean of the least is 1 / (n + 1)."""
    one = cumulative_shares(jnp.ones(1))
    bounds, random = jnp.array([0, 1, 0, 1]), jnp.zeros((2, 40), jnp.uint32)
    times = jax.jit(
        jax.vmap(
            lambda salt, n: arrivals.pairs_of(random, n, bounds, one, one, salt, 1)[2][0],
            in_axes=(0, None),
        )
    )
    for n in (1, 2, 5, 40):
        salt = jax.random.bits(jax.random.key(n), (4000, 1), jnp.uint32)
        u = np.asarray(times(salt, jnp.int32(n))) / 2.0**32
        assert abs(u.mean() - 1 / (n + 1)) < 5 * u.std() / np.sqrt(4000)
        assert stats.kstest(u, lambda x, n=n: 1 - (1 - x) ** n).pvalue > 1e-4
