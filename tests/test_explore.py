"""The rewire of sparse execution: the choice of the masked one, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.methods import subset
from dst.methods.heuristics import HEURISTICS, marginals_of
from dst.methods.plan import plan
from dst.update import parallel, run_loss, split_batch
from tests import tiny
from tests.executions import ONE, both, check_arena, close, dense, structure

GUIDED = [("gse", {"heuristic": h}) for h in ("uniform", "grabo", "synflow", "graest")]


@pytest.mark.parametrize("heuristic", ["uniform", "grabo", "synflow", "graest"])
def test_the_marginals_are_the_same(heuristic, tier):
    """f and g of the masked pass, each up to its own scale."""
    found = []
    for s in both(heuristic=heuristic):
        measure = marginals_of(s.net, tiny.loss, HEURISTICS[heuristic])
        if HEURISTICS[heuristic].on_host:
            found.append(measure(s.state, s.batch))
        else:
            on_device = parallel(measure, (None, 0), ONE)
            found.append(on_device(s.state, split_batch(s.batch, ONE)))
    close(found[0], found[1])


@pytest.mark.parametrize("heuristic", ["uniform", "grabo", "synflow", "graest"])
def test_units_that_are_held_give_the_same_marginals(heuristic):
    """What a rewire finds from h and delta where it holds them, and from sums where it does not."""
    found = []
    for s in both(heuristic=heuristic):
        fg = {p: (jnp.ones(layer.n_in), jnp.ones(layer.n_out)) for p, layer in s.net.layers.items()}

        def seen(state, batch, s=s, fg=fg):
            value = lambda extra: run_loss(s.net, tiny.loss, state.params, state, batch, extra)[0]  # noqa: E731
            later = subset.scored_later(s.net, s.method, state.masks)
            return subset.observed(s.net, s.method, state, later, value, fg)[1]

        found.append(parallel(seen, (None, 0), ONE)(s.state, split_batch(s.batch, ONE)))
    close(found[0], found[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [("set", {}), *GUIDED],
    ids=str,
)
def test_laws_of_a_rewire(name, options, tier):
    """K stays; |P| = |G| = planned; survivors keep value and moment; what is grown starts at 0."""
    s = tiny.setup(name, execution="sparse", **options)
    update = dst.make_update(s.net, s.tx, tiny.loss, devices=ONE)
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    state, K = s.state, s.state.masks.column.size
    for event in range(5):
        for step in range(2):
            state, _ = update(state, tiny.batch(2 * event + step))
        before, momentum = state, jax.tree.leaves(state.opt_state)
        state, report = rewire(state, tiny.batch(event))
        check_arena(state, K)
        P = int(plan(s.net, s.method).grown[event])
        assert int(report["pruned"]) == int(report["grown"]) == P and bool(report["finite"])
        asked, realised = int(report["subset_asked"]), int(report["subset_realised"])
        assert 0.98 * asked <= realised <= asked and asked >= P
        assert {p: int(n) for p, n in report["active"].items()} == {
            p: m.sum() for p, m in structure(state).items()
        }
        index = next(i for i, leaf in enumerate(momentum) if leaf.shape == (K,))
        old, new = dense(before), dense(state)
        old_m, new_m = (
            dense(before, momentum[index]),
            dense(state, jax.tree.leaves(state.opt_state)[index]),
        )
        had, has = structure(before), structure(state)
        dropped = np.concatenate([np.abs(old[p][had[p] & ~has[p]]) for p in old])
        kept = np.concatenate([np.abs(old[p][had[p] & has[p]]) for p in old])
        assert dropped.size == P and dropped.max() <= kept.min()
        for path, mask in has.items():
            stays, grown = mask & had[path], mask & ~had[path]
            np.testing.assert_array_equal(new[path][stays], old[path][stays])
            np.testing.assert_array_equal(new_m[path][stays], old_m[path][stays])
            assert not new[path][grown].any() and not new_m[path][grown].any()


def test_devices_agree_and_take_the_step_of_one():
    """Four devices: structure and values bitwise equal on all, the connections of one device."""
    ends = []
    for devices in (ONE, jax.local_devices()):
        s = tiny.setup("gse", norm=False, execution="sparse")
        update = dst.make_update(s.net, s.tx, tiny.loss, devices=devices)
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=devices)
        state, _ = update(s.state, tiny.batch(0))
        ends.append(update(rewire(state, tiny.batch(1))[0], tiny.batch(2))[0])
    for leaf in jax.tree.leaves((ends[1].masks, ends[1].params, ends[1].opt_state)):
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(copies) == 4 and len(set(copies)) == 1
    for path, mask in structure(ends[0]).items():
        np.testing.assert_array_equal(mask, structure(ends[1])[path])
    close(dense(ends[0]), dense(ends[1]), 1e-4)


def test_one_compilation_for_a_whole_run():
    """Connections move between layers, the compiled functions stay."""
    s = tiny.setup("gse", execution="sparse")
    traces = []

    def loss(apply, batch):
        traces.append(1)
        return tiny.loss(apply, batch)

    update = dst.make_update(s.net, s.tx, loss)
    rewire = dst.make_rewire(s.net, s.tx, s.method, loss)
    state, first = s.state, None
    for step in range(10):
        if dst.due(s.method, step):
            state, report = rewire(state, tiny.batch(step))
            first = first or len(traces)
        state, _ = update(state, tiny.batch(step))
    assert len(traces) == first
    assert jax.device_get(report["active"]) != jax.device_get(
        dict(zip(report["active"], s.state.masks.counts(), strict=False))
    )


def test_nan_is_reported():
    """A NaN input makes the update and the rewire say so."""
    s = tiny.setup("gse", execution="sparse")
    bad = (np.full_like(s.batch[0], np.nan), s.batch[1])
    assert not bool(dst.make_update(s.net, s.tx, tiny.loss, devices=ONE)(s.state, bad)[1]["finite"])
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    assert not bool(rewire(s.state, bad)[1]["finite"])
