"""Batch normalisation over an axis that the user has named is over dst's devices."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from tests.executions import ONE, close

TX, TWO = optax.sgd(0.1, 0.9), jax.local_devices()[:2]
RNG = np.random.default_rng(3)
# Rows whose mean grows: the statistics of half of a batch are far from those of the whole.
X = RNG.normal(size=(8, 5, 5, 2)).astype(np.float32) + np.arange(8)[:, None, None, None]
X, Y = X.astype(np.float32), np.arange(8) % 3


class Net(nn.Module):
    """As flax's ImageNet ResNet names its axis."""

    axis_name: str | None = "batch"
    groups: tuple | None = None

    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(
            use_running_average=not train,
            axis_name=self.axis_name,
            axis_index_groups=self.groups,
            momentum=0.5,
        )
        x = nn.relu(norm(nn.Conv(6, (3, 3))(x))).mean((1, 2))
        return nn.Dense(3)(x)


def loss(apply, batch):
    logits = apply(batch[0], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}


def run(devices, execution="masked", train=False, **fields):
    """State after a rewire and two updates, and the network."""
    net = dst.network(Net(**fields), X[:1], train=train, execution=execution)
    method = dst.method("rigl", 0.5, every=1, end=9, growth_memory="streamed")
    state = dst.init_state(net, TX, method, jax.random.key(0))
    update = dst.make_update(net, TX, loss, devices=devices)
    for step in range(2):
        if step:
            state, report = dst.make_rewire(net, TX, method, loss, devices=devices)(state, (X, Y))
            assert int(report["grown"]) > 0
        state, _ = update(state, (X, Y))
    return net, state


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_statistics_on_two_devices_are_those_of_the_whole_batch(execution, tmp_path):
    """So are the weights; without the axis neither is."""
    (net, one), (_, two) = (run(devices, execution) for devices in (ONE, TWO))
    close((one.params, one.batch_stats), (two.params, two.batch_stats), 1e-4)
    _, apart = run(TWO, execution, axis_name=None)
    var = lambda state: np.asarray(state.batch_stats["batch_stats"]["BatchNorm_0"]["var"])  # noqa: E731
    assert np.abs(var(apart) / var(one) - 1).max() > 0.1
    dst.export(net, two, tmp_path / "net.npz")
    logits = dst.predictor(net, two)(X)
    close(dst.predictor(net, tmp_path / "net.npz")(X), logits)
    close(Net().apply(dst.load(tmp_path / "net.npz"), X, train=False), logits, 1e-4)


def test_on_one_device_it_is_plain_batch_normalisation():
    """The same bits, and in train mode the network is found and predicts too."""
    (net, named), (_, plain) = (run(ONE, train=True, axis_name=name) for name in ("batch", None))
    jax.tree.map(np.testing.assert_array_equal, named.params, plain.params)
    assert np.isfinite(dst.predictor(net, named, train=False)(X)).all()


def test_an_axis_of_the_models_own_stays_its_own():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            norm = nn.vmap(
                nn.BatchNorm,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name="views",
            )
            x = nn.Dense(6)(x.mean((1, 2)))
            views = jnp.stack([x, 3 * x])
            return nn.Dense(3)(norm(use_running_average=not train, axis_name="views")(views).sum(0))

    net = dst.network(Own(), X[:1])
    state = dst.init_state(net, TX, dst.method("dense", 0.0), jax.random.key(0))
    _, metrics = dst.make_update(net, TX, loss, devices=ONE)(state, (X, Y))

    @jax.jit
    def expected(params):
        variables = {"params": params, **state.batch_stats}
        logits, _ = Own().apply(variables, X, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    np.testing.assert_allclose(metrics["loss"], expected(state.params), rtol=1e-5)


class Averaging(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        y = nn.Dense(3)(x.mean((1, 2)))
        return y if self.is_initializing() else jax.lax.pmean(y, "batch")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: dst.network(Averaging(), X[:1]),
            r"^Averaging '' uses the axis 'batch', which ",
        ),
        (
            lambda: run(TWO, groups=((0,),)),
            r"^axis_index_groups of BatchNorm 'BatchNorm_0' must .*2 devices once, not \(\(0",
        ),
    ],
)
def test_what_no_axis_can_be_is_told(call, sentence):
    with pytest.raises(dst.ConfigError, match=sentence):
        call()
