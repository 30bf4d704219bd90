"""No layer falls below its floor; a layer that loses nearly all is told once."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst.connections.base import bits, row_salts
from dst.connections.hashing import salts
from dst.connections.masks import Masks
from dst.connections.select import lowest
from dst.layers import Dense
from dst.methods import DROPS, Drop, by_magnitude
from dst.methods.drop import looked_at, unprotected
from dst.methods.plan import floors, plan
from dst.training import train
from tests.arenas import hashed
from tests.test_train import small
from tests.tiny import active, kernels, loss, setup

WEAK = "Dense_0"  # holds most of the tiny network's connections


def run(name="set", seed=0, **options):
    """The parts of a tiny run whose layer `WEAK` has the smallest weights, and its rewire."""
    parts = setup(name, drop_fraction=0.9, every=2, end=40, seed=seed, **options)
    params = dict(parts.state.params)
    params[WEAK] = {**params[WEAK], "kernel": params[WEAK]["kernel"] * 1e-6}
    devices = jax.local_devices()[:1]
    step = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=devices)
    return parts, parts.state.replace(params=params), step


def test_floors_are_a_share_of_the_first_counts():
    parts = setup(sparsity=0.8, floor=0.29, distribution="erk")
    first = [*active(parts.state).values()]
    assert floors(parts.net, parts.method).tolist() == [29 * n // 100 for n in first]
    assert floors(parts.net, parts.method).dtype == np.int64
    # 0.29 * 100 is 28.999999999999996 in float64.
    assert floors(parts.net, parts.method._replace(sparsity=0.0))[-1] == 29
    assert floors(parts.net, parts.method._replace(floor=0.0)).tolist() == [0] * len(first)


@pytest.mark.parametrize(("name", "floor"), [("set", 0.01), ("rigl", 0.5), ("gse", 0.5)])
def test_the_weakest_layer_stops_at_its_floor(name, floor):
    """One rewire drops up to 90 % of K, nearly all of it from the weak layer if it may."""
    parts, state, step = run(name, floor=floor)
    l = [*state.masks].index(WEAK)
    least = int(floors(parts.net, parts.method)[l])
    new, report = step(state.replace(step=jnp.int32(2)), parts.batch)
    kept = {p: np.asarray(m) & np.asarray(new.masks[p]) for p, m in state.masks.items()}
    assert 0 < least == kept[WEAK].sum()
    floor_of = zip(kept.values(), floors(parts.net, parts.method), strict=True)
    assert all(k.sum() >= n for k, n in floor_of)
    # The strongest of the layer are the ones kept.
    w = np.abs(kernels(state.params, state)[WEAK])
    strongest = np.sort(w[np.asarray(state.masks[WEAK])])[-least:]
    np.testing.assert_array_equal(np.sort(w[kept[WEAK]]), strongest)
    assert int(report["pruned"]) == int(report["grown"])
    assert sum(active(new).values()) == sum(active(state).values())


def test_the_strongest_are_so_by_the_rules_own_strength():
    """A rule by which large weights are weak: its floor keeps the small ones."""
    parts, state, _ = run(floor=0.5)
    small_first = Drop(by_magnitude, floors=True, strength=lambda view: 1 / jnp.abs(view.w))
    DROPS.register("small_first", small_first)
    method = parts.method._replace(drop="small_first")
    step = dst.make_rewire(parts.net, parts.tx, method, loss, devices=jax.local_devices()[:1])
    new, _ = step(state.replace(step=jnp.int32(2)), parts.batch)
    DROPS.remove("small_first")
    for path, least in zip(state.masks, floors(parts.net, method), strict=True):
        mask = np.asarray(state.masks[path])
        w, kept = np.abs(kernels(state.params, state)[path])[mask], np.asarray(new.masks[path])
        assert kept[mask][np.argsort(w)[:least]].all()


@pytest.mark.parametrize("name", ["set", "gse"])
def test_without_a_floor_it_is_emptied(name):
    """The paper's rule; the same network."""
    parts, state, step = run(name)
    new, _ = step(state.replace(step=jnp.int32(2)), parts.batch)
    assert not (np.asarray(state.masks[WEAK]) & np.asarray(new.masks[WEAK])).any()


