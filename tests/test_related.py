"""Related methods, each against its source's rule by NumPy: SNFS, DSR, DeepR, ramps, ITOP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.config import default
from dst.methods.memory import TOLERANCE
from dst.methods.plan import plan
from dst.methods.schedules import cubic_sparsity, largest_remainder
from dst.methods.settings import method_of, resolve
from tests import tiny

ONE = jax.local_devices()[:1]


def flat(by_layer):
    return {path: np.asarray(leaf).ravel() for path, leaf in by_layer.items()}


def rewired(parts, state, step=2):
    """(masks before, masks after, report, state) of one rewire, flat."""
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, tiny.loss, devices=ONE)
    new, report = rewire(state.replace(step=jnp.int32(step)), parts.batch)
    return flat(state.masks), flat(new.masks), jax.device_get(report), new


def test_zhu_and_gupta():
    """O7: s_f = .8 in 4 updates; and the cubic at 98 %, t = 10000 of 46920."""
    s = [cubic_sparsity(t, 4, 0.0, 0.8) for t in range(5)]
    np.testing.assert_allclose(s, [0, 0.4625, 0.7, 0.7875, 0.8])
    assert [10 - round(10 * x) for x in s] == [10, 5, 3, 2, 2]
    assert cubic_sparsity(10_000, 46_920, 0.0, 0.98) == pytest.approx(0.50253984, abs=1e-8)
    assert cubic_sparsity(46_000, 46_920, 0.0, 0.98) == pytest.approx(0.97999261, abs=1e-8)


def test_pruning_is_global_and_only_drops():
    """The K_t largest of the network stay, the last rewire is at the end itself."""
    parts = tiny.setup("pruning", every=2, end=7)
    planned = plan(parts.net, parts.method)
    assert planned.steps.tolist() == [2, 4, 6, 7] and planned.grown.tolist() == [0] * 4
    assert [t for t in range(10) if dst.due(parts.method, t)] == [2, 4, 6, 7]
    _, after, report, _ = rewired(parts, parts.state)
    w = np.concatenate([*flat(tiny.kernels(parts.state.params, parts.state)).values()])
    order = np.argsort(-np.abs(w), kind="stable")[: planned.active[0]]
    assert set(np.flatnonzero(np.concatenate([*after.values()]))) == set(order)
    assert report["grown"] == 0 and report["pruned"] == w.size - planned.active[0]


def test_granet_prunes_and_regrows_in_one_step():
    """From its initial sparsity: what the ramp takes and p_t more go, p_t comes back."""
    parts = tiny.setup("granet", 0.8, every=2, end=8)
    planned = plan(parts.net, parts.method)
    before, after, report, _ = rewired(parts, parts.state)
    A = sum(m.sum() for m in before.values())
    assert A == parts.net.possible - round(0.5 * parts.net.possible)
    assert report["grown"] == planned.grown[0] > 0
    assert report["pruned"] == A - planned.active[0] + planned.grown[0]
    assert sum(m.sum() for m in after.values()) == planned.active[0] < A


def test_snfs():
    """Drops p of every layer, shares growth by mean |momentum|, grows the largest momentum."""
    parts = tiny.setup("snfs", norm=False, drop_fraction=0.5)
    rng = np.random.default_rng(0)
    momentum = {
        p: rng.normal(size=m.shape).astype(np.float32) * (n + 1)
        for n, (p, m) in enumerate(parts.state.masks.items())
    }
    own = parts.state.method | {"momentum": jax.tree.map(jnp.asarray, momentum)}
    state = parts.state.replace(method=own)
    before, after, report, _ = rewired(parts, state)
    p_t = 0.25 * (1 + np.cos(np.pi * 2 / 12))
    w, v = flat(tiny.kernels(state.params, state)), flat(momentum)
    dropped, means, room = {}, [], []
    for path, A in before.items():
        k = int(np.floor(p_t * A.sum()))
        order = sorted(np.flatnonzero(A), key=lambda i, w=w[path]: (abs(w[i]), i))
        dropped[path] = set(order[:k])
        means.append(np.abs(v[path][A]).mean())
        room.append(int((~A).sum()))
    total = sum(map(len, dropped.values()))
    counts = largest_remainder(total, [round(m * 2**30) for m in means], room)
    for (path, A), n in zip(before.items(), counts, strict=True):
        assert set(np.flatnonzero(A & ~after[path])) == dropped[path]
        best = sorted(np.flatnonzero(~A), key=lambda i, v=v[path]: (-abs(v[i]), i))[:n]
        assert set(np.flatnonzero(after[path] & ~A)) == set(best)
    assert report["pruned"] == report["grown"] == total


def test_snfs_decays_as_the_optimizer_does():
    """On the command line by the configured momentum; the paper's else."""
    config = default()
    config.method, config.momentum = "snfs", 0.5
    assert method_of(resolve(config), 1).momentum == 0.5 != dst.method("snfs").momentum == 0.9


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_snfs_follows_the_dense_gradient(options):
    """v <- mu v + g of every possible connection, the inactive ones not masked away."""
    parts, mu = tiny.setup("snfs", **options), options.get("momentum", 0.9)
    update = dst.make_update(parts.net, parts.tx, tiny.loss, devices=ONE)
    state, total = parts.state, None
    model, (x, y) = parts.net.model, parts.batch

    @jax.jit
    @jax.grad
    def gradient(params, stats):
        apply = lambda x, train: model.apply(  # noqa: E731
            {"params": params, **stats}, x, train=train, mutable=["batch_stats"]
        )[0]
        return tiny.loss(apply, (x, y))[0]

    for _ in range(2):
        g = tiny.kernels(gradient(state.params, state.batch_stats), state)
        total = g if total is None else {p: mu * total[p] + g[p] for p in g}
        state, _ = update(state, parts.batch)
    for path, v in state.method["momentum"].items():
        np.testing.assert_allclose(v, total[path], rtol=1e-4, atol=1e-6)
        assert np.abs(np.asarray(v)[~np.asarray(state.masks[path])]).max() > 0


