"""Products of a sparse layer and their cotangents, in every tier, against dense float64 ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst.connections import products, ranges
from dst.connections.arena import Arena, positions
from dst.connections.backends import cpp as kernels
from dst.connections.backends import dispatch
from tests.arenas import SHAPES, parts_of, random_case, slices

# K is a few times the smaller chunk and not a multiple of it, or less than one larger chunk.
CONNECTIONS = 75
TIERS = {
    "compiled": (True, "cpu", 1024),
    "pure": (False, "cpu", 1024),
    "pure, several chunks": (False, "cpu", 8),
    "no CPU": (True, "gpu", 1024),  # where there are kernels, but no CPU
    "no CPU, several chunks": (False, "gpu", 8),
}


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    """Computes everything on this CPU, by the code of this tier."""
    compiled, backend, chunk = TIERS[request.param]
    if request.param == "compiled" and not kernels.available():
        pytest.skip(kernels.why_not())
    available = kernels.available() and compiled
    monkeypatch.setattr(kernels, "available", lambda: available)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    monkeypatch.setattr(ranges, "ELEMENTS", 32 * chunk)
    assert dispatch.compiled(jnp.zeros(1)) == (request.param == "compiled")
    return request.param


def close(found, expected, tolerance=2e-6):
    """Equal to a share of the largest expected number; sums here have at most 100 terms."""
    assert found.shape == expected.shape
    scale = max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * tolerance * scale)


def pulled(functions, *primals):
    """Of each function: its value, the cotangents of its primals, and its own, which are random."""
    rng = np.random.default_rng(9)
    shapes = [jax.eval_shape(f, *args) for f, *args in zip(functions, *primals, strict=True)]
    random = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), shapes)

    @jax.jit
    def both(random, *primals):
        pulls = [jax.vjp(f, *args) for f, *args in zip(functions, *primals, strict=True)]
        return [(value, pull(r)) for (value, pull), r in zip(pulls, random, strict=True)]

    float64 = jax.tree.map(lambda a: np.array(a, np.float64), random)
    found = both(random, *primals)
    return [(value, cotangents, r) for (value, cotangents), r in zip(found, float64, strict=True)]


def check_product(case, dtype=np.float32, tolerance=2e-6):
    """y = W h, W^T delta and dL/dw of all layers; outside of its layer dL/dw is what it was."""
    rng = np.random.default_rng(1)
    parts, values = case.arena.parts, jnp.asarray(case.values, dtype)
    batches = [1 if l % 2 else 6 for l in range(len(parts))]
    hs = [rng.normal(size=(part.n_in, batch)) for part, batch in zip(parts, batches, strict=True)]
    found = pulled(
        [
            lambda values, h, part=part: products.product(part, values, case.arena, h)
            for part in parts
        ],
        [values] * len(parts),
        [jnp.asarray(h, dtype) for h in hs],
    )
    for part, W, here, h, (value, cotangents, given) in zip(
        parts, case.kernels, slices(parts, case.masks), hs, found, strict=True
    ):
        (y, passed), (gradient, dh), (delta, before) = value, cotangents, given
        assert {a.dtype for a in (y, gradient, dh)} == {np.dtype(dtype)}
        np.testing.assert_array_equal(passed, values)
        close(y, W.T @ h, tolerance)
        close(dh, W @ delta, tolerance)
        i, o = np.divmod(positions(case.arena, part)[1], part.n_out)
        expected = before.copy()
        expected[here] += (h @ delta.T)[i, o]
        close(gradient, expected, tolerance)
        outside = np.delete(np.arange(values.size), np.arange(here.start, here.stop))
        np.testing.assert_array_equal(np.asarray(gradient)[outside], before[outside].astype(dtype))


def check_frozen(case):
    """The same y and W^T delta where no gradient of the values is wanted, and none comes."""
    values, rng = jnp.asarray(case.values, jnp.float32), np.random.default_rng(2)
    for part in case.arena.parts:
        h = jnp.asarray(rng.normal(size=(part.n_in, 6)), jnp.float32)
        y, pull = jax.vjp(lambda v, h, p=part: products.product(p, v, case.arena, h)[0], values, h)
        same, frozen = jax.vjp(
            lambda v, h, p=part: products.frozen_product(p, v, case.arena, h), values, h
        )
        np.testing.assert_array_equal(y, same)
        np.testing.assert_array_equal(pull(y)[1], frozen(y)[1])
        assert not frozen(y)[0].any()


def check_expand(case, dtype=np.float32, tolerance=2e-6):
    """The dense kernel of all layers, and its cotangent back on the connections."""
    parts, values = case.arena.parts, jnp.asarray(case.values, dtype)
    found = pulled(
        [lambda values, part=part: products.expand(part, values, case.arena) for part in parts],
        [values] * len(parts),
    )
    for part, W, here, (value, cotangents, given) in zip(
        parts, case.kernels, slices(parts, case.masks), found, strict=True
    ):
        (kernel, passed), (gradient,), (dense, before) = value, cotangents, given
        assert kernel.dtype == gradient.dtype == dtype
        np.testing.assert_array_equal(passed, values)
        np.testing.assert_array_equal(kernel, W.reshape(part.layer.shape).astype(dtype))
        i, o = np.divmod(positions(case.arena, part)[1], part.n_out)
        before[here] += dense.reshape(part.n_in, part.n_out)[i, o]
        close(gradient, before, tolerance)


# ------------------------------------------------------------------------------------ one layer
def test_products_and_their_cotangents_are_the_dense_ones(tier):
    # Several blocks, one, an empty layer; a batch of 6 and of 1.
    case = random_case(np.random.default_rng(0), 30, parts_of(SHAPES[:3]), empty=(2,))
    check_product(case)
    check_frozen(case)


@pytest.mark.parametrize("chunk", [1024, 8])
def test_a_kernel_is_expanded_exactly_and_its_gradient_collected(chunk, monkeypatch):
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    monkeypatch.setattr(ranges, "ELEMENTS", 32 * chunk)
    check_expand(random_case(np.random.default_rng(4), 40, parts_of(SHAPES[:4]), empty=(0,)))


@pytest.mark.parametrize("name", ["pure, several chunks", "no CPU, several chunks"])
def test_float64_is_computed_in_float64_whatever_was_built(name, monkeypatch):
    _, backend, chunk = TIERS[name]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    monkeypatch.setattr(ranges, "ELEMENTS", 32 * chunk)
    case = random_case(np.random.default_rng(3), 30, parts_of(SHAPES[:2]))
    with jax.enable_x64(True):
        check_product(case, np.float64, 1e-15)
        check_expand(case, np.float64, 1e-15)


def test_an_arena_without_any_connection_computes_zeros(tier):
    case = random_case(np.random.default_rng(6), 0, parts_of(SHAPES[:1]))
    check_expand(case)
    check_product(case)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_bias_is_added_to_every_column(batch):
    y = np.random.default_rng(7).normal(size=(4, batch))
    bias = np.arange(4.0)
    ((value, (dy, db), delta),) = pulled(
        [products.add_bias], [jnp.asarray(y, jnp.float32)], [jnp.asarray(bias, jnp.float32)]
    )
    close(value, y + bias[:, None])
    close(dy, delta)
    close(db, delta.sum(1))


# ------------------------------------------------------------------------------- several layers
def loss(layer, weights, bias, x):
    """Conv, Dense with bias, Dense twice; `layer(l, weights, h)` gives (its output, weights)."""
    kernel, weights = layer(3, weights, None)
    images = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(images.reshape(x.shape[0], -1)[:, :9]).T
    h, weights = layer(0, weights, h)
    h = jnp.tanh(products.add_bias(h, bias))
    h, weights = layer(4, weights, jnp.concatenate([h, h[:1]]))
    h, weights = layer(4, weights, jnp.tanh(h))
    return jnp.sum(jnp.sin(h) * jnp.arange(1.0, h.size + 1, dtype=h.dtype).reshape(h.shape))


def gradients(layer, *arguments):
    return jax.jit(jax.grad(functools.partial(loss, layer), (0, 1, 2)))(*arguments)


@functools.lru_cache
def dense_autodiff():
    """(case, bias, x) and the float64 gradients of the values, bias and x by dense products."""
    rng = np.random.default_rng(8)
    case = random_case(rng, CONNECTIONS)
    bias, x = rng.normal(size=5), 0.5 * rng.normal(size=(2, 5, 5, 3))

    def dense(l, weights, h):
        W = weights[l]
        return (W.reshape(SHAPES[l]) if h is None else W.T @ h), weights

    with jax.enable_x64(True):
        of_kernels, *others = gradients(dense, case.kernels, bias, x)
    of_values = [
        np.asarray(kernel).ravel()[positions(case.arena, part)[1]]
        for part, kernel in zip(case.arena.parts, of_kernels, strict=True)
    ]
    return (case, bias, x), [np.concatenate(of_values), *map(np.asarray, others)]


def test_one_gradient_of_all_layers_is_that_of_dense_autodiff(tier):
    (case, bias, x), expected = dense_autodiff()
    arena = case.arena

    def sparse(l, values, h):
        part = arena.parts[l]
        if h is None:
            return products.expand(part, values, arena)
        return products.product(part, values, arena, h)

    assert np.count_nonzero(expected[0]) > 40
    found = gradients(sparse, *(jnp.asarray(a, jnp.float32) for a in (case.values, bias, x)))
    for a, b in zip(found, expected, strict=True):
        close(a, b)


# ------------------------------------------------------------------------------------ NaN, tiers
def test_nan_reaches_all_that_it_touches_and_nothing_else(tier):
    parts = parts_of(((9, 7),))
    arena, values, (mask,), _ = random_case(np.random.default_rng(10), 30, parts)
    (part,), (_, at) = parts, positions(arena, parts[0])
    input_, output = np.divmod(at, 7)
    h, delta = np.ones((9, 3), np.float32), np.ones((7, 3), np.float32)

    @jax.jit
    def f(values, h, delta):
        y, pull = jax.vjp(lambda v, h: products.product(part, v, arena, h)[0], values, h)
        return *pull(delta), y

    values = np.array(values, np.float32)
    h[5, 1] = np.nan
    gradient, dh, y = f(values, h, delta)
    assert mask[5].any()
    np.testing.assert_array_equal(np.isnan(y), np.outer(mask[5], [0, 1, 0]))
    np.testing.assert_array_equal(np.isnan(gradient), input_ == 5)
    assert np.isfinite(dh).all()

    h[5, 1], delta[4, 2] = 1, np.nan
    gradient, dh, y = f(values, h, delta)
    assert mask[:, 4].any()
    np.testing.assert_array_equal(np.isnan(dh), np.outer(mask[:, 4], [0, 0, 1]))
    np.testing.assert_array_equal(np.isnan(gradient), output == 4)

    values[11], delta[4, 2] = np.nan, 1
    gradient, dh, y = f(values, h, delta)
    assert np.isnan(np.asarray(y)[output[11]]).all()
    assert np.isnan(np.asarray(dh)[input_[11]]).all()
    assert np.isnan(y).sum() == np.isnan(dh).sum() == 3
    assert np.isfinite(gradient).all()


def test_the_tier_is_named_for_the_log(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert dispatch.tier() == "compiled kernels"
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no compiler")
    assert dispatch.tier() == "pure JAX, as there is no compiler"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.tier() == "pure JAX"


def test_integers_of_the_arena_have_no_gradient():
    case = random_case(np.random.default_rng(11), CONNECTIONS)
    part, h = case.arena.parts[0], jnp.ones((9, 2))

    def f(values, arena: Arena):
        return products.product(part, values, arena, h)[0].sum()

    with_arena = jax.grad(f, (0, 1), allow_int=True)(jnp.float32(case.values), case.arena)
    assert {leaf.dtype for leaf in jax.tree.leaves(with_arena[1])} == {jax.dtypes.float0}
