"""SNIP, GraSP and |GraSP| against integer oracles, finite differences and laws of batch norm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.masks import kernels_of, with_kernels
from dst.methods import before
from dst.methods.before import hessian_product, mean_on_devices, mean_over, objective
from dst.methods.memory import begun
from dst.start import prune_at_init
from tests.tiny import batch, setup
from tests.tiny import loss as tiny_loss


def one():
    """A single device."""
    return jax.local_devices()[:1]


def best(score, k):
    """Flat positions of the k largest."""
    return set(np.argsort(-np.asarray(score).ravel(), kind="stable")[:k].tolist())


def scores_of(parts, batches, name, temperature=1.0, devices=None, loss=tiny_loss):
    """The scores that `prune_at_init` ranks, in float64."""
    value = objective(parts.net, loss, temperature)
    mean = mean_on_devices(parts.state, batches, 2, devices or one(), None)
    scores = getattr(before, name)(value, kernels_of(parts.state.params, parts.state.masks), mean)
    return {path: np.asarray(score, np.float64) for path, score in scores.items()}


def joined(by_layer):
    return np.concatenate([np.ravel(leaf) for leaf in by_layer.values()])


# -------------------------------------------------------------------------------------- O1: batches
A = np.float64(
    [
        [[2, 1, 2, 2, -1], [1, 3, 2, 0, 2], [2, 2, 3, -1, 1], [2, 0, -1, 3, 2], [-1, 2, 1, 2, 1]],
        [[1, 1, -1, -2, 0], [1, 2, 2, 2, 0], [-1, 2, 2, 2, -1], [-2, 2, 2, 2, 0], [0, 0, -1, 0, 1]],
    ]
)
B = np.float64([[-1, 1, 2, 1, -1], [-1, 2, 1, -1, 0]])
THETA = np.float64([-1, 1, -1, -2, 3])


def quadratic(kernels, batch):
    """2 (1/2 th'A th - b'th): the mean of two such batches is the sum of the two losses."""
    A, b, w = batch[0][0], batch[1][0], kernels["w"]
    return w @ A @ w - 2 * b @ w


def oracle(name):
    """The score of O1 by the code that is used, in float64."""
    with jax.enable_x64(True):
        kernels = {"w": jnp.asarray(THETA)}
        batches = [(A[i : i + 1], B[i : i + 1]) for i in range(2)]
        return np.asarray(
            getattr(before, name)(quadratic, kernels, mean_over(kernels, lambda: batches))["w"]
        )


def test_o1_tells_every_wrong_order_of_sums_apart():
    g = A @ THETA - B
    Hg = A.sum(0) @ g.sum(0)
    wrong = {
        "abs before the sum": (np.abs(THETA * g).sum(0), [15, 12, 7, 6, 18], {0, 4}),
        "H_b g_b": (THETA * np.einsum("bij,bj->i", A, g), [11, -14, 44, 124, 84], {3, 4}),
        "sign flipped": (-THETA * Hg, [-26, 38, -49, -28, -15], {1, 4}),
    }
    right = {
        "snip": ([3, 2, 7, 6, 18], {2, 4}),
        "grasp": ([26, -38, 49, 28, 15], {2, 3}),
        "grasp_abs": ([26, 38, 49, 28, 15], {1, 2}),
    }
    for name, (expected, kept) in right.items():
        np.testing.assert_allclose(oracle(name), expected, rtol=1e-12)
        assert best(oracle(name), 2) == kept
    for score, expected, kept in wrong.values():
        np.testing.assert_array_equal(score, expected)
        assert best(score, 2) == kept
        assert all(kept != other for _, other in right.values())


# ---------------------------------------------------------------------------------- O2: temperature
class Matrix(nn.Module):
    """One matrix, no bias."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False)(x)


W = np.float32([[1, -1, 2], [2, 2, -1]])
DATA = np.float32([[-2, 1], [0, -2], [2, 1]]), np.int32([2, 1, 0])


def cross_entropy(apply, batch):
    return optax.softmax_cross_entropy_with_integer_labels(apply(batch[0]), batch[1]).mean(), {}


