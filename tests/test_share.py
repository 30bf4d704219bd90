"""The split of growth over layers on the device, held to the exact one of the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dst.methods.schedules import largest_remainder
from dst.methods.share import share_out

share = jax.jit(share_out)
SPLITS = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.integers(0, 60),
        st.lists(st.integers(0, 7), min_size=n, max_size=n),
        st.lists(st.integers(0, 15), min_size=n, max_size=n),
    )
)


def split(total, weights, room):
    counts = share(
        jnp.int32(total), jnp.asarray(weights, jnp.float32), jnp.asarray(room, jnp.int32)
    )
    return np.asarray(counts)


@settings(deadline=None, max_examples=200)
@given(SPLITS)
@example((10, [0, 0], [3, 9]))
@example((16, [0, 5, 0, 5, 0], [5, 3, 11, 7, 11]))
def test_it_is_the_largest_remainder(case):
    """Caps, layers without weight and too large totals included."""
    counts, exact = split(*case), largest_remainder(*case)
    assert counts.sum() == exact.sum() == min(case[0], sum(case[2]))
    assert (counts <= case[2]).all()
    # Float32 may order equal remainders otherwise: then a connection changes its layer.
    assert np.abs(counts - exact).max() <= 1


def test_an_exact_split():
    """Quotas 2.5, 2.5 and 5 of 10: the first of equal remainders gets one more."""
    assert split(10, [1, 1, 2], [9, 9, 9]).tolist() == [3, 2, 5]
    assert split(10, [1, 1, 2], [9, 9, 3]).tolist() == [4, 3, 3]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**24), st.integers(0, 2**30))
def test_large_totals_keep_their_sum(a, total):
    """Beyond float32's integers the sum is still exact, and no layer above its room."""
    room = np.array([2**29, 2**29, 7, 2**28])
    counts = split(total, [a, 1, 3, 2**20], room)
    assert counts.sum(dtype=np.int64) == min(total, room.sum(dtype=np.int64))
    assert (counts >= 0).all() and (counts <= room).all()
