"""Layers that keep their counts: drop and growth within each, planned exactly, alike in both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.methods import sample
from dst.methods.distributions import first_counts
from dst.methods.plan import plan
from dst.methods.schedules import portion
from tests import tiny
from tests.executions import ONE, both, check_arena, structure

RUNS = [
    # Of the larger layer arrivals are drawn, of the others all pairs are looked at.
    ("set", {"distribution": "uniform", "sparsity": 0.98}, "in chunks"),
    ("rigl", {"growth_memory": "streamed"}, ""),
    (
        "gse",
        {
            "sparsity_of": {"Dense_1": None},
            "floor": 0.3,
            "sparsity": 0.5,
            "subset_ratio": 3.0,
            "heuristic": "uniform",
        },
        "in chunks",
    ),
]


def counts(state) -> dict[str, int]:
    return {path: int(mask.sum()) for path, mask in structure(state).items()}


def uneven(state):
    """At step 2, the weights of the first layer much the weakest: it would lose all globally."""
    params = jax.tree.map(lambda w: w, state.params)
    if "arena" in params:
        mask = state.masks.rows < state.masks.parts[0].end
        values = params["arena"]["kernel"]
        params = {**params, "arena": {"kernel": jnp.where(mask, values * 1e-6, values)}}
    else:
        kernel = params["Conv_0"]["kernel"] * 1e-6
        params = {**params, "Conv_0": {**params["Conv_0"], "kernel": kernel}}
    return state.replace(params=params, step=jnp.int32(2))


@pytest.mark.parametrize(("name", "options", "chunks"), RUNS, ids=str)
def test_every_layer_keeps_its_count(monkeypatch, name, options, chunks):
    """Over two rewires, of each layer floor(p_t |A_l|) move; the executions choose the same."""
    if chunks == "in chunks":
        monkeypatch.setattr(sample, "LEAST", 16)
        monkeypatch.setattr(sample, "MOST", 16)
    given = {"distribution": "erk", "drop_fraction": 0.5, "keep_counts": True, **options}
    masks = []
    for s in both(name, **given):
        state, first = uneven(s.state), counts(s.state)
        planned = plan(s.net, s.method)
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
        for event in (0, 1):
            before = structure(state)
            state, report = rewire(state, tiny.batch(event))
            moved = {p: int((m & ~before[p]).sum()) for p, m in structure(state).items()}
            assert [*moved.values()] == planned.each[event].tolist()
            assert int(report["grown"]) == int(report["pruned"]) == planned.grown[event] > 0
            assert counts(state) == first == jax.device_get(report["active"])
            masks.append(structure(state))
            state = state.replace(step=jnp.int32(4))
        if s.net.execution == "sparse":
            check_arena(state, sum(first.values()))
    for one, other in zip(masks[:2], masks[2:], strict=True):
        for path, mask in one.items():
            np.testing.assert_array_equal(mask, other[path])


def test_it_is_planned_exactly():
    """|G_l| and |S_l| of each layer, at most what is inactive; a layer that is held has none."""
    s = tiny.setup(
        "gse", 0.5, distribution="erk", keep_counts=True, drop_fraction=0.9, subset_ratio=1.1
    )
    first, planned = first_counts(s.net, s.method), plan(s.net, s.method)
    inactive = [
        layer.size - n for layer, n in zip(s.net.layers.values(), first.values(), strict=True)
    ]
    p = 0.9 / 2 * (1 + np.cos(np.pi * 2 / 12))
    wanted = np.minimum([portion(p, n) for n in first.values()], inactive)
    np.testing.assert_array_equal(planned.each[0], wanted)
    np.testing.assert_array_equal(planned.grown, planned.each.sum(1))
    assert (wanted == inactive).any()
    sizes = [layer.size for layer in s.net.layers.values()]
    np.testing.assert_array_equal(planned.subset[0], np.minimum(np.ceil(1.1 * wanted), sizes))
    assert plan(s.net, s.method._replace(keep_counts=False)).each is None


def test_masked_rigl_takes_the_best_of_each_layer():
    """By an oracle: the weakest of each layer go, the largest |dL/dw| of what is inactive come."""
    s = tiny.setup("rigl", 0.7, distribution="erk", keep_counts=True, drop_fraction=0.4, norm=False)
    state = uneven(s.state)
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    after, _ = rewire(state, s.batch)
    apply = functools.partial(s.net.model.apply)

    def value(params):
        return tiny.loss(lambda x, train: apply({"params": params}, x, train=train), s.batch)[0]

    G = jax.grad(value)(state.params)
    for l, path in enumerate(s.net.layers):
        k = plan(s.net, s.method).each[0, l]
        A, w = np.asarray(state.masks[path]), np.abs(np.asarray(state.params[path]["kernel"]))
        g = np.where(A, -1, np.abs(np.asarray(G[path]["kernel"])))
        new = np.asarray(after.masks[path])
        assert w[A & ~new].max() <= w[A & new].min()
        assert g[new & ~A].min() >= g[~new & ~A].max(initial=0) and (new & ~A).sum() == k


def test_fewer_that_may_go_are_fewer_that_come():
    """Of a state whose first layer has fewer connections than were planned."""
    own = {"Conv_0": 0.95}
    s = tiny.setup("set", sparsity_of=own, drop_fraction=0.9)
    method = s.method._replace(keep_counts=True, sparsity_of=(("Conv_0", 0.2),), sparsity=0.7)
    rewire = dst.make_rewire(s.net, s.tx, method, tiny.loss, devices=ONE)
    state, report = rewire(uneven(s.state), s.batch)
    assert counts(state) == counts(s.state) and counts(state)["Conv_0"] == 5
    assert int(report["pruned"]) == int(report["grown"]) > 5


def test_nothing_moves_where_something_is_not_finite():
    s = tiny.setup("set", keep_counts=True)
    params = {
        **s.state.params,
        "Dense_1": jax.tree.map(lambda a: a * jnp.nan, s.state.params["Dense_1"]),
    }
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    state, report = rewire(s.state.replace(params=params), s.batch)
    assert not bool(report["finite"]) and int(report["grown"]) == int(report["pruned"]) == 0
    for path, mask in structure(state).items():
        np.testing.assert_array_equal(mask, structure(s.state)[path])


@pytest.mark.parametrize("name", ["snfs", "dsr", "deepr", "granet"])
def test_methods_that_cannot_are_refused(name):
    with pytest.raises(dst.ConfigError, match=rf"^keep_counts must be False for method '{name}'"):
        dst.method(name, keep_counts=True)
    with pytest.raises(dst.ConfigError, match=r"^keep_counts must be False for method 'gse': "):
        dst.method("gse", keep_counts=True, initial=0.5)
    with pytest.raises(dst.ConfigError, match=r"^keep_counts .* 'random', which does not read it"):
        dst.method("random", keep_counts=True)