def test_what_the_floors_protect_is_not_dropped_whatever_is_asked():
    """With nearly all protected fewer are dropped, and as many grown."""
    parts, state, step = run(floor=0.9)
    asked = int(plan(parts.net, parts.method).grown[0])
    free = sum(active(state).values()) - int(floors(parts.net, parts.method).sum())
    new, report = step(state.replace(step=jnp.int32(2)), parts.batch)
    assert int(report["pruned"]) == int(report["grown"]) == free < asked
    least_of = dict(zip(state.masks, floors(parts.net, parts.method), strict=True))
    for path, mask in state.masks.items():
        least = least_of[path]
        assert (np.asarray(mask) & np.asarray(new.masks[path])).sum() == least


KEY = jax.random.key(5)


@jax.jit
def dropping(keep, weights, masks, k):
    """What no floor protects, and the k weakest of it."""
    layers = [Dense(f"Dense_{l}", (1, mask.size)) for l, mask in enumerate(masks)]
    A = Masks(layers, {layer.path: m[None] for layer, m in zip(layers, masks, strict=True)})
    w = jnp.concatenate(weights)
    view = looked_at(A, w, row_salts(A.parts, KEY), {})
    loose = unprotected(keep, view)
    return loose, lowest(bits(jnp.abs(view.w)), loose, k)


def oracle(masks, weights, keep, k):
    """The dropped (layer, position) by sorting: the k weakest that no floor protects."""
    free = []
    for l, (A, w) in enumerate(zip(masks, weights, strict=True)):
        salt = np.asarray(salts(KEY, l, A.size))  # a kernel of one row: of equals the lower hashes
        order = sorted(np.flatnonzero(A), key=lambda i: (-abs(w[i]), hashed(salt[i], 0)))
        free += [(abs(w[i]), l, i) for i in order[keep[l] :]]
    return {(l, i) for _, l, i in sorted(free)[:k]}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_drop_equals_a_stable_sort(data):
    """Few distinct weights, so that ties are the rule; floors of 0 and of everything included."""
    sizes = (5, 9, 4)
    draw = lambda values, n: np.array(data.draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    masks = [draw(st.booleans(), n) for n in sizes]
    weights = [
        draw(st.integers(-2, 2), n).astype(np.float32) * A
        for n, A in zip(sizes, masks, strict=True)
    ]
    keep = [data.draw(st.integers(0, int(A.sum()))) for A in masks]
    k = data.draw(st.integers(0, 18))
    loose, dropped = dropping(np.array(keep), weights, masks, jnp.int32(k))
    A = jnp.concatenate(masks)
    assert int(loose.sum()) == sum(int(mask.sum()) for mask in masks) - sum(keep)
    survivors = A & ~dropped
    found = np.flatnonzero(np.asarray(A & ~survivors))
    start = np.cumsum([0, *sizes])
    expected = {int(start[l] + i) for l, i in oracle(masks, weights, keep, k)}
    assert set(found.tolist()) == expected


# ------------------------------------------------------------------------------------- the sentence
def test_a_layer_that_loses_nearly_all_is_told_once(tmp_path, monkeypatch):
    """A whole run of three rewires, whose reports say that one layer holds 20, 19 and 18."""
    said, left = [], iter([20, 19, 18])
    monkeypatch.setattr(train.log, "say", said.append)
    make = train.make_steps

    def make_steps(*args):
        steps = make(*args)

        def rewire(state, resident):
            state, report = steps.rewire(state, resident)
            return state, {
                **report,
                "active": {**report["active"], "Dense_0": np.int32(next(left))},
            }

        return steps._replace(rewire=rewire)

    monkeypatch.setattr(train, "make_steps", make_steps)
    train.train(small(sparsity=0.9), tmp_path)
    told = [sentence for sentence in said if "--config.layer_floor" in sentence]
    assert len(told) == 1
    assert re.match(r"Layer Dense_0 has 20 of its first 205 connections .* step 10;", told[0])
    assert told[0].endswith(".") and "\n" not in told[0]
    assert next(left, None) is None