@pytest.mark.parametrize(("H", "factor"), [(1e-9, 2.0), (10.0, 0.5)])
def test_dsr(H, factor):
    """All below H go, as many return in proportion to the survivors, and H adapts itself."""
    parts = tiny.setup("dsr")
    w = flat(tiny.kernels(parts.state.params, parts.state))
    before = flat(parts.state.masks)
    state = parts.state.replace(method={"threshold": jnp.float32(H)})
    _, after, report, new = rewired(parts, state)
    below = {p: A & (np.abs(w[p]) < H) for p, A in before.items()}
    count = sum(int(b.sum()) for b in below.values())
    assert report["pruned"] == report["grown"] == count
    assert float(new.method["threshold"]) == pytest.approx(H * factor)
    assert all(((before[p] & ~after[p]) == below[p]).all() for p in before)


def test_dsr_shares_growth_by_survivors_and_keeps_a_good_threshold():
    """H where the target would be met: it stays, and layers get their share."""
    parts = tiny.setup("dsr")
    w, before = flat(tiny.kernels(parts.state.params, parts.state)), flat(parts.state.masks)
    target = int(plan(parts.net, parts.method).grown[0])
    sizes = np.sort(np.concatenate([np.abs(w[p][A]) for p, A in before.items()]))
    H = float((sizes[target - 1] + sizes[target]) / 2)
    state = parts.state.replace(method={"threshold": jnp.float32(H)})
    _, after, report, new = rewired(parts, state)
    assert report["pruned"] == target and TOLERANCE < 1
    assert float(new.method["threshold"]) == pytest.approx(H)
    left = [int((A & (np.abs(w[p]) >= H)).sum()) for p, A in before.items()]
    shares = largest_remainder(target, left, [int((~A).sum()) for A in before.values()])
    assert [int((after[p] & ~A).sum()) for p, A in before.items()] == shares.tolist()


def test_deepr():
    """Whatever has left its own sign goes, wherever and however large; signs never change."""
    parts = tiny.setup("deepr")
    positive = flat(parts.state.method["positive"])
    before, w = flat(parts.state.masks), flat(tiny.kernels(parts.state.params, parts.state))
    assert all((positive[p][A] == (w[p][A] > 0)).all() for p, A in before.items())
    inactive = np.concatenate([positive[p][~A] for p, A in before.items()])
    assert 0.4 < inactive.mean() < 0.6
    params, crossed = dict(parts.state.params), {}
    for path, A in before.items():
        kernel = w[path].copy()
        crossed[path] = np.zeros_like(A)
        crossed[path][np.flatnonzero(A)[::5]] = True
        kernel[crossed[path]] *= -3
        shape = parts.state.masks[path].shape
        params[path] = {**params[path], "kernel": jnp.asarray(kernel.reshape(shape))}
    _, after, report, new = rewired(parts, parts.state.replace(params=params))
    for path, A in before.items():
        assert ((A & ~after[path]) == crossed[path]).all()
    assert report["grown"] == report["pruned"] == sum(int(c.sum()) for c in crossed.values())
    assert all((flat(new.method["positive"])[p] == positive[p]).all() for p in positive)


def test_itop_counts_what_was_ever_active():
    """The union of all masks, over all possible connections; it never shrinks."""
    parts = tiny.setup("itop", every=2)
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, tiny.loss, devices=ONE)
    state, ever = parts.state, flat(parts.state.masks)
    for step in (2, 4, 6):
        state, report = rewire(state.replace(step=jnp.int32(step)), tiny.batch(step))
        ever = {p: ever[p] | m for p, m in flat(state.masks).items()}
        share = sum(m.sum() for m in ever.values()) / parts.net.possible
        assert float(report["explored"]) == pytest.approx(share, rel=1e-6)
    assert share > 1 - dst.sparsity_of(state.masks)


def test_gse_v2_draws_as_many_as_are_active():
    """|S_l| = gamma |A_l| with the layer's own count, drawn once: fewer are realised."""
    parts = tiny.setup("gse_v2", 0.9)
    _, _, report, _ = rewired(parts, parts.state)
    assert report["subset_asked"] == sum(tiny.active(parts.state).values())
    assert 0 < report["subset_realised"] <= report["subset_asked"]
