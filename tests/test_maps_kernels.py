"""Kernels over whole maps against XLA's gradients and float64 sums; nothing here runs unbuilt."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst.connections.backends import cpp as kernels
from dst.connections.backends import maps
from tests.convolutions import near, normal

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())

# (N, H, W, C): a full batch, remainders beside full vectors, one window, less than a vector.
SHAPES = [(128, 4, 6, 3), (37, 6, 10, 5), (77, 2, 2, 4), (3, 2, 4, 1)]


def affine(k, y):
    return k[0][None, None, None] * y + k[1][None, None, None]


def pooled(u):
    return nn.max_pool(nn.relu(u), (2, 2), (2, 2))


@functools.partial(jax.jit, static_argnums=0)
def computed(threads, y, k, r, g, ga, gb):
    """All of the kernels; `threads` is what is compiled for."""
    z = maps.join(y, k, r)
    one = maps.join_backward(ga, jnp.zeros(0), z, y)
    return (
        maps.pool(y, k),
        *maps.pool_backward(y, k, g),
        z,
        *one,
        *maps.join_backward(ga, gb, z, y),
    )


@jax.jit
def plain(y, k, r, g, ga, gb):
    """The same by XLA, sums excepted: those are None."""
    m, pool_backward = jax.vjp(pooled, affine(k, y))
    z, join_backward = jax.vjp(lambda u: nn.relu(u + r), affine(k, y))
    du = pool_backward(g)[0]
    return m, du, None, z, join_backward(ga)[0], None, join_backward(ga + gb)[0], None


def run(threads, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "THREADS", threads)
        return [np.asarray(a) for a in computed(threads, *data)]


def exact(seed, shape):
    """Maps with many ties whose u is exact in float32, and real cotangents."""
    rng = np.random.default_rng(seed)
    N, H, W, C = shape
    y, r = (rng.integers(-3, 4, shape).astype(np.float32) / 2 for _ in range(2))
    k = rng.integers(-4, 5, (2, C)).astype(np.float32) / 4
    return y, k, r, normal(rng, N, H // 2, W // 2, C), normal(rng, *shape), normal(rng, *shape)


def sums_of(du, y):
    du = du.astype(np.float64)
    return np.stack([du.sum((0, 1, 2)), (du * y).sum((0, 1, 2))])


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_are_those_of_xla_with_ties(shape):
    data = exact(0, shape)
    found, wanted = run(2, data), plain(*data)
    for i, expected in enumerate(wanted):
        if expected is None:  # the sums of the map before
            near(found[i], sums_of(found[i - 1], data[0]), 1e-6)
        else:
            np.testing.assert_array_equal(found[i], np.asarray(expected))


def test_real_maps_match_float64_ones():
    rng = np.random.default_rng(1)
    shape = N, H, W, C = SHAPES[1]
    _, _, _, *cotangents = exact(1, shape)
    y, k, r = 3 + normal(rng, *shape), normal(rng, 2, C), normal(rng, *shape)
    m, _, _, z, *_ = run(2, (y, k, r, *cotangents))
    wide = k[0].astype(np.float64) * y + k[1]
    near(m, np.maximum(wide, 0).reshape(N, H // 2, 2, W // 2, 2, C).max((2, 4)), 1e-6)
    near(z, np.maximum(wide + r, 0), 1e-6)


def test_the_first_of_equal_maxima_gets_the_gradient():
    """All 256 windows of four values that are negative, 0 or one of two positive ones."""
    values = np.float32([-1, 0, 1, 2])
    windows = np.stack(np.meshgrid(*[values] * 4, indexing="ij"), -1).reshape(256, 2, 2, 1)
    k, g = np.float32([[1], [0]]), 1 + np.arange(256, dtype=np.float32)
    data = (windows, k, windows, g.reshape(256, 1, 1, 1), windows, windows)
    _, du, sums, *_ = run(1, data)
    flat = windows.reshape(256, 4)
    first = np.eye(4)[flat.argmax(1)] * (flat.max(1) > 0)[:, None] * g[:, None]
    np.testing.assert_array_equal(du.reshape(256, 4), first)
    np.testing.assert_array_equal(sums[:, 0], [first.sum(), (first * flat).sum()])


def test_nan_goes_forwards_to_where_it_belongs_and_nowhere_else():
    """In every place of a window, in a vector and in the remainder, in y and in r."""
    shape = SHAPES[1]
    y, k, r, *cotangents = exact(2, shape)
    k[0] = 1
    clean = run(2, (y, k, r, *cotangents))
    places = [(0, 0, 0, 0), (5, 0, 3, 1), (16, 3, 0, 2), (33, 5, 9, 4), (36, 2, 3, 3)]
    bad = y.copy()
    bad[tuple(np.transpose(places))] = np.nan
    m, du, _, z, *_ = run(2, (bad, k, r, *cotangents))
    of_window = [(n, h // 2, w // 2, c) for n, h, w, c in places]
    for got, was, where in ((m, clean[0], of_window), (z, clean[3], places)):
        wanted = was.copy()
        wanted[tuple(np.transpose(where))] = np.nan
        np.testing.assert_array_equal(got, wanted)
    assert np.isfinite(du).all()
    bad = r.copy()
    bad[36, 1, 1, 1] = np.nan
    assert np.argwhere(np.isnan(run(2, (y, k, bad, *cotangents))[3])).tolist() == [[36, 1, 1, 1]]


def test_any_number_of_threads_gives_the_same_bits():
    for shape in SHAPES[1:3]:
        data = exact(3, shape)
        data = (data[0] + normal(np.random.default_rng(4), *shape), *data[1:])
        first = run(1, data)
        for threads in (2, 3):
            for a, b in zip(first, run(threads, data), strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_gradient_of_a_join_is_written_in_place_if_it_may_be():
    y, k, r, _, ga, gb = map(jnp.asarray, exact(5, (20, 2, 2, 3)))
    z = maps.join(y, k, r)
    before = np.array(ga)
    wanted = [np.array(a) for a in maps.join_backward(ga, gb, z, y)]
    np.testing.assert_array_equal(ga, before)
    call = jax.jit(maps.join_backward, donate_argnums=0)
    for got, want in zip(call(ga, gb, z, y), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_wrong_arguments_are_named():
    y, k, r, g, ga, gb = exact(6, (2, 4, 6, 3))
    none = np.zeros(0, np.float32)
    pool = "maps are \\(N, H, W, C\\) with H and W even, k is \\(2, C\\)"
    for said, call in (
        (f"dst_pool: {pool}", lambda: maps.pool(y[:, :3], k)),
        (f"dst_pool: {pool}", lambda: maps.pool(y[:, :, :5], k)),
        (f"dst_pool: {pool}", lambda: maps.pool(y, k[:, :2])),
        (f"dst_pool_backward: {pool}", lambda: maps.pool_backward(y, k, g[:1])),
        ("dst_join: y and r are \\(N, H, W, C\\)", lambda: maps.join(y, k, r[:, :, :, :2])),
        ("dst_join: y and r are \\(N, H, W, C\\)", lambda: maps.join(y, k[0], r)),
        ("dst_join_backward: ga, z and y are", lambda: maps.join_backward(ga, gb[:1], r, y)),
        ("dst_join_backward: ga, z and y are", lambda: maps.join_backward(ga, none, r[:1], y)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            call()


@pytest.mark.parametrize("batch", [3, 37])
def test_channels_are_summed_in_double(batch):
    rng = np.random.default_rng(10)
    a, b = 30 + normal(rng, batch, 6, 7, 5), normal(rng, batch, 6, 7, 5)
    k, delta_k = normal(rng, 2, 5), normal(rng, 3, 5)
    reads = kernels.Read(b), kernels.Read(b, k), kernels.Read(b, delta_k, a)
    with pytest.MonkeyPatch.context() as patch:
        for threads in (1, 3):
            patch.setattr(kernels, "THREADS", threads)
            found = jax.jit(lambda a, b: (maps.moments(a), maps.channel_sums(a, b)))(a, b)
            wide, axes = a.astype(np.float64), (0, 1, 2)
            near(np.asarray(found[0]), np.stack([wide.mean(axes), wide.var(axes)]), 1e-6)
            near(np.asarray(found[1]), np.stack([wide.sum(axes), (wide * b).sum(axes)]), 1e-6)
            delta = delta_k[0] * b.astype(np.float64) + delta_k[1] * wide + delta_k[2]
            values = b.astype(np.float64), np.maximum(k[0] * b.astype(np.float64) + k[1], 0), delta
            for read, value in zip(reads, values, strict=True):
                got = jax.jit(maps.magnitudes)(read)
                near(np.asarray(got), np.abs(value).sum(axes), 1e-6)
            jax.clear_caches()