TEMPERED = {
    1.0: [-0.1390536612, 0.0250208131, 0.3281489485, -0.1803485142, 0.0348897437, -0.0727293853],
    200.0: [
        -7.3647032e-8, 7.5768674e-10, 1.48809438e-7, -5.4945147e-8, 1.11140296e-7, 2.80975747e-8,
    ],
}  # fmt: skip
KEPT = {
    ("grasp", 1.0): {1, 2, 4},
    ("grasp", 200.0): {2, 4, 5},
    ("grasp_abs", 1.0): {0, 2, 3},
    ("grasp_abs", 200.0): {0, 2, 4},
    ("snip", 200.0): {2, 4, 5},  # whatever the temperature: SNIP has none
}


def matrix_run(name, temperature):
    """(net, tx, method, state) of `Matrix` with the weights of O2, K = 3 of 6."""
    method = dst.method(name, 0.5, temperature=temperature)
    net, tx = dst.network(Matrix(), DATA[0]), optax.sgd(0.1, 0.9)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    return net, tx, method, state.replace(params=with_kernels(state.params, {"Dense_0": W}))


@pytest.mark.parametrize(("name", "temperature"), KEPT)
def test_o2_what_stays_at_either_temperature(name, temperature):
    run = matrix_run(name, temperature)
    state = prune_at_init(*run[:3], cross_entropy, run[3], [DATA], devices=one())
    assert set(np.flatnonzero(state.masks["Dense_0"]).tolist()) == KEPT[name, temperature]
    np.testing.assert_array_equal(
        state.params["Dense_0"]["kernel"], np.where(state.masks["Dense_0"], W, 0)
    )


@pytest.mark.parametrize("temperature", TEMPERED)
def test_o2_scores(temperature):
    net, _, _, state = matrix_run("grasp", temperature)
    value = objective(net, cross_entropy, temperature)
    mean = mean_on_devices(state, [DATA], True, one(), None)
    scores = before.grasp(value, kernels_of(state.params, state.masks), mean)
    expected = TEMPERED[temperature]
    np.testing.assert_allclose(
        joined(scores), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
    )


def test_the_temperatures_defaults_are_those_of_the_papers():
    assert dst.method("grasp").temperature == 200 and dst.method("grasp_abs").temperature == 1


def test_only_floats_are_cooled():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"logits": nn.Dense(3)(x), "count": jnp.int32(400)}

    def loss(apply, batch):
        outputs = apply(batch)
        assert outputs["count"].dtype == jnp.int32
        return outputs["count"] * jnp.sum(outputs["logits"]), {}

    net = dst.network(Counting(), DATA[0])
    method = dst.method("grasp", 0.5)
    state = dst.init_state(net, optax.sgd(0.1), method, jax.random.key(0))
    mean = mean_on_devices(state, [DATA[0]], False, one(), None)
    g = mean(jax.grad(objective(net, loss, 200.0)))["Dense_0"]
    np.testing.assert_allclose(g, np.tile(2 * DATA[0].sum(0)[:, None], 3), rtol=1e-6)


# ------------------------------------------------------------------------------------- P4, P5: laws
def test_hg_is_the_finite_difference_of_the_gradient():
    """P5, in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        kernels = {
            "a": jnp.asarray(rng.normal(size=(4, 6))),
            "b": jnp.asarray(rng.normal(size=(6, 3))),
        }
        data = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.integers(3, size=8))

        def value(kernels, batch):
            logits = jnp.tanh(batch[0] @ kernels["a"]) @ kernels["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        g = jax.grad(value)(kernels, data)
        Hg = jax.jit(hessian_product(value))(kernels, data, g)
        nudged = lambda e: jax.tree.map(lambda w, d: w + e * d, kernels, g)  # noqa: E731
        up, down = (jax.grad(value)(nudged(e), data) for e in (1e-5, -1e-5))
        for path in kernels:
            np.testing.assert_allclose(Hg[path], (up[path] - down[path]) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "power"), [("snip", 1), ("grasp_abs", 2)])
def test_the_scale_of_the_loss_changes_no_order(name, power):
    """P4: scores scale with the loss, GraSP's and |GraSP|'s with its square."""

    def quadruple(apply, batch):
        value, metrics = tiny_loss(apply, batch)
        return 4 * value, metrics

    parts = setup("grasp")
    once = scores_of(parts, [parts.batch], name)
    scaled = scores_of(parts, [parts.batch], name, loss=quadruple)
    for path, score in once.items():
        np.testing.assert_allclose(
            scaled[path], 4**power * score, rtol=1e-4, atol=1e-5 * np.abs(scaled[path]).max()
        )


# ----------------------------------------------------------------------------- P1: batch statistics
class Normed(nn.Module):
    """A convolution before batch norm: its filters have no scale."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(5)(nn.tanh(x).mean((1, 2)))


