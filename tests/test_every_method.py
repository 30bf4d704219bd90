"""What holds for every method: counts, zeros, traces, replicas, resuming, an empty layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.config import default, validate
from dst.methods import lottery
from dst.methods.distributions import active_count, first_counts
from dst.methods.plan import plan
from dst.methods.table import METHODS
from dst.training import checkpoint
from dst.update import replicate
from tests import tiny
from tests.executions import ONE
from tests.test_parallel import shards_equal

SPARSITY, STEPS, EVERY, END = 0.8, 9, 2, 7  # rewires at 2, 4 and 6; ramps end at 7
SPARSE = ("dense", "random", "set", "gse", "gse_v2")  # in sparse execution; and a streamed rigl


class Run(NamedTuple):
    """A method's run on four devices, and what to do it again with."""

    method: dst.Method
    net: dst.Network
    states: list[Any]  # after each step, on the host
    reports: dict[int, Any]  # by step
    last: Any  # the last state, on the devices
    go_on: Any  # (state, first step) -> the rest of the run
    traces: tuple[int, int]  # of the loss, after the first rewire and at the end


def first_state(net, tx, method, loss, key):
    """The network before its first step, pruned or rewound if the method does that."""
    state = dst.init_state(net, tx, method, key)
    if method.before:
        return dst.prune_at_init(net, tx, method, loss, state, [tiny.batch(1), tiny.batch(2)])
    if method.name == "lottery":
        trained = state.replace(params=jax.tree.map(lambda p: p * 1.5, state.params))
        return lottery.ticket(net, tx, method, key, lottery.winning(net, trained, SPARSITY))
    # So few steps bring no weight below the threshold or to the other side of 0.
    if method.drop == "threshold":
        return state.replace(method={**state.method, "threshold": jnp.float32(0.1)})
    if method.drop == "sign":
        positive = {
            path: sign.at[..., 0].set(~sign[..., 0])
            for path, sign in state.method["positive"].items()
        }
        return state.replace(method={**state.method, "positive": positive})
    return state


@pytest.fixture(scope="module", params=list(METHODS))
def run(request) -> Run:
    calls = []

    def loss(apply, batch):
        calls.append(1)
        return tiny.loss(apply, batch)

    method = dst.method(request.param, SPARSITY, every=EVERY, end=END)
    if method.score and method.drop != "sign":  # the others do not read it
        method = dst.method(request.param, SPARSITY, every=EVERY, end=END, drop_fraction=0.3)
    net = dst.network(tiny.Classifier(), tiny.IMAGE, train=False)
    start = first_state(net, tiny.SGD, method, loss, jax.random.key(0))
    update = dst.make_update(net, tiny.SGD, loss)
    rewire = dst.make_rewire(net, tiny.SGD, method, loss) if method.moves else None
    states, reports, seen = [jax.device_get(start)], {}, []

    def go_on(state, step, keep=False):
        for t in range(step, STEPS):
            if dst.due(method, t):
                state, report = rewire(state, tiny.batch(t))
                if keep:
                    reports[t] = jax.device_get(report)
            state, _ = update(state, tiny.batch(t))
            if keep:
                states.append(jax.device_get(state))
                seen.append(len(calls))
        return state

    last = go_on(replicate(start), 0, keep=True)
    return Run(method, net, states, reports, last, go_on, (seen[EVERY], seen[-1]))


def test_counts_are_exact_at_every_step(run):
    """K, or what the ramp wants after its last event, to the connection."""
    planned = plan(run.net, run.method)
    possible = run.net.possible
    K = active_count(possible, run.method.sparsity)
    for t, state in enumerate(run.states):
        passed = [n for n, step in enumerate(planned.steps) if step < t]
        expected = K
        if run.method.ramps:
            first = sum(first_counts(run.net, run.method).values())
            expected = planned.active[passed[-1]] if passed else first
        assert sum(tiny.active(state).values()) == expected, t
    assert sum(tiny.active(run.states[-1]).values()) == K


def test_what_is_inactive_is_zero_at_every_step(run):
    """Weights and momentum, exactly, from the first state on; and none of it is NaN."""
    for state in run.states:
        for path, mask in state.masks.items():
            for tree in (state.params, state.opt_state[1][0].trace):
                leaf = np.asarray(tree[path]["kernel"])
                assert (leaf[~np.asarray(mask)] == 0).all() and np.isfinite(leaf).all()


