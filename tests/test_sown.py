"""What a model sows is handed to the loss and never part of a state, which has one shape."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.initialised import init_rest
from dst.discovery import network
from dst.methods.before import cooled
from tests.executions import ONE

TX = optax.sgd(0.1)


class Sowing(nn.Module):
    """Sows twice as a tuple, once as a sum, beside batch statistics, a counter and a probe."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(24)(x)
        self.sow("losses", "l1", jnp.abs(h).mean())
        self.sow("losses", "l1", (h**2).mean())
        self.sow("totals", "l1", jnp.abs(h).sum(), init_fn=lambda: 0.0, reduce_fn=jnp.add)
        self.sow("batch_stats", "odd", h.mean())
        calls = self.variable("counters", "calls", lambda: jnp.int32(0))
        if train:
            calls.value += 1
        h = self.perturb("h", nn.BatchNorm(use_running_average=not train)(nn.relu(h)))
        return nn.Dense(10)(h)


def data(images=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(images, 8)).astype(np.float32), rng.integers(0, 10, images)


def entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def regularised(apply, batch):
    """Cross-entropy, and what was sown."""
    logits, sown = apply(batch[0], train=True, mutable=["losses", "totals"])
    assert list(sown) == ["losses", "totals"] and len(sown["losses"]["l1"]) == 2
    return entropy(logits, batch[1]) + sum(jax.tree.leaves(sown)), {}


def plain(apply, batch):
    return entropy(apply(batch[0], train=True), batch[1]), {}


def start(execution, name="gse", **options):
    net = dst.network(Sowing(), data(4)[0], execution=execution)
    method = dst.method(name, 0.7, every=2, end=9, **options)
    return net, method, dst.init_state(net, TX, method, jax.random.key(0))


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_state_keeps_its_shape_and_its_variables(execution, tmp_path):
    """Through updates, a rewire and a file; the batch is not that of the example."""
    net, method, state = start(execution)
    update = dst.make_update(net, TX, plain, devices=ONE)
    rewire = dst.make_rewire(net, TX, method, regularised, devices=ONE)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert set(state.batch_stats) == {"batch_stats", "counters"}
    assert set(state.batch_stats["batch_stats"]) == {"BatchNorm_0"}
    before = shapes(state)
    for step in range(3):
        if step == 2:
            state, report = rewire(state, data())
            assert int(report["grown"]) > 0
        state, _ = update(state, data())
        assert shapes(state) == before
    assert int(state.batch_stats["counters"]["calls"]) == 3
    assert np.abs(state.batch_stats["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
    dst.export(net, state, tmp_path / "net.npz")
    assert not {"losses", "totals", "perturbations"} & set(dst.load(tmp_path / "net.npz"))
    expected = dst.predictor(net, state)(data()[0])
    np.testing.assert_allclose(dst.predictor(net, tmp_path / "net.npz")(data()[0]), expected)


def test_the_loss_sees_what_is_sown_and_its_gradient():
    """One step of a regularised loss equals that of plain Flax, with every connection there."""
    net, _, state = start("masked", "dense")
    x, y = data()
    after, metrics = dst.make_update(net, TX, regularised, devices=ONE)(state, (x, y))

    def value(params):
        logits, new = Sowing().apply(
            {"params": params, **state.batch_stats},
            x,
            train=True,
            mutable=["losses", "totals", "batch_stats", "counters"],
        )
        sown = new["losses"], new["totals"]
        return entropy(logits, y) + sum(jax.tree.leaves(sown))

    loss, gradient = jax.jit(jax.value_and_grad(value))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    expected = optax.apply_updates(state.params, TX.update(gradient, TX.init(state.params))[0])
    for got, one in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-6)


def test_both_executions_take_the_same_step_of_a_regularised_loss():
    losses = []
    for execution in ("masked", "sparse"):
        net, _, state = start(execution)
        update = dst.make_update(net, TX, regularised, devices=ONE)
        for _ in range(2):
            state, metrics = update(state, data())
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_pruning_before_training_divides_logits_only_by_the_temperature():
    """GraSP's T belongs to the logits; what is sown reaches the loss as it is."""

    def loss(apply, batch):
        logits, sown = apply(batch[0], train=True, mutable=["losses"])
        return entropy(logits, batch[1]) + 0 * sum(jax.tree.leaves(sown)), {}

    seen = []

    def apply(x, mutable=False):
        return (8 * x, {"losses": 6 * x}) if mutable else 8 * x

    def probe(apply, batch):
        seen.append((apply(batch), apply(batch, mutable=["losses"])))
        return 0.0, {}

    cooled(probe, 2.0)(apply, np.float32(1))
    assert seen == [(4.0, (4.0, {"losses": 6.0}))]
    net, method, state = start("masked", "snip")
    pruned = dst.prune_at_init(net, TX, method, loss, state, [data()])
    assert dst.sparsity_of(pruned.masks) > 0.6


class Late(nn.Module):
    """A variable that only training makes."""

    @nn.compact
    def __call__(self, x, train=False):
        self.variable("seen", "always", lambda: 0.0)
        if train:
            self.variable("seen", "late", lambda: 0.0)
        return nn.Dense(10)(x)


def test_a_variable_that_only_the_loss_makes_is_refused():
    net = network(Late(), data()[0])
    state = dst.init_state(net, TX, dst.method("set", 0.5), jax.random.key(0))
    with pytest.raises(dst.ConfigError, match=r"the loss makes the model add 'seen/late'"):
        dst.make_update(net, TX, plain, devices=ONE)(state, data())
    assert set(init_rest(network(Late(), data()[0], train=True), jax.random.key(0))["seen"]) == {
        "always", "late"
    }  # fmt: skip


class Noisy(nn.Module):
    """Draws from a stream of its own, called as an argument of `dst` is."""

    @nn.compact
    def __call__(self, x, params=0.0):
        return nn.Dense(10)(x + params + jax.random.normal(self.make_rng("noise"), x.shape))


def test_a_loss_gives_the_model_streams_of_its_own_and_any_argument():
    net = network(Noisy(), data()[0])
    state = dst.init_state(net, TX, dst.method("set", 0.5), jax.random.key(0))

    def noisy(apply, batch):
        key = jax.random.key(1)
        return entropy(apply(batch[0], params=1.0, rngs={"noise": key}), batch[1]), {}

    _, metrics = dst.make_update(net, TX, noisy, devices=ONE)(state, data())
    logits = Noisy().apply(
        {"params": state.params}, data()[0], 1.0, rngs={"noise": jax.random.key(1)}
    )
    np.testing.assert_allclose(metrics["loss"], entropy(logits, data()[1]), rtol=1e-5)
