"""The exchange of a rewire: of all layers together, and none that was just dropped grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dst import rewire as rewire_module
from dst.connections.base import Candidates, bits, row_salts, signed_bits
from dst.connections.hashing import salts
from dst.connections.masks import Masks
from dst.connections.select import lowest
from dst.layers import Dense
from tests.arenas import hashed

KEY = jax.random.key(4)


@functools.partial(jax.jit, static_argnums=5)
def exchange(A, w, S, score, k, size):
    """Drop the k weakest of A, grow the k <= size best of S: (A without P, that with G)."""
    layer = Dense("layer", (A.size, 1))
    masks = Masks([layer], {"layer": A[:, None]})
    salt = row_salts(masks.parts, KEY)
    dropped = lowest(bits(jnp.abs(w)), masks.exists, k, lambda: masks.hashes(salt))
    found = Candidates(jnp.zeros_like(S), S, score)  # a layer of one output: S are the columns
    grown = rewire_module.best_candidates(found, k, size, salt)
    new, moves = masks.exchange(dropped, grown, k, salt)
    return moves.masks["layer"][:, 0], new["layer"][:, 0]


W = np.array([0.9, -0.05, 0.4, 0, 0, 0.1, -0.7, 0.02, 0, 0], np.float32)
GRADIENT = np.array([0.3, 9, -0.2, -3, 0.5, 0.1, 0.4, 8, 0.2, -0.1], np.float32)
A = np.array([1, 1, 1, 0, 0, 1, 1, 1, 0, 0], bool)


def test_exchange_is_global_and_does_not_regrow():
    """O4: drops a2, b3 and grows a4, a5; per layer b4 would grow, with regrowth nothing."""
    S = np.flatnonzero(~A)
    survivors, new = exchange(A, W, S, np.abs(GRADIENT[S]), jnp.int32(2), 3)
    assert np.flatnonzero(A & ~survivors).tolist() == [1, 7]
    assert np.flatnonzero(new & ~A).tolist() == [3, 4]


def exchange_oracle(A, w, S, score, k):
    (salt,) = np.asarray(salts(KEY, 0, 1))  # a layer of one output: the column is the position
    order = sorted(np.flatnonzero(A), key=lambda i: (abs(w[i]), hashed(salt, i)))
    best = sorted(range(len(S)), key=lambda i: (-score[i], hashed(salt, S[i])))
    new = A.copy()
    new[order[:k]] = False
    new[[S[i] for i in best[:k]]] = True
    return new


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_exchange_equals_a_sort(data):
    """Ties by hash: few distinct weights and scores. The number of connections never changes."""
    n = 24
    A = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    w = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), np.float32)
    S = np.flatnonzero(~A).astype(np.int32)
    score = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.float32)[
        : len(S)
    ]
    k = data.draw(st.integers(0, min(6, A.sum(), len(S))))
    padded = np.pad(S, (0, n - len(S)))
    scores = np.pad(score, (0, n - len(S)), constant_values=-1)
    _, new = exchange(A, w * A, padded, scores, jnp.int32(k), 6)
    np.testing.assert_array_equal(new, exchange_oracle(A, w * A, S, score, k))
    assert new.sum() == A.sum()


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_bits_are_in_the_order_of_floats_of_either_sign(values):
    a = np.array(values, np.float32)
    order = np.asarray(signed_bits(jnp.asarray(a)))
    smaller = a[:, None] < a[None]
    assert (order[:, None] < order[None])[smaller].all()