def test_rewires_report_what_they_did(run):
    """|P| and |G| are those of the masks; P and G are disjoint; nothing moves without an event."""
    for t, (before, after) in enumerate(zip(run.states, run.states[1:], strict=False)):
        old, new = (np.concatenate([m.ravel() for m in s.masks.values()]) for s in (before, after))
        assert ((t in run.reports) and run.method.moves) or (old == new).all()
        if t in run.reports:
            report = run.reports[t]
            assert (old & ~new).sum() == report["pruned"] and (new & ~old).sum() == report["grown"]
            assert report["finite"] and report["active"] == tiny.active(after)
    moved = {t: int(report["pruned"]) for t, report in run.reports.items()}
    assert [*moved] == ([2, 4, 6] + [7] * run.method.ramps if run.method.moves else [])
    assert all(count > 0 for t, count in moved.items() if t < 6), moved


def test_one_trace_each(run):
    """After the first rewire nothing is traced again, whatever the counts become."""
    assert run.traces[0] == run.traces[1]


def test_replicas_are_equal(run):
    """Four devices hold the same bits, the method's own memory included."""
    shards_equal(run.last)


def test_resuming_is_bitwise(run, tmp_path):
    """A checkpoint of step 5, just after a rewire and between two of them, ends the same."""
    manager = checkpoint.open_manager(tmp_path, 2)
    checkpoint.save(manager, run.states[5], {"config": {}})
    like = replicate(jax.tree.map(jnp.asarray, run.states[0]))
    restored, _ = checkpoint.restore(manager, like, {})
    ends = [jax.tree.leaves(jax.device_get(s)) for s in (run.go_on(restored, 5), run.last)]
    for a, b in zip(*ends, strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_empty_layer_survives(run):
    """Without a single connection in one layer nothing becomes NaN, through rewires too."""
    start = run.states[0]
    layer = "Dense_0"
    empty = np.zeros_like(start.masks[layer])
    params = {**start.params, layer: {**start.params[layer], "kernel": empty * np.float32(0)}}
    state = start.replace(params=params, masks=start.masks.but({layer: empty}))
    state = jax.device_get(run.go_on(replicate(jax.tree.map(jnp.asarray, state)), 0))
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) > 10 and all(np.isfinite(x).all() for x in floats)
    for path, mask in state.masks.items():
        assert (np.asarray(state.params[path]["kernel"])[~np.asarray(mask)] == 0).all()


def asked_in_sparse(net, method):
    """What each of those who know method and execution says, or that it runs."""
    config = default()
    config.update(method=method.name, sparsity=SPARSITY, execution="sparse")
    config.growth_memory = method.growth_memory
    asked = [
        lambda: dst.init_state(net, tiny.SGD, method, jax.random.key(0)),
        lambda: validate(config),
    ]
    if method.moves:
        asked.append(lambda: dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE))
    for ask in asked:
        try:
            ask()
        except dst.ConfigError as error:
            yield str(error)
        else:
            yield "runs"


def test_sparse_execution_does_the_same_or_refuses(run):
    """Plan, counts and report of every event; or one sentence, the same whoever is asked."""
    method = run.method
    net = dst.network(tiny.Classifier(), tiny.IMAGE, train=False, execution="sparse")
    if method.name not in SPARSE:
        (sentence,) = {*asked_in_sparse(net, method)}
        assert sentence.startswith(f"method {method.name!r} cannot run in execution 'sparse', ")
        assert sentence.endswith("execution 'masked'.")
        if method.name != "rigl":
            return
        method = method._replace(growth_memory="streamed")
    assert {*asked_in_sparse(net, method)} == {"runs"}
    for one, other in zip(plan(run.net, run.method), plan(net, method), strict=True):
        np.testing.assert_array_equal(one, other)
    state = dst.init_state(net, tiny.SGD, method, jax.random.key(0))
    update = dst.make_update(net, tiny.SGD, tiny.loss, devices=ONE)
    K, reports = state.masks.column.size, {}
    rewire = (
        dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE) if method.moves else None
    )
    assert K == sum(tiny.active(run.states[0]).values())
    assert dst.sparsity_of(state.masks) == dst.sparsity_of(run.states[0].masks)
    for t in range(STEPS if method.moves else 1):
        if dst.due(method, t):
            state, reports[t] = rewire(state, tiny.batch(t))
        state, metrics = update(state, tiny.batch(t))
        assert metrics["finite"]
    assert reports.keys() == run.reports.keys()
    for t, report in run.reports.items():
        ours = jax.device_get(reports[t])
        assert ours.keys() == report.keys() and ours["finite"]
        assert sum(ours["active"].values()) == sum(report["active"].values()) == K
        for count in ("pruned", "grown", "subset_asked"):
            assert ours[count] == report[count], (t, count)