def sums_by_filter(temperature, train):
    """Of each filter: sum theta g, sum theta Hg, ||g||^2 and sum |theta g|."""

    def loss(apply, batch):
        logits = apply(batch[0], train=train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}

    net = dst.network(Normed(), batch(0)[0], train=False)
    method, tx = dst.method("grasp", 0.5), optax.sgd(0.1)
    state = dst.init_state(net, tx, method, jax.random.key(3))
    kernels = kernels_of(state.params, state.masks)
    value = objective(net, loss, temperature)
    mean = mean_on_devices(state, [batch(0), batch(1), batch(2, 8)], True, one(), None)
    g = mean(jax.grad(value))
    Hg = mean(hessian_product(value), g)
    w, g, Hg = (np.float64(tree["conv"]).reshape(-1, 6) for tree in (kernels, g, Hg))
    return (w * g).sum(0), (w * Hg).sum(0), (g**2).sum(0), np.abs(w * g).sum(0)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_batch_norm_in_train_mode_makes_filters_scale_free(temperature):
    """P1: sum theta g = 0 and sum theta (H g) = -||g||^2, of batches of different sizes too."""
    wg, wHg, gg, size = sums_by_filter(temperature, train=True)
    assert (np.abs(wg) < 1e-3 * size).all()
    np.testing.assert_allclose(wHg, -gg, rtol=2e-3)
    wg, wHg, gg, size = sums_by_filter(temperature, train=False)
    assert (np.abs(wg) > 1e-2 * size).any()
    assert (np.abs(wHg + gg) > 0.1 * gg).all()


# ------------------------------------------------------------------------ batches, devices, dropout
def test_how_examples_are_batched_changes_nothing():
    """Batches count by their examples: 16 and 12 + 4 are one data set."""
    x, y = batch(0, 16)
    parts = setup("grasp", norm=False)
    whole = joined(scores_of(parts, [(x, y)], "grasp"))
    split = joined(scores_of(parts, [(x[:12], y[:12]), (x[12:], y[12:])], "grasp"))
    np.testing.assert_allclose(split, whole, rtol=1e-3, atol=1e-5 * np.abs(whole).max())


def test_four_devices_score_as_one():
    """The last batches, smaller than the first, are cut on four devices: 7 to 4, 3 to nothing."""
    x, y = batch(0, 22)
    parts = setup("grasp", norm=False)
    four = [(x[:8], y[:8]), (x[8:15], y[8:15]), (x[15:18], y[15:18])]
    expected = joined(scores_of(parts, [(x[:12], y[:12])], "grasp"))
    got = joined(scores_of(parts, four, "grasp", devices=jax.local_devices()))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(8, name="a")(x))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="b")(Block(name="block")(x))


def test_dropout_is_off_while_scoring_and_on_afterwards():
    """T22."""
    x, y = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32), np.arange(8) % 3
    net, tx = dst.network(Dropping(), x), optax.sgd(0.1)
    method = dst.method("snip", 0.5)
    state = dst.init_state(net, tx, method, jax.random.key(0))

    def gradients(state, net=net):
        mean = mean_on_devices(state, [(x, y)], False, one(), None)
        return joined(mean(jax.grad(objective(net, cross_entropy, 1.0))))

    def plain(kernels):
        h = x @ kernels["block/a"] + state.params["block"]["a"]["bias"][None]
        logits = h @ kernels["b"] + state.params["b"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    expected = jax.grad(plain)(kernels_of(state.params, state.masks))
    expected = joined({path: expected[path] for path in state.masks})
    other = state.replace(key=jax.random.key(1))
    for _ in range(2):  # before the update compiles, and after
        np.testing.assert_allclose(gradients(state), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(gradients(state), gradients(other))
        update = dst.make_update(net, tx, cross_entropy, devices=one())
        losses = [float(update(begun(s), (x, y))[1]["loss"]) for s in (state, other)]
        assert losses[0] != losses[1]
