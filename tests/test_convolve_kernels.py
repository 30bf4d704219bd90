"""The compiled convolutions against float64 sums; nothing here runs where they were not built."""

import ctypes
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.connections.backends import cpp as kernels
from dst.layers import Conv
from dst.layers.window import Window
from tests.convolutions import activation, expected, gradient, make, near

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())


class Computed(NamedTuple):
    """What the kernels give, plainly and (fused) reading activations and gradients."""

    y: Any
    dx: Any
    gradient: Any
    only_dx: Any
    on_pairs: Any
    fused_y: Any
    moments: Any
    du: Any
    fused_gradient: Any
    sums: Any
    fused_on_pairs: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def computed(layer, threads, arrays, x, k, delta, kept, pairs):
    """All of it at once; `threads` is what is compiled for."""
    plain, plain_delta = kernels.Read(x), kernels.Read(delta[0])
    read, seen = kernels.Read(x, k), kernels.Read(delta[0], delta[2], delta[1])
    y, nothing = kernels.convolve(*arrays, plain, layer)
    dx, gradient, none = kernels.convolve_backward(*arrays, plain, plain_delta, kept, layer)
    only, _, _ = kernels.convolve_backward(*arrays, plain, plain_delta, jnp.zeros(0), layer)
    assert nothing.size == none.size == 0
    return Computed(
        *(y, dx, gradient, only, kernels.convolve_gradient_on(*pairs, plain, plain_delta, layer)),
        *kernels.convolve(*arrays, read, layer, moments=True),
        *kernels.convolve_backward(*arrays, read, seen, kept, layer),
        kernels.convolve_gradient_on(*pairs, read, seen, layer),
    )


def run(case, threads=0, pairs=None, **changed):
    if pairs is None:
        rng = np.random.default_rng(8)
        pairs = [rng.integers(-1, n, 60, np.int32) for n in case.W.shape]
    case = case._replace(**changed)
    delta = case.delta, case.other, case.delta_k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "THREADS", threads)
        found = computed(case.layer, threads, case.arrays, case.x, case.k, delta, case.kept, pairs)
    return Computed(*map(np.asarray, found)), pairs


def check(case, threads=0):
    found, pairs = run(case, threads)
    y64, dx64, dW64 = expected(case)
    near(found.y, y64)
    near(found.dx, dx64)
    np.testing.assert_array_equal(found.only_dx, found.dx)
    check_gradients(case, found.gradient, found.on_pairs, pairs, dW64)
    h, passes = activation(case)
    y64, dx64, dW64 = expected(case._replace(x=h, delta=gradient(case)))
    du = np.where(passes, dx64, 0)
    near(found.fused_y, y64)
    near(found.moments, np.stack([y64.mean((0, 1, 2)), y64.var((0, 1, 2))]))
    near(found.du, du)
    sums = np.stack([du.sum((0, 1, 2)), (du * case.x).sum((0, 1, 2))])
    np.testing.assert_allclose(found.sums, sums, atol=3e-6 * np.abs(du).sum() + 1e-9)
    check_gradients(case, found.fused_gradient, found.fused_on_pairs, pairs, dW64)


def check_gradients(case, gradient, on_pairs, pairs, dW64):
    own, (i, o) = slice(3, case.kept.size - 2), pairs
    near(gradient[own], case.kept[own] + dW64[case.column, case.output])
    np.testing.assert_array_equal(gradient[:3], case.kept[:3])
    np.testing.assert_array_equal(gradient[-2:], case.kept[-2:])
    near(on_pairs, np.where((i < 0) | (o < 0), 0, dW64[i, o]))


