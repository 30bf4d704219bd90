"""GraBo's bound and SynFlow's flow against explicit sums, matrix products and known numbers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dst.connections.masks import Masks
from dst.discovery import network
from dst.errors import ConfigError
from dst.methods import heuristics
from dst.models import ResNet
from dst.state import SparseState, fresh_progress
from dst.update import AXIS


class MLP(nn.Module):
    """Dense layers a, b, c, ... with ReLU between them."""

    sizes: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for name, size in zip("abcdef", self.sizes, strict=False):
            x = x if name == "a" else nn.relu(x)
            x = nn.Dense(size, self.use_bias, name=name)(x)
        return x


class CNN(nn.Module):
    """Convolutions with padding, stride, norm, pooling and dropout, then a Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="first")(x)
        x = nn.BatchNorm(use_running_average=False, epsilon=0.1, name="norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=False)(x)
        x = nn.Conv(5, (3, 2), strides=2, padding="VALID", use_bias=False, name="second")(x)
        return nn.Dense(2, name="last")(x.mean((1, 2)))


def state_of(variables):
    variables = dict(variables)
    return SparseState(
        jnp.int32(0), variables.pop("params"), variables, Masks((), {}), (), jax.random.key(0), (),
        fresh_progress(),
    )  # fmt: skip


def randoms(model, x, seed=0):
    """Every variable from a normal distribution, the variances positive."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda k: model.init({"params": k, "dropout": k}, x), jax.random.key(0))
    draw = lambda path, a: np.float32(  # noqa: E731
        rng.uniform(0.5, 2, a.shape) if path[-1].key == "var" else rng.normal(size=a.shape)
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


def normalised(v):
    v = np.asarray(v).astype(np.float64)
    return v / v.sum()


# ------------------------------------------------------------------------------------------ uniform
def test_uniform_treats_all_units_alike():
    net = network(CNN(), jnp.ones((2, 8, 8, 3)))
    fg = heuristics.uniform(net, None, None)
    assert {p: (f.size, g.size) for p, (f, g) in fg.items()} == {
        "first": (3, 4), "second": (4, 5), "last": (5, 2)
    }  # fmt: skip
    assert all((v == 1).all() for pair in fg.values() for v in pair)


# -------------------------------------------------------------------------------------------- GraBo
def weighted(apply, batch):
    """A loss whose delta at the output is batch['delta']."""
    return jnp.sum(apply(batch["x"]) * batch["delta"]), {}


def grabo(model, variables, batch, shards=1):
    """Marginals of each shard, as on that many devices."""
    net = network(model, batch["x"])
    measure = heuristics.marginals_of(net, weighted, heuristics.HEURISTICS["grabo"])
    state = state_of(variables)
    split = lambda a: a.reshape(shards, -1, *a.shape[1:])  # noqa: E731
    on_devices = jax.vmap(lambda batch: measure(state, batch), axis_name=AXIS)
    return jax.jit(on_devices)(jax.tree.map(split, batch))


def test_grabo_is_the_oracle():
    h = np.array([[1, 0, 2], [0, 1, 1]], np.float32)
    delta = np.array([[1, -1], [2, 0]], np.float32)
    model = MLP((2,))
    f, g = grabo(model, randoms(model, h), {"x": h, "delta": delta})["a"]
    np.testing.assert_array_equal(f[0], [1, 1, 3])
    np.testing.assert_array_equal(g[0], [3, 1])
    np.testing.assert_array_equal(np.outer(f[0], g[0]), [[3, 1], [3, 1], [9, 3]])
    np.testing.assert_allclose(normalised(f[0]), [0.2, 0.2, 0.6])
    np.testing.assert_allclose(normalised(g[0]), [0.75, 0.25])


def test_grabo_sums_over_devices():
    rng = np.random.default_rng(0)
    model = MLP((4, 3))
    batch = {k: np.float32(rng.normal(size=(8, n))) for k, n in (("x", 5), ("delta", 3))}
    variables = randoms(model, batch["x"])
    alone, shared = grabo(model, variables, batch), grabo(model, variables, batch, shards=4)
    for path, pair in alone.items():
        for one, four in zip(pair, shared[path], strict=True):
            assert four.shape == (4, *one.shape[1:])
            np.testing.assert_allclose(four, np.broadcast_to(one, four.shape), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_the_bound_holds_and_is_met_by_one_example(batch_size):
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(batch_size, 5)))
    delta = np.float32(rng.normal(size=(batch_size, 3)))
    model = MLP((7, 6, 3))
    variables = randoms(model, x)
    fg = grabo(model, variables, {"x": x, "delta": delta})
    G = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) * delta))(variables["params"])
    for path, (f, g) in fg.items():
        bound, exact = np.outer(f[0], g[0]), np.abs(G[path]["kernel"])
        assert (bound >= exact * (1 - 1e-5)).all()
        assert bound.max() > 0
        if batch_size == 1:
            np.testing.assert_allclose(bound, exact, rtol=1e-5, atol=1e-6)
        else:
            assert (bound > 1.1 * exact).mean() > 0.5


def test_the_bound_of_a_convolution_holds_at_every_window_position():
    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="a")(x))
            return nn.Conv(2, (2, 3), name="b")(x)

    rng = np.random.default_rng(2)
    x, delta = (np.float32(rng.normal(size=s)) for s in ((3, 8, 8, 3), (3, 4, 4, 2)))
    variables = randoms(Conv(), x)
    fg = grabo(Conv(), variables, {"x": x, "delta": delta})
    G = jax.grad(lambda p: jnp.sum(Conv().apply({"params": p}, x) * delta))(variables["params"])
    np.testing.assert_allclose(fg["a"][0][0], np.abs(x).sum((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(fg["b"][1][0], np.abs(delta).sum((0, 1, 2)), rtol=1e-5)
    for path, (f, g) in fg.items():
        assert (np.outer(f[0], g[0])[None, None] >= np.abs(G[path]["kernel"])).all()


# ------------------------------------------------------------------------------------------ SynFlow
def synflow(model, x, variables):
    return heuristics.synflow(network(model, x))(state_of(variables))


def products(kernels):
    """Eq. 3 by matrix products in float64: f_l of what is before layer l, g_l of what is after."""
    kernels = [np.abs(np.asarray(k, np.float64)) for k in kernels]
    f, g = [np.ones(kernels[0].shape[0])], [np.ones(kernels[-1].shape[1])]
    for kernel in kernels[:-1]:
        f.append(f[-1] @ kernel)
    for kernel in reversed(kernels[1:]):
        g.insert(0, kernel @ g[0])
    return list(zip(map(normalised, f), map(normalised, g), strict=True))


def test_synflow_is_the_oracle():
    model, x = MLP((2, 1), use_bias=False), jnp.zeros((1, 2))
    kernels = {"a": np.float32([[1, -2], [3, 4]]), "b": np.float32([[-5], [6]])}
    fg = synflow(model, x, {"params": {p: {"kernel": k} for p, k in kernels.items()}})
    np.testing.assert_allclose(fg["a"][0], [0.5, 0.5])
    np.testing.assert_allclose(fg["a"][1], [5 / 11, 6 / 11], rtol=1e-6)
    np.testing.assert_allclose(fg["b"][0], [0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(fg["b"][1], [1.0])


def test_synflow_is_eq_3_whatever_the_signs_and_biases():
    model, x = MLP((7, 6, 4, 3)), jnp.zeros((1, 5))
    variables = randoms(model, x)
    params = variables["params"]
    params["b"]["kernel"][:, 2] = 0  # a unit that nothing reaches: no f, but a g
    params["c"]["kernel"] *= 1e25  # R and its gradients are far outside float32
    params["d"]["kernel"] *= 1e25
    fg = synflow(model, x, variables)
    expected = products([params[path]["kernel"] for path in "abcd"])
    for (f, g), (f0, g0) in zip(fg.values(), expected, strict=True):
        assert f.dtype == g.dtype == jnp.float32
        np.testing.assert_allclose(f, f0, rtol=1e-6)
        np.testing.assert_allclose(g, g0, rtol=1e-6)
    assert fg["c"][0][2] == 0 < fg["b"][1][2]
    flipped = jax.tree.map(lambda a: -a, variables)
    for pair, same in zip(fg.values(), synflow(model, x, flipped).values(), strict=True):
        np.testing.assert_array_equal(pair[0], same[0])
        np.testing.assert_array_equal(pair[1], same[1])


def test_synflow_through_norm_pooling_and_dropout():
    x = jnp.ones((6, 10, 8, 3))
    variables = randoms(CNN(), x)
    fg = synflow(CNN(), x, variables)
    params, var = variables["params"], variables["batch_stats"]["norm"]["var"]
    with jax.enable_x64(True):
        wide = lambda a: jnp.abs(jnp.asarray(a, jnp.float64))  # noqa: E731
        factor = wide(params["norm"]["scale"]) / jnp.sqrt(wide(var) + 0.1)
        conv = lambda h, path, stride, padding: lax.conv_general_dilated(  # noqa: E731
            h, wide(params[path]["kernel"]), stride, padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

        def twin(nudge):
            h1 = jnp.ones((1, 10, 8, 3))
            y1 = conv(h1, "first", (1, 1), "SAME") + nudge[0]
            h2 = nn.max_pool(y1 * factor.reshape(1, 1, 1, -1), (2, 2), (2, 2))
            y2 = conv(h2, "second", (2, 2), "VALID") + nudge[1]
            h3 = y2.mean((1, 2))
            y3 = h3 @ wide(params["last"]["kernel"]) + nudge[2]
            return jnp.sum(y3), (h1, h2, h3)

        zeros = tuple(jnp.zeros(shape) for shape in ((1, 10, 8, 4), (1, 2, 2, 5), (1, 2)))
        deltas, h = jax.grad(twin, has_aux=True)(zeros)
    for path, activity, delta in zip(("first", "second", "last"), h, deltas, strict=True):
        f, g = fg[path]
        axes = tuple(range(activity.ndim - 1))
        np.testing.assert_allclose(f, normalised(np.asarray(activity).sum(axes)), rtol=1e-6)
        np.testing.assert_allclose(g, normalised(np.asarray(delta).sum(axes)), rtol=1e-6)


def test_layers_that_stay_dense_flow_by_their_magnitude_and_without_bias():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(4, name="a")(x))
            x = nn.relu(nn.DenseGeneral(5, name="b")(x))
            return nn.Dense(3, name="c")(x)

    x = jnp.zeros((1, 6))
    variables = randoms(Mixed(), x)
    fg = synflow(Mixed(), x, variables)
    expected = products([variables["params"][path]["kernel"] for path in "abc"])
    for path, at in (("a", 0), ("c", 2)):
        np.testing.assert_allclose(fg[path][0], expected[at][0], rtol=1e-6)
        np.testing.assert_allclose(fg[path][1], expected[at][1], rtol=1e-6)


def test_a_collapsed_layer_is_where_the_flow_wants_connections():
    model, x = MLP((4, 3, 2)), jnp.zeros((1, 5))
    variables = randoms(model, x)
    variables["params"]["b"]["kernel"][:] = 0
    fg = synflow(model, x, variables)
    assert all(np.isfinite(v).all() for pair in fg.values() for v in pair)
    assert {path for path, (f, g) in fg.items() if f.max() > 0 and g.max() > 0} == {"b"}


def test_resnet_56_has_a_finite_flow():
    # Its R is near 1e70 in dense He weights; nothing of it fits into float32.
    model = ResNet(56, 10)
    net = network(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), train=True)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), True), jax.random.key(0)
    )
    rng = np.random.default_rng(0)

    def he(path, a):
        if path[-1].key != "kernel":
            return np.full(a.shape, path[-1].key in ("scale", "var"), np.float32)
        return np.float32(rng.normal(size=a.shape) * np.sqrt(2 / np.prod(a.shape[:-1])))

    variables = jax.tree_util.tree_map_with_path(he, shapes)
    fg = heuristics.synflow(net)(state_of(variables))
    assert len(fg) == 56
    for f, g in fg.values():
        assert (np.isfinite(f) & (f > 0)).all()
        assert (np.isfinite(g) & (g > 0)).all()
        assert f.sum() == pytest.approx(1, abs=1e-5)
        assert g.sum() == pytest.approx(1, abs=1e-5)


def test_what_has_no_flow_is_pointed_to_grabo():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.LayerNorm()(nn.Dense(4)(x)))

    class Words(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Embed(7, 4)(x))

    x = jnp.ones((2, 5))
    with pytest.raises(ConfigError, match=r"not positively homogeneous .* use 'grabo'"):
        synflow(Normed(), x, randoms(Normed(), x))
    words = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ConfigError, match=r"takes int32 inputs.* use 'grabo'"):
        heuristics.synflow(network(Words(), words))
