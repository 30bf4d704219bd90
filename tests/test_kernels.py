"""The compiled products against float64 sums; nothing here runs where they were not built."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.connections.backends import cpp as kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
examples = settings(max_examples=30, deadline=None)


# --------------------------------------------------------------------------------- the arena, dense
class Layer:
    """A layer of an arena in NumPy: the same structure as a dense matrix and as lists."""

    def __init__(self, rng, n_in, n_out, block, density):
        self.n_in, self.n_out, self.block = n_in, n_out, block
        self.exists = rng.random((n_out, n_in)) < density
        self.exists[rng.random(n_out) < 0.2] = False
        self.row, self.column = [], []
        for b in range(-(-n_in // block)):
            inside = np.zeros(n_in, bool)
            inside[b * block : (b + 1) * block] = True
            output, column = np.nonzero(self.exists & inside)
            self.row += list(b * n_out + output)
            self.column += list(column)
        self.rows = -(-n_in // block) * n_out


def arena(layers):
    """(column, pointer, each layer's slice of pointer, each layer's range) of the arena."""
    column = np.array([c for layer in layers for c in layer.column], np.int32)
    counts = np.concatenate([np.bincount(la.row, minlength=la.rows) for la in layers])
    pointer = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ends = np.cumsum([0, *(layer.rows for layer in layers)])
    slices = [pointer[a : b + 1] for a, b in itertools.pairwise(ends)]
    return column, pointer, slices, [slice(p[0], p[-1]) for p in slices]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, expected, terms):
    """Equal to float32 rounding of a sum of `terms` products of normal numbers."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * (10 + terms))


def connection_lists(layer):
    """(output, input) of the layer's connections in the arena's order."""
    return np.array(layer.row, int) % layer.n_out, np.array(layer.column, int)


def check_products(seed, sizes, block, density, B):
    rng = np.random.default_rng(seed)
    layers = [Layer(rng, *size, block, density) for size in sizes]
    column, _, slices, ranges = arena(layers)
    values, kept = normal(rng, column.size), normal(rng, column.size)
    for layer, pointer, own in zip(layers, slices, ranges, strict=True):
        x, delta = normal(rng, layer.n_in, B), normal(rng, layer.n_out, B)
        o, i = connection_lists(layer)
        W = np.zeros((layer.n_out, layer.n_in))
        W[o, i] = values[own]
        y = kernels.multiply(values, column, pointer, x, layer.n_out)
        close(y, W @ x, layer.n_in)
        dx, gradient = kernels.backward(values, column, pointer, x, delta, kept)
        close(dx, W.T @ delta, layer.n_out)
        outside = np.ones(column.size, bool)
        outside[own] = False
        np.testing.assert_array_equal(np.asarray(gradient)[outside], kept[outside])
        pairs = np.einsum("nb,nb->n", x[i].astype(np.float64), delta[o])
        close(gradient[own], kept[own] + pairs, B)


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=3),
    block=st.integers(1, 80),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    B=st.integers(1, 200),
    threads=st.sampled_from([1, 2, 5]),
)
def test_products_match_dense_float64_ones(seed, sizes, block, density, B, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "THREADS", threads)
        check_products(seed, sizes, block, density, B)


def test_products_of_a_layer_large_enough_for_all_threads():
    check_products(0, [(700, 600)], 256, 0.1, 128)


def test_nothing_is_returned_before_all_threads_are_done():
    rng = np.random.default_rng(5)
    layer = Layer(rng, 700, 600, 256, 0.1)
    column, pointer, _, _ = arena([layer])
    values, x = normal(rng, column.size), normal(rng, 700, 128)

    @jax.jit
    def products(x):
        y = kernels.multiply(values, column, pointer, x, layer.n_out)
        return y, *kernels.backward(values, column, pointer, x, y, jnp.zeros_like(values))

    # Turn about: what one call leaves in memory is wrong for the next.
    expected = [jax.tree.map(np.asarray, products(sign * x)) for sign in (1, -2)]
    for again in range(100):
        got = products((1, -2)[again % 2] * x)
        jax.tree.map(np.testing.assert_array_equal, got, expected[again % 2])


@examples
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 300), B=st.integers(1, 200))
def test_gradient_on_pairs(seed, n, B):
    rng = np.random.default_rng(seed)
    x, delta = normal(rng, 30, B), normal(rng, 20, B)
    i, o = rng.integers(-3, 30, n, np.int32), rng.integers(-2, 20, n, np.int32)
    expected = np.einsum("nb,nb->n", x[i].astype(np.float64), delta[o])
    close(kernels.gradient_on(i, o, x, delta), np.where((i < 0) | (o < 0), 0, expected), B)


# -------------------------------------------------------------------------------- rounding, threads
@pytest.mark.parametrize("block", [64, 300])
def test_any_number_of_threads_gives_the_same_bits(block, monkeypatch):
    rng = np.random.default_rng(1)
    layer = Layer(rng, 300, 200, block, 0.3)
    column, pointer, _, _ = arena([layer])
    values, x, delta = normal(rng, column.size), normal(rng, 300, 77), normal(rng, 200, 77)
    o, i = (a.astype(np.int32) for a in connection_lists(layer))

    def products(threads):
        monkeypatch.setattr(kernels, "THREADS", threads)
        y = kernels.multiply(values, column, pointer, x, 200)
        dx, gradient = kernels.backward(values, column, pointer, x, delta, np.zeros_like(values))
        return y, dx, gradient, kernels.gradient_on(i, o, x, delta)

    first = products(1)
    for threads in (0, 1, 2, 3, 16, 16):
        for a, b in zip(first, products(threads), strict=True):
            np.testing.assert_array_equal(a, b)


def test_products_that_run_at_once_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(kernels, "THREADS", 8)
    rng = np.random.default_rng(2)
    column, pointer, _, _ = arena([Layer(rng, 60, 50, 16, 0.3)])
    values, xs = normal(rng, column.size), normal(rng, 6, 60, 32)

    @jax.jit
    def sums(values, xs):
        ys = [kernels.multiply(values, column, pointer, x, 50) for x in xs]
        back = [
            kernels.backward(values, column, pointer, x, y, values)
            for x, y in zip(xs, ys, strict=True)
        ]
        return sum(y.sum() for y in ys) + sum(dx.sum() + g.sum() for dx, g in back)

    expected = float(sums(values, xs))
    seen = []

    def many():
        seen.extend(float(sums(values, xs)) for _ in range(150))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 600


def test_nan_and_infinity_reach_everything_they_touch():
    rng = np.random.default_rng(3)
    layer = Layer(rng, 20, 10, 8, 0.5)
    column, pointer, _, _ = arena([layer])
    o, i = connection_lists(layer)
    values, x, delta = normal(rng, column.size), normal(rng, 20, 50), normal(rng, 10, 50)
    x[i[0], 3] = np.nan
    delta[o[-1], 7] = np.inf
    values[[0, -1]] = 0
    y = np.asarray(kernels.multiply(values, column, pointer, x, 10))
    touched = np.zeros_like(y, bool)
    touched[o[i == i[0]], 3] = True
    np.testing.assert_array_equal(np.isnan(y), touched)
    dx, gradient = kernels.backward(values, column, pointer, x, delta, np.zeros_like(values))
    assert np.isnan(dx[i[-1], 7])
    bad = (i == i[0]) | (o == o[-1])
    np.testing.assert_array_equal(~np.isfinite(np.asarray(gradient)), bad)