# ---------------------------------------------------------------------------------- one convolution
CASES = {
    "3x3": ((130, (9, 7), (3, 4), (3, 3)), {}),
    "unequal strides, VALID, dilated": (
        (5, (9, 11), (3, 4), (5, 3)),
        {"strides": (2, 3), "padding": "VALID", "dilation": (1, 2)},
    ),
    "1x1, stride 2": ((100, (8, 9), (17, 5), (1, 1)), {"strides": (2, 2)}),
    "7x7": ((33, (14, 15), (2, 3), (7, 7)), {"strides": (2, 2), "padding": ((3, 3), (3, 3))}),
    "11x2, cut": ((3, (13, 9), (2, 3), (11, 2)), {"padding": ((-1, 6), (0, -2))}),
    "2x2 pixels, narrow ring": ((70, (2, 2), (90, 30), (3, 3)), {"p": 0.1}),
    "padded on one side, dilated": (
        (20, (9, 9), (3, 4), (3, 2)),
        {"strides": (2, 2), "padding": ((4, 0), (0, 3)), "dilation": (3, 2)},
    ),
    "one pixel": ((128, (1, 1), (10, 4), (3, 3)), {"padding": ((1, 1), (1, 1))}),
    "tiles of columns": ((16, (5, 61), (96, 3), (3, 3)), {"strides": (1, 2), "p": 0.05}),
    "more sums than a cache": ((16, (4, 6), (32, 40), (3, 3)), {"p": 0.7}),
    "rows for all threads": ((64, (20, 20), (8, 8), (3, 3)), {}),
    "no connection": ((4, (5, 5), (2, 3), (3, 3)), {"p": 0.0}),
    "groups": ((20, (6, 7), (6, 9), (3, 2)), {"groups": 3, "strides": (2, 1)}),
    "depthwise": ((40, (9, 8), (12, 12), (7, 7)), {"groups": 12}),
    "two outputs a channel": ((33, (5, 5), (4, 8), (3, 3)), {"groups": 4, "dilation": (1, 2)}),
    "sequences, 31 places": ((17, (1, 40), (6, 6), (1, 31)), {"groups": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions_match_float64_ones(name):
    given, options = CASES[name]
    check(make(0, *given, **options), threads=2 if name == "rows for all threads" else 0)


sides, few, taps = st.integers(1, 12), st.integers(1, 6), st.integers(1, 5)
pads = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 150),
    sides=st.tuples(sides, sides),
    each=st.tuples(few, few),
    groups=st.integers(1, 3),
    taps=st.tuples(taps, taps),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.one_of(st.just("SAME"), st.just("VALID"), st.tuples(pads, pads)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    threads=st.integers(1, 3),
)
def test_any_convolution_matches_a_float64_one(threads, each, **geometry):
    geometry["channels"] = tuple(n * geometry["groups"] for n in each)
    window = Window(*(geometry[name] for name in ("strides", "padding", "dilation")))
    layer = Conv("layer", (*geometry["taps"], 1, 1), None, window)
    if min(layer.output_sides(geometry["sides"])) > 0:
        check(make(**geometry), threads)


def test_any_number_of_threads_gives_the_same_bits():
    for case in (
        make(1, 77, (12, 11), (8, 9), (3, 3), strides=(2, 1)),
        make(2, 128, (2, 2), (70, 20), (3, 3)),
    ):
        first, _ = run(case, 1)
        for threads in (2, 3, 16):
            for a, b in zip(first, run(case, threads)[0], strict=True):
                np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------------- laws
def test_the_kernels_are_linear_and_adjoint():
    """In x and in w; <y(x), d> = <x, dx(d)> = <w, dW(d)>, the latter by finite differences, too."""
    case = make(3, 40, (7, 6), (5, 4), (3, 2), strides=(1, 2))
    other = make(4, 40, (7, 6), (5, 4), (3, 2), strides=(1, 2))
    values, column, pointer = case.arrays
    twice = (2 * values, column, pointer)
    found, _ = run(case, kept=np.zeros_like(values))
    y, dx, gradient = found[:3]
    x = 2 * case.x - 3 * other.x
    near(run(case, x=x)[0][0], 2 * y - 3 * run(case, x=other.x)[0][0])
    np.testing.assert_array_equal(run(case, arrays=twice)[0][0], 2 * y)
    pairing = lambda a, b: np.sum(a.astype(np.float64) * b)  # noqa: E731
    own = slice(3, values.size - 2)
    for side in (pairing(case.x, dx), pairing(values[own], gradient[own])):
        np.testing.assert_allclose(pairing(y, case.delta), side, rtol=1e-5)
    for p in (0, 20, case.column.size - 1):
        changed = []
        for step in (0.5, -0.5):
            W = case.W.astype(np.float64)
            W[case.column[p], case.output[p]] += step
            changed.append(pairing(case.delta, expected(case._replace(W=W))[0]))
        np.testing.assert_allclose(gradient[3 + p], changed[0] - changed[1], rtol=1e-4, atol=1e-3)


def test_nan_and_infinity_reach_what_they_touch_and_nothing_else():
    case = make(5, 20, (5, 5), (4, 3), (3, 3))
    clean, _ = run(case)
    x, delta = case.x.copy(), case.delta.copy()
    x[7, 0, 0, 1] = np.nan
    delta[11, 4, 4, 2] = np.inf
    found, _ = run(case, x=x, delta=delta)
    y, dx, gradient = found[:3]
    W = case.W.reshape(3, 3, 4, 3)
    touched = np.zeros(y.shape, bool)
    touched[7, :2, :2] = (W[1::-1, 1::-1, 1] != 0)[..., :]
    np.testing.assert_array_equal(np.isnan(y), touched)
    np.testing.assert_array_equal(np.isnan(found.fused_y), touched)
    assert not np.isfinite(dx[11, 3:, 3:]).all() and np.isfinite(dx[:11]).all()
    tap, i = np.divmod(case.column, 4)
    a, b = np.divmod(tap, 3)
    bad = (i == 1) & (a < 2) & (b < 2) | (case.output == 2) & (a < 2) & (b < 2)
    np.testing.assert_array_equal(~np.isfinite(gradient[3:-2]), bad)
    np.testing.assert_array_equal(y[~touched], clean[0][~touched])


def test_wrong_arguments_are_named():
    case = make(6, 2, (5, 5), (2, 3), (3, 3))
    values, column, pointer = case.arrays
    for said, arrays in (
        ("pointer must have C' \\+ 1", (values, column, pointer[:-1])),
        ("pointer must lie in the arena", (values, column, pointer + 9)),
        ("a column lies outside of its kernel", (values, column + 18, pointer)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            run(case, arrays=arrays)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a pair lies outside of the kernel"):
        run(case, pairs=[np.int32([0]), np.int32([3])])
    window = case.layer.window._replace(padding=((16, 16), (0, 0)))
    wide = dataclasses.replace(case.layer, shape=(33, 1, 2, 3), window=window)
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernels have 1 to 32 rows"):
        run(case, layer=wide)
    with pytest.raises(jax.errors.JaxRuntimeError, match="channels are divisible by slices"):
        run(case, layer=dataclasses.replace(case.layer, groups=2))


def test_scratch_is_of_the_size_of_connections_units_and_rings(monkeypatch):
    """Neither a dense kernel (4.7 MB here) nor a map (8.4 MB) is ever held beside the results.

    One kernel at a time: XLA may run those of one program at once, which would hold twice as much.
    """
    monkeypatch.setattr(kernels, "THREADS", 2)
    scratch = ctypes.CDLL(str(kernels.library())).dst_scratch
    scratch.restype = ctypes.c_int64
    case = make(7, 128, (8, 8), (256, 512), (3, 3), p=0.002)
    pairs = [np.arange(9000, dtype=np.int32) % n for n in case.W.shape]
    K, units, ring = case.column.size, 256 + 512, 2 * 3 * 6 * 512 * 32 * 4
    plain = kernels.Read(case.x), kernels.Read(case.delta)
    fused = kernels.Read(case.x, case.k), kernels.Read(case.delta, case.delta_k, case.other)
    most = []
    for x, delta in (plain, fused):
        for call in (
            lambda x, delta: kernels.convolve(*case.arrays, x, case.layer, moments=True),
            lambda x, delta: kernels.convolve_backward(
                *case.arrays, x, delta, case.kept, case.layer
            ),
            lambda x, delta: kernels.convolve_gradient_on(*pairs, x, delta, case.layer),
        ):
            scratch()
            jax.block_until_ready(jax.jit(call)(x, delta))
            most.append(scratch())
    assert 0 < min(most)
    assert max(most) < 2 * ring + 2 * 4096 * 300 + 200 * K + 100 * units
    assert scratch() < 2**16
