"""Optimizers that ask for more than a gradient, and those that keep an average of the weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import batch, loss, setup

import dst
from dst.connections.masks import Masks
from tests.executions import ONE, close, dense, structure

BOTH = pytest.mark.parametrize("execution", ["masked", "sparse"])


class Averaged(NamedTuple):
    average: optax.Params


def average_of_weights(decay: float) -> optax.GradientTransformation:
    """A user's own, last in a chain: decay average + (1 - decay) of the weights after the step."""

    def update(updates, state, params):
        after = optax.apply_updates(params, updates)
        return updates, Averaged(optax.incremental_update(after, state.average, 1 - decay))

    return optax.GradientTransformation(Averaged, update)


def run(tx, execution, steps=8, devices=ONE, each=lambda before, state, metrics: None):
    """The network and the last state; RigL's rewires, which both executions choose alike."""
    options = {"growth_memory": "streamed", "drop_fraction": 0.5}
    parts = setup("rigl", tx=tx, execution=execution, **options)
    update = dst.make_update(parts.net, tx, loss, devices=devices)
    rewire = dst.make_rewire(parts.net, tx, parts.method, loss, devices=devices)
    state = parts.state
    for step in range(steps):
        if dst.due(parts.method, step):
            before = state
            state, report = rewire(state, batch(step))
            assert int(report["grown"]) > 0
            each(before, state, None)
        before = state
        state, metrics = update(state, batch(step))
        each(before, state, metrics)
    return parts.net, state


def by_connection(state, tree) -> dict:
    """{connection: its entry} in a tree of the parameters' form."""
    kernels = dense(state, tree if isinstance(state.masks, Masks) else tree["arena"]["kernel"])
    return {
        (path, int(at)): kernels[path].ravel()[at]
        for path, mask in structure(state).items()
        for at in np.flatnonzero(mask)
    }


# ---------------------------------------------------------------------------------------- averages
@BOTH
@pytest.mark.parametrize("where", ["optimizer", "beside"])
def test_an_average_is_that_of_each_connections_own_weights(execution, where, tmp_path):
    """From when it was grown, with weight 0, through three rewires; kept apart in NumPy."""
    kept = {}  # the oracle: connection -> average
    own: list = []  # the average beside the state

    def each(before, state, metrics):
        if not kept:
            kept.update(by_connection(before, before.params))
            own.append(before.params)
        weights = by_connection(state, state.params)
        if metrics is None:
            assert kept.keys() - weights.keys() and weights.keys() - kept.keys()
            for gone in kept.keys() - weights.keys():
                del kept[gone]
            kept.update({new: np.float32(0) for new in weights.keys() - kept.keys()})
            own[0] = dst.carry(own[0], before, state)
        else:
            for one, weight in weights.items():
                kept[one] = np.float32(0.75) * kept[one] + np.float32(0.25) * weight
            own[0] = optax.incremental_update(state.params, own[0], 0.25)

    within = optax.chain(optax.sgd(0.1, 0.9), average_of_weights(0.75))
    tx = within if where == "optimizer" else optax.sgd(0.1, 0.9)
    net, state = run(tx, execution, each=each)
    average = state.opt_state[-1].average if where == "optimizer" else own[0]
    found = by_connection(state, average)
    assert found.keys() == kept.keys() and len(kept) > 100
    np.testing.assert_allclose(
        [*found.values()], [kept[one] for one in found], rtol=2e-6, atol=1e-8
    )

    x = batch(9)[0]
    logits = dst.predictor(net, state, params=average)(x)
    assert np.abs(logits - dst.predictor(net, state)(x)).max() > 1e-3
    dst.export(net, state, tmp_path / "mean.npz", params=average)
    close(dst.predictor(net, tmp_path / "mean.npz")(x), logits)
    close(net.model.apply(dst.load(tmp_path / "mean.npz"), x, train=False), logits, 1e-4)


