"""The rewire's compiled merges against brute force; nothing here runs where they were not built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.connections.backends import cpp as kernels
from dst.connections.hashing import hashed as hashes
from tests.arenas import hashed

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
examples = settings(max_examples=30, deadline=None)


def brute_best(lists, k, salt):
    """The k best of a dictionary of distinct connections, by score, then by hash."""
    best = {}
    for row, column, score in lists:
        for r, c, s in zip(row, column, score, strict=True):
            if s >= 0:
                best.setdefault((r, c), s)
    chosen = sorted(best, key=lambda at: (-best[at], hashed(salt[at[0]], at[1])))[:k]
    return [(*at, best[at]) for at in sorted(chosen)]


def candidate_list(rng, n):
    """n candidates sorted by (row, column), some twice, some empty ones between."""
    key = np.sort(rng.integers(0, max(1, n), n))
    score = rng.integers(-1, 4, n).astype(np.float32)
    score[rng.random(n) < 0.1] = np.nan
    row, column = (a.astype(np.int32) for a in divmod(key, 5))
    empty = ~(score >= 0)
    row[empty], column[empty] = rng.integers(-9, 9, (2, empty.sum()))
    return row, column, score


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    P=st.integers(0, 40),
    Q=st.integers(0, 60),
    part=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_best_of_two_lists(seed, P, Q, part):
    rng = np.random.default_rng(seed)
    old, new = candidate_list(rng, P), candidate_list(rng, Q)
    k = round(part * P)
    salt = rng.integers(2**32, size=20, dtype=np.uint32)
    found = kernels.best(*old, *new, jnp.int32(k), salt)
    row, column, score = (np.asarray(a) for a in found)
    expected = brute_best([old, new], k, salt)
    expected += [(2**31 - 1, 0, -1.0)] * (P - len(expected))
    assert list(zip(row.tolist(), column.tolist(), score.tolist(), strict=True)) == expected


@pytest.mark.parametrize("values", [7, 1000, 2**22])
def test_the_best_of_lists_as_long_as_those_of_a_network(values):
    """Cut for several threads, and where most of the new ones are worse than all so far."""
    rng = np.random.default_rng(values)
    P, key = 150_000, rng.permutation(600_000)
    salt = rng.integers(2**32, size=6000, dtype=np.uint32)

    def drawn(n):
        own = np.sort(rng.choice(key, n, replace=False))
        score = rng.integers(values, size=n).astype(np.float32)
        return *(a.astype(np.int32) for a in divmod(own, 100)), score

    held = drawn(P)
    for k in (P, P - 1000):
        new = drawn(120_000)
        row, column, score = (np.concatenate(pair) for pair in zip(held, new, strict=True))
        _, first = np.unique(row * 100 + column, return_index=True)
        row, column, score = row[first], column[first], score[first]
        order = np.lexsort((np.asarray(hashes(salt[row], column)), -score))[:k]
        wanted = np.sort(order)
        found = [np.asarray(a) for a in kernels.best(*held, *new, jnp.int32(k), salt)]
        for a, b in zip(found, (row, column, score), strict=True):
            np.testing.assert_array_equal(a[:k], b[wanted])
        held = tuple(found)
    assert (held[2][k:] == -1).all()


def test_connections_are_found_in_any_order_and_number():
    rng = np.random.default_rng(0)
    there = rng.random((300, 700)) < 0.1
    pointer = np.concatenate([[0], np.cumsum(there.sum(1))]).astype(np.int32)
    column = np.nonzero(there)[1].astype(np.int32)
    row, wanted = rng.integers(-1, 301, 40_000), rng.integers(0, 700, 40_000)
    expected = ((row >= 0) & (row < 300)) & there[np.clip(row, 0, 299), wanted]
    for order in (np.arange(40_000), np.lexsort((wanted, row))):
        asked = (a[order].astype(np.int32) for a in (row, wanted))
        np.testing.assert_array_equal(kernels.exists(column, pointer, *asked), expected[order])


def test_best_refuses_a_row_without_a_salt():
    one = np.array([3], np.int32), np.array([0], np.int32), np.ones(1, np.float32)
    with pytest.raises(Exception, match="every candidate's row has a salt"):
        found = kernels.best(*one, *one, jnp.int32(1), np.zeros(3, np.uint32))
        jax.block_until_ready(found)


def structure_as_pairs(column, pointer):
    row = np.repeat(np.arange(pointer.size - 1), np.diff(pointer))
    return list(zip(row.tolist(), np.asarray(column).tolist(), strict=True))


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    density=st.sampled_from([0.0, 0.3, 0.5]),
    part=st.sampled_from([0.0, 0.4, 1.0]),
    spare=st.integers(0, 3),
)
def test_exchange_of_connections(seed, shape, density, part, spare):
    rng = np.random.default_rng(seed)
    exists = rng.random(shape) < density
    row, column = (a.astype(np.int32) for a in np.nonzero(exists))
    pointer = np.concatenate([[0], np.cumsum(exists.sum(1))]).astype(np.int32)
    free = np.argwhere(~exists)
    k = round(part * min(len(row), len(free)))
    dropped = np.zeros(len(row), bool)
    dropped[rng.permutation(len(row))[:k]] = True
    grown = np.array(sorted(rng.permutation(free)[:k].tolist())).reshape(k, 2)
    g = np.concatenate([grown, np.full((spare, 2), 2**31 - 1)]).astype(np.int32)
    new_column, new_pointer, source = (
        np.asarray(a)
        for a in kernels.exchange(dropped, column, pointer, g[:, 0], g[:, 1], jnp.int32(k))
    )
    old = structure_as_pairs(column, pointer)
    stay = {at: p for p, at in enumerate(old) if not dropped[p]}
    expected = sorted([*stay, *map(tuple, grown.tolist())])
    assert structure_as_pairs(new_column, new_pointer) == expected
    assert source.tolist() == [stay.get(at, -1) for at in expected]


def test_exchange_refuses_to_drop_more_than_it_grows():
    dropped, column, pointer = np.array([True, True]), np.zeros(2, np.int32), np.int32([0, 1, 2])
    grown = np.array([1], np.int32)
    with pytest.raises(Exception, match="as many must be dropped as are grown"):
        jax.block_until_ready(
            kernels.exchange(dropped, column, pointer, grown, grown, jnp.int32(1))
        )


@examples
@given(seed=st.integers(0, 2**32 - 1), K=st.integers(0, 60), gone=st.sampled_from([0.0, 0.3, 0.9]))
def test_move_of_what_stays(seed, K, gone):
    rng = np.random.default_rng(seed)
    stays = np.sort(rng.choice(K, K - int(gone * K), replace=False))
    source = np.full(K, -1, np.int32)
    source[np.sort(rng.choice(K, stays.size, replace=False))] = stays
    leaf = rng.normal(size=K).astype(np.float32)
    moved = np.asarray(jax.jit(kernels.move, donate_argnums=0)(jnp.asarray(leaf), source))
    np.testing.assert_array_equal(moved[source >= 0], leaf[source[source >= 0]])
