"""The weakest, the best and their exchange against sorts in NumPy, many ties, in both tiers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.connections import select
from dst.connections.backends import cpp as kernels
from dst.connections.base import NOWHERE, Candidates, bits, no_candidates
from dst.methods.drop import looked_at, unprotected
from tests.arenas import hashed, listed, ordered, parts_of, random_case, slices

examples = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)

# Of these layers 6 rows of 3 to 6 connections, an empty row, a row of one: 50 possible connections.
PARTS = parts_of(((9, 3), (1, 2), (2, 1, 3, 3)))
CONNECTIONS = 20


both_tiers = pytest.mark.parametrize(
    "tier",
    [
        pytest.param(
            "compiled", marks=pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
        ),
        "pure",
    ],
)


@functools.cache
def program(tier, name, ties=False):
    """A function of `select`, compiled once in each tier; the last of its arguments are ties."""

    def run(*args):
        given, last = (args[:-1], [lambda: args[-1]]) if ties else (args, [])
        with pytest.MonkeyPatch.context() as patch:
            if tier == "pure":
                patch.setattr(kernels, "available", lambda: False)
            return getattr(select, name)(*given, *last)

    return jax.jit(run)


# -------------------------------------------------------------------------------------- the weakest
def first_lowest(order, eligible, k):
    """By a stable sort of the eligible entries."""
    at = np.flatnonzero(eligible)
    chosen = np.zeros(order.size, bool)
    chosen[at[np.argsort(order[at], kind="stable")[:k]]] = True
    return chosen


@both_tiers
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@examples
@given(
    seed=seeds,
    k=st.integers(0, 50),
    different=st.sampled_from([1, 3, 1000]),
    part=st.sampled_from([0, 0.5, 1]),
)
def test_the_k_lowest_are_the_first_of_a_stable_sort(tier, dtype, seed, k, different, part):
    rng = np.random.default_rng(seed)
    some = rng.integers(0, np.iinfo(dtype).max, different, dtype, endpoint=True)
    some[rng.random(different) < 0.3] = rng.choice(np.array([0, 1, np.iinfo(dtype).max], dtype))
    order, eligible = rng.choice(some, 40), rng.random(40) < part
    with jax.enable_x64(dtype == np.uint64):
        low, high = (program(tier, n)(order, eligible, np.int32(k)) for n in ("lowest", "highest"))
    np.testing.assert_array_equal(low, first_lowest(order, eligible, k))
    np.testing.assert_array_equal(high, first_lowest(~order, eligible, k))


@both_tiers
@examples
@given(seed=seeds, k=st.integers(0, 50), different=st.sampled_from([1, 3]))
def test_of_equals_those_that_are_lowest_in_ties(tier, seed, k, different):
    rng = np.random.default_rng(seed)
    order, eligible = rng.integers(different, size=40, dtype=np.uint32), rng.random(40) < 0.7
    ties = rng.integers(5, size=40, dtype=np.uint32)
    for name, sign in (("lowest", 1), ("highest", -1)):
        chosen = np.zeros(40, bool)
        at = np.flatnonzero(eligible)
        chosen[at[np.lexsort((at, ties[at], sign * order[at].astype(int)))[:k]]] = True
        found = program(tier, name, ties=True)(order, eligible, np.int32(k), ties)
        np.testing.assert_array_equal(found, chosen)


def test_many_threads_find_the_same():
    rng = np.random.default_rng(0)
    order = rng.integers(0, 2**32, 300_000, np.uint32) >> rng.integers(0, 30, 300_000, np.uint32)
    eligible = rng.random(300_000) < 0.6
    for k in (1, 70_000, 180_000):
        found = program("compiled", "lowest")(order, eligible, np.int32(k))
        np.testing.assert_array_equal(found, first_lowest(order, eligible, k))


@examples
@given(seed=seeds)
def test_the_numbers_of_ties_are_the_same_in_both_tiers(seed):
    rng = np.random.default_rng(seed)
    arena = random_case(rng, CONNECTIONS, PARTS).arena
    salt = rng.integers(0, 2**32, arena.pointer.size - 1, np.uint32)
    order, eligible = (
        rng.integers(3, size=CONNECTIONS, dtype=np.uint32),
        rng.random(CONNECTIONS) < 0.8,
    )
    for k in (2, 7, 12):
        given = arena, salt, order, eligible, np.int32(k)
        found = [breaking_ties(tier)(*given) for tier in ("compiled", "pure")]
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)


@functools.cache
def breaking_ties(tier):
    """`select.lowest` and all hashes of an arena, compiled once in each tier."""

    def run(arena, salt, order, eligible, k):
        ties = select.Ties(arena, salt)
        with pytest.MonkeyPatch.context() as patch:
            if tier == "pure":
                patch.setattr(kernels, "available", lambda: False)
            return select.lowest(order, eligible, k, ties), ties()

    return jax.jit(run)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_are_in_the_order_of_floats(dtype):
    info = np.finfo(dtype)
    rising = [0, info.smallest_subnormal, info.tiny, 0.5, 1, 1 + info.eps, info.max, np.inf, np.nan]
    with jax.enable_x64(dtype == np.float64):
        found = np.asarray(bits(jnp.asarray(rising, dtype)))
    assert found.dtype.itemsize == np.dtype(dtype).itemsize
    assert found.dtype.kind == "u"
    assert (found[1:] > found[:-1]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, empty=st.sampled_from([(), (0,), (2,)]))
def test_the_strongest_of_each_layer_are_protected(dtype, seed, empty):
    rng = np.random.default_rng(seed)
    arena, _, masks, _ = random_case(rng, CONNECTIONS, PARTS, empty=empty)
    magnitude = rng.integers(0, 4, CONNECTIONS).astype(dtype)
    own = slices(PARTS, masks)
    keep = [5, 0, 30]
    with jax.enable_x64(dtype == np.float64):
        safe = protect(arena, jnp.asarray(magnitude))
    expected = np.zeros(CONNECTIONS, bool)
    for here, count in zip(own, keep, strict=True):
        inside = np.zeros(CONNECTIONS, bool)
        inside[here] = True
        expected |= first_lowest(-magnitude, inside, count)
    np.testing.assert_array_equal(safe, expected)


@jax.jit
def protect(arena, magnitude):
    """The strongest, where ties go to the first: all hashes are alike."""
    salt = jnp.zeros(arena.pointer.size - 1, jnp.uint32)
    arena = arena.replace(column=jnp.zeros_like(arena.column))
    return ~unprotected(np.array([5, 0, 30]), looked_at(arena, magnitude, salt, {}))


# --------------------------------------------------------------------------------- where it stands
locate = jax.jit(
    lambda arena, row, column: [
        select.locate(arena, row[l], column[l]) for l, _ in enumerate(arena.parts)
    ]
)


@examples
@given(seed=seeds)
def test_every_possible_connection_is_located(seed):
    rng = np.random.default_rng(seed)
    case = random_case(rng, CONNECTIONS, PARTS)
    held = listed(case.arena)
    asked = [ordered((part,), [np.ones((part.n_in, part.n_out), bool)]) for part in PARTS]
    asked = [[asked_of[i] for i in rng.permutation(len(asked_of))] for asked_of in asked]
    row, column = ([np.array([a[n] for a in of], np.int32) for of in asked] for n in (0, 1))
    for of, (at, exists) in zip(asked, locate(case.arena, row, column), strict=True):
        assert at.dtype == jnp.int32
        np.testing.assert_array_equal(exists, [place in set(held) for place in of])
        np.testing.assert_array_equal(at, [sum(other < place for other in held) for place in of])


# ----------------------------------------------------------------------------------------- the best
SALT = np.random.default_rng(1).integers(2**32, size=2000, dtype=np.uint32)


def brute_best(found, new, k):
    """The k best of all distinct candidates, of equal scores the lower hashes; sorted, padded."""
    scores = {}
    for row, column, score in (*zip(*found, strict=True), *zip(*new, strict=True)):
        if score >= 0:
            scores.setdefault((int(row), int(column)), float(score))
    order = sorted(scores, key=lambda at: (-scores[at], hashed(SALT[at[0]], at[1])))
    chosen = sorted(order[:k])
    entries = [(*at, scores[at]) for at in chosen]
    return entries + [(NOWHERE, 0, -1.0)] * (len(found[0]) - len(entries))


def candidates(rng, n, places, dtype=np.float32):
    """n entries sorted by (row, column), distinct where not empty; few scores, so many ties."""
    row, column = np.divmod(np.sort(rng.integers(0, places, n)), 5)
    score = rng.choice(np.array([-1, 0, 1, 2, 2.5, np.inf, np.nan], dtype), n)
    score[1:][(row[1:] == row[:-1]) & (column[1:] == column[:-1])] = -1
    return Candidates(row.astype(np.int32), column.astype(np.int32), score)


def entries(found):
    return list(zip(*(np.asarray(a).tolist() for a in found), strict=True))


@both_tiers
@pytest.mark.parametrize("sizes", [(15, 25), (25, 4), (1, 1)])
@examples
@given(seed=seeds, part=st.sampled_from([0, 0.3, 1]), places=st.sampled_from([3, 40, 9_000]))
def test_the_best_are_those_of_a_sort(tier, sizes, seed, part, places):
    rng = np.random.default_rng(seed)
    found, new = (candidates(rng, n, places) for n in sizes)
    k = np.int32(round(part * sizes[0]))
    assert entries(program(tier, "best")(found, new, k, SALT)) == brute_best(found, new, k)


@both_tiers
def test_of_one_connection_found_twice_the_first_score_counts(tier):
    # More of them than any sort leaves in place by chance.
    places = np.arange(300, dtype=np.int32)
    found = Candidates(places, places % 7, np.full(300, 2, np.float32))
    new = found._replace(score=np.where(places % 2, 3, 1).astype(np.float32))
    assert entries(program(tier, "best")(found, new, np.int32(300), SALT)) == entries(found)


@examples
@given(seed=seeds, part=st.sampled_from([0, 0.5, 1]))
def test_the_best_of_float64_differ_where_float32_does_not(seed, part):
    rng = np.random.default_rng(seed)
    found, new = (candidates(rng, n, 60, np.float64) for n in (15, 25))
    found, new = (
        a._replace(score=a.score + 1e-12 * rng.random(a.score.size)) for a in (found, new)
    )
    k = np.int32(round(part * 15))
    with jax.enable_x64(True):
        chosen = program("pure, float64", "best")(found, new, k, SALT)
    assert chosen.score.dtype == np.float64
    assert entries(chosen) == brute_best(found, new, k)


def test_nothing_is_empty():
    assert entries(no_candidates(2)) == [(NOWHERE, 0, -1.0)] * 2
    found = no_candidates(3)
    assert entries(program("pure", "best")(found, found, np.int32(3), SALT)) == entries(found)


# ----------------------------------------------------------------------------------- the exchange
@both_tiers
@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    part=st.sampled_from([0, 0.1, 0.5, 1]),
    empty=st.sampled_from([(), (0,), (1, 2)]),
    weak=st.sampled_from([None, 0]),
)
def test_an_exchange_gives_the_arena_of_the_new_masks(tier, seed, part, empty, weak):
    rng = np.random.default_rng(seed)
    case = random_case(rng, CONNECTIONS, PARTS, empty=empty)
    held = listed(case.arena)
    full = [np.ones((part.n_in, part.n_out), bool) for part in PARTS]
    free = [place for place in ordered(PARTS, full) if place not in set(held)]
    k, room = round(part * CONNECTIONS), CONNECTIONS + 3
    grown = [free[i] for i in np.sort(rng.permutation(len(free))[:room])]
    row, column = (np.array([place[n] for place in grown], np.int32) for n in (0, 1))
    row[k:], column[k:] = NOWHERE, 0  # what `best` leaves there
    dropped = np.zeros(CONNECTIONS, bool)
    dropped[rng.permutation(CONNECTIONS)[:k] if weak is None else slice(weak, k)] = True
    score = np.where(np.arange(room) < k, 1, -1).astype(np.float32)
    arena, source = program(tier, "exchange")(
        case.arena, dropped, Candidates(row, column, score), np.int32(k)
    )
    stay = {place: p for p, place in enumerate(held) if not dropped[p]}
    expected = sorted([*stay, *grown[:k]])
    assert listed(arena) == expected
    assert np.asarray(source).tolist() == [stay.get(place, -1) for place in expected]
    assert arena.parts == case.arena.parts
    assert {a.dtype for a in (arena.column, arena.pointer, source)} == {np.dtype(np.int32)}


def test_an_exchange_for_float64_scores_is_the_same():
    case = random_case(np.random.default_rng(0), CONNECTIONS, PARTS)
    held = set(listed(case.arena))
    free = next(
        (r, c) for r, c in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)] if (r, c) not in held
    )
    grown = Candidates(*(np.array([n], np.int32) for n in free), np.ones(1))
    with jax.enable_x64(True):
        arena, source = program("pure, float64", "exchange")(
            case.arena, np.arange(CONNECTIONS) == 7, grown, np.int32(1)
        )
    expected = sorted([*held - {listed(case.arena)[7]}, free])
    assert listed(arena) == expected
    assert np.count_nonzero(np.asarray(source) < 0) == 1
