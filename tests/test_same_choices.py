"""From one state and key both executions drop and grow the same connections, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.connections.backends import cpp as kernels
from dst.methods import sample
from tests import tiny
from tests.executions import ADAMW, ONE, both, close, dense, structure

GUIDED = [("gse", {"heuristic": h}) for h in ("grabo", "synflow", "graest")]
EVERY = [
    *GUIDED,
    ("gse_v2", {}),  # uniform
    ("gse", {"sparsity": 0.5, "drop_fraction": 0.9, "subset_ratio": 3.0}),  # all that is inactive
    ("set", {}),
    ("rigl", {"growth_memory": "streamed"}),
]


# Layers that are drawn at once, and chunks so small that each layer takes many.
CHUNKS = [(name, options, "at once") for name, options in EVERY]
# In chunks all that is inactive is a case of test_keep_counts.
CHUNKS += [(*EVERY[n], "in chunks") for n in (0, 5)]


def rewired(s, tx=tiny.SGD):
    """A step, a rewire and a step: (state, the rewire's report)."""
    update = dst.make_update(s.net, tx, tiny.loss, devices=ONE)
    rewire = dst.make_rewire(s.net, tx, s.method, tiny.loss, devices=ONE)
    state, report = rewire(update(s.state, tiny.batch(1))[0], tiny.batch(2))
    return update(state, tiny.batch(3))[0], jax.device_get(report)


@pytest.mark.parametrize(("name", "options", "chunks"), CHUNKS, ids=str)
def test_the_choice_is_that_of_masked_execution(monkeypatch, name, options, chunks):
    """From the same state and key: the same S, P and G, and the same numbers reported."""
    if chunks == "in chunks":
        monkeypatch.setattr(sample, "LEAST", 64)
        monkeypatch.setattr(sample, "MOST", 64)
    runs = both(name, **options)
    (one, report), (other, sparse_report) = map(rewired, runs)
    assert int(report["grown"]) > 20 and report == sparse_report
    before, after = structure(runs[0].state), structure(one)
    for path, mask in structure(other).items():
        np.testing.assert_array_equal(mask, after[path])
    assert any((before[path] != mask).any() for path, mask in after.items())
    close(dense(one), dense(other))


def test_values_and_moments_are_the_same(tier):
    """Of dropped, grown and surviving connections, after a rewire and the step after it."""
    tx, floor = (ADAMW, 0.9) if tier == "pure" else (tiny.SGD, 0.0)
    masked, sparse = both("gse", tx, floor=floor)
    (one, report), (other, sparse_report) = rewired(masked, tx), rewired(sparse, tx)
    assert int(report["pruned"]) > 20 and report == sparse_report
    for path, mask in structure(one).items():
        np.testing.assert_array_equal(mask, structure(other)[path])
    close(dense(one), dense(other))
    vectors = [x for x in jax.tree.leaves(other.opt_state) if x.shape == (258,)]
    trees = jax.tree.leaves(one.opt_state, is_leaf=lambda x: isinstance(x, dict))
    for tree, vector in zip([t for t in trees if isinstance(t, dict)], vectors, strict=True):
        close(dense(one, tree), dense(other, vector))


@pytest.mark.parametrize(("name", "options"), [("gse", {}), ("rigl", EVERY[-1][1])], ids=str)
def test_without_any_gradient_the_hash_decides(name, options):
    """Ties of all scores and of many weights: the same choice in both executions."""
    after = []
    for s in both(name, heuristic="uniform", **options) if name == "gse" else both(name, **options):
        rewire = dst.make_rewire(
            s.net,
            s.tx,
            s.method,
            lambda apply, batch: (0 * tiny.loss(apply, batch)[0], {}),
            devices=ONE,
        )
        state = s.state.replace(params=jax.tree.map(jnp.round, s.state.params))
        state, report = rewire(state, s.batch)
        assert int(report["grown"]) > 20
        after.append(structure(state))
    for path, mask in after[0].items():
        np.testing.assert_array_equal(mask, after[1][path])


def test_the_choice_is_the_same_in_float64(monkeypatch):
    """Scores in float64 leave no ties: the connections are exactly those of the masked step."""
    masked, sparse = both("gse")
    monkeypatch.setattr(kernels, "available", lambda: False)
    wide = lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf  # noqa: E731
    after = []
    with jax.enable_x64(True):
        for s in (masked, sparse):
            state = s.state.replace(
                **{
                    f: jax.tree.map(wide, getattr(s.state, f))
                    for f in ("params", "opt_state", "batch_stats")
                }
            )
            rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
            batch = (tiny.batch(2)[0].astype(np.float64), tiny.batch(2)[1])
            after.append(structure(rewire(state, batch)[0]))
    for path, mask in after[0].items():
        np.testing.assert_array_equal(mask, after[1][path])


@pytest.mark.parametrize("name", ["set", "gse"])
def test_whole_numbers_stay_int32_where_x64_is_on(monkeypatch, name):
    """What arrives is counted in int32, which the kernels and the loops' carries ask for."""
    monkeypatch.setattr(sample, "LEAST", 64)
    monkeypatch.setattr(sample, "MOST", 64)
    s = tiny.setup(name, execution="sparse", sparsity=0.95)
    with jax.enable_x64(True):
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
        _, report = rewire(s.state.replace(step=jnp.int32(2)), s.batch)
    assert int(report["grown"]) == int(report["pruned"]) > 0