def test_an_average_within_schedule_free_is_that_of_both_executions(tmp_path):
    """optax's own function of state.opt_state gives what is evaluated and written."""
    found = []
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9)
    for execution in ("masked", "sparse"):
        net, state = run(tx, execution, 5)
        mean = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
        found.append(dst.predictor(net, state, params=mean)(batch(9)[0]))
        assert np.abs(found[-1] - dst.predictor(net, state)(batch(9)[0])).max() > 1e-3
    close(*found, rtol=1e-3)


def test_what_is_no_average_of_these_parameters_is_told(tmp_path):
    parts, other = setup("set"), setup("set", execution="sparse").state
    sentence = r"^params must hold arrays at the paths of state\.params and in their shapes\.$"
    for params in (other.params, parts.state.opt_state, 3, jax.tree.leaves(parts.state.params)):
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.predictor(parts.net, parts.state, params=params)
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.export(parts.net, parts.state, tmp_path / "no.npz", params=params)
    with pytest.raises(dst.ConfigError, match=r"^source must be with params=, a state, not 'x\.np"):
        dst.predictor(parts.net, "x.npz", params=parts.state.params)
    with pytest.raises(dst.ConfigError, match=r"^source must be a state, or a file .*, not None\."):
        dst.predictor(parts.net, None)


# ---------------------------------------------------------------------------------- extra arguments
class Told(NamedTuple):
    value: jax.Array
    norm: jax.Array


def telling() -> optax.GradientTransformationExtraArgs:
    """Remembers what it is given."""

    def update(updates, state, params=None, *, value, grad, **more):
        assert not more
        return updates, Told(value, optax.tree.norm(grad))

    init = lambda params: Told(jnp.float32(0), jnp.float32(0))  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update)


@BOTH
def test_an_optimizer_is_given_the_loss_and_its_gradient(execution):
    """That of the whole batch on two devices, and through optax's own wrappers."""
    seen = []

    def each(before, state, metrics):
        if metrics is not None:
            told = state.opt_state[0].inner_state if execution == "masked" else state.opt_state[0]
            moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before.params))
            seen.append([told.value, metrics["loss"], told.norm, moved])

    first = optax.apply_if_finite(telling(), 3) if execution == "masked" else telling()
    run(optax.chain(first, optax.sgd(0.5)), execution, 2, jax.local_devices()[:2], each)
    value, said, norm, moved = np.array(seen).T
    np.testing.assert_array_equal(value, said)
    np.testing.assert_allclose(moved, 0.5 * norm, rtol=1e-4)


@BOTH
def test_the_rate_falls_on_a_plateau(execution):
    """As where the optimizer is given the same losses by hand."""
    plateau = lambda: optax.contrib.reduce_on_plateau(0.5, patience=2, rtol=0.3, cooldown=1)  # noqa: E731
    losses = []
    each = lambda before, state, metrics: losses.append(metrics) if metrics else None  # noqa: E731
    _, state = run(optax.chain(optax.sgd(1e-3), plateau()), execution, 8, each=each)
    alone, expected = plateau(), plateau().init(jnp.zeros(3))
    for metrics in losses:
        _, expected = alone.update(jnp.zeros(3), expected, value=metrics["loss"])
    assert 0 < float(expected.scale) < 1 and state.opt_state[1].scale == expected.scale


def test_accumulated_steps_hand_on_what_they_are_given():
    """optax.MultiSteps, itself and as a transformation."""
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    for tx in (optax.MultiSteps(inner, 2), optax.MultiSteps(inner, 2).gradient_transformation()):
        parts = setup("set", tx=tx)
        update = dst.make_update(parts.net, tx, loss, devices=ONE)
        state, first = update(parts.state, parts.batch)
        state, second = update(state, parts.batch)
        assert first["loss"] == second["loss"]  # one step of two
        assert state.opt_state.inner_opt_state[1].best_value == second["loss"]
