"""An average of the parameters that follows its connections through rewires, in both executions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SGD, batch, loss, setup

import dst
from dst.connections.masks import Masks
from tests.executions import ONE, close, dense, structure

EXECUTIONS = ("masked", "sparse")
IMAGES = batch(7)[0]


@functools.cache
def run(execution: str):
    """A rewire every second step, RigL's: both executions choose the same connections."""
    parts = setup("rigl", drop_fraction=0.5, growth_memory="streamed", execution=execution)
    rewire = dst.make_rewire(parts.net, SGD, parts.method, loss, devices=ONE)
    return parts, dst.make_update(parts.net, SGD, loss, devices=ONE), rewire


@functools.cache
def averaged(execution: str):
    """State and average after ten steps and four rewires; the states around the last of them."""
    parts, update, rewire = run(execution)
    state, average = parts.state, parts.state.params
    around = ()
    for step in range(10):
        if dst.due(parts.method, step):
            before = state, average
            state, report = rewire(state, batch(step))
            average = dst.carry(average, before[0], state)
            assert int(report["grown"]) > 0
            around = (*before, state, average)
        state, _ = update(state, batch(step))
        average = optax.incremental_update(state.params, average, 0.25)
    return state, average, around


def entries(state, tree):
    """{connection: its entry} of every connection of a state."""
    kernels = dense(state, tree if isinstance(state.masks, Masks) else tree["arena"]["kernel"])
    return {
        (path, int(at)): kernels[path].ravel()[at]
        for path, mask in structure(state).items()
        for at in np.flatnonzero(mask)
    }


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_average_stays_with_its_connection(execution):
    """What was dropped is forgotten, what is grown begins at 0, all else is the same bits."""
    _, _, (before, average, after, carried) = averaged(execution)
    old, new = entries(before, average), entries(after, carried)
    kept, grown = old.keys() & new.keys(), new.keys() - old.keys()
    assert len(grown) > 10 and len(kept) > 100
    assert all(new[at] == old[at] for at in kept) and all(new[at] == 0 for at in grown)
    assert sum(value != 0 for value in old.values()) > len(kept)  # what there was to forget
    # Nor does it begin with what a tree holds where nothing was.
    ones = dst.carry(jax.tree.map(jnp.ones_like, average), before, after)
    assert {at for at, value in entries(after, ones).items() if value} == kept
    biases = [[tree[path]["bias"] for path in ("Conv_0", "Dense_0")] for tree in (average, carried)]
    jax.tree.map(np.testing.assert_array_equal, *biases)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_average_is_a_network(execution, tmp_path):
    """Of at most K connections, that predicts as its exported file does."""
    state, average, _ = averaged(execution)
    net = run(execution)[0].net
    K = sum(mask.sum() for mask in structure(state).values())
    kernels = dense(state, average if execution == "masked" else average["arena"]["kernel"])
    assert K / 2 < sum(np.count_nonzero(kernel) for kernel in kernels.values()) <= K
    mean = state.replace(params=average)
    dst.export(net, mean, tmp_path / "mean.npz")
    one, other = (dst.predictor(net, source)(IMAGES) for source in (mean, tmp_path / "mean.npz"))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - dst.predictor(net, state)(IMAGES)).max() > 1e-3


def test_an_average_is_the_same_in_both_executions():
    """Ten steps and four rewires: the same connections, the same average of each."""
    (one, mean, _), (other, theirs, _) = map(averaged, EXECUTIONS)
    a, b = entries(one, mean), entries(other, theirs)
    assert a.keys() == b.keys()
    np.testing.assert_allclose([*a.values()], [b[at] for at in a], rtol=1e-3, atol=1e-5)
    close(*(dst.predictor(run(e)[0].net, averaged(e)[0].replace(params=averaged(e)[1]))(IMAGES)
            for e in EXECUTIONS), rtol=1e-3)  # fmt: skip


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_any_tree_at_the_paths_of_the_parameters(execution):
    """optax's own average with its counter, and bfloat16; without a rewire nothing changes."""
    _, _, (before, average, after, carried) = averaged(execution)
    kept = optax.EmaState(jnp.int32(3), jax.tree.map(lambda a: a.astype(jnp.bfloat16), average))
    moved = dst.carry({"mine": [kept]}, before, after)["mine"][0]
    assert moved.count == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), moved.ema, carried
    )
    jax.tree.map(np.testing.assert_array_equal, dst.carry(average, before, before), average)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_cannot_follow_is_told(execution):
    _, _, (before, average, after, _) = averaged(execution)
    sentence = r"^tree must hold arrays at the paths of state\.params and in their shapes\.$"
    for tree in (jax.tree.leaves(average), {"bias": jnp.zeros(3)}, {}, average["Dense_0"]):
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.carry(tree, before, after)
    other = averaged("masked" if execution == "sparse" else "sparse")[0]
    fewer = setup("random", 0.9, execution="sparse").state
    for state in (other, fewer):
        with pytest.raises(dst.ConfigError, match=r"^before and after must be the states of one "):
            dst.carry(average, before, state)
