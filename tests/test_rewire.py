"""Laws and oracles of the rewire step: O4, P3; exact counts; what moves and what stays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import dst
from dst import rewire as rewire_module
from dst.connections.arena import positions
from dst.connections.base import Candidates, bits, lowest, row_salts
from dst.connections.hashing import salts
from dst.connections.masks import Masks
from dst.layers import Dense
from dst.methods.plan import plan
from dst.methods.schedules import largest_remainder
from tests.arenas import hashed
from tests.executions import structure
from tests.tiny import active, batch, kernels, loss, setup

METHODS = ["set", "rigl", "gse"]
KEY = jax.random.key(4)


@functools.partial(jax.jit, static_argnums=5)
def exchange(A, w, S, score, k, size):
    """Drop the k weakest of A, grow the k <= size best of S: (A without P, that with G)."""
    layer = Dense("layer", (A.size, 1))
    masks = Masks([layer], {"layer": A[:, None]})
    salt = row_salts(masks.parts, KEY)
    dropped = lowest(bits(jnp.abs(w)), masks.exists, k, lambda: masks.hashes(salt))
    found = Candidates(jnp.zeros_like(S), S, score)  # a layer of one output: S are the columns
    grown = rewire_module.best_candidates(found, k, size, salt)
    new, moves = masks.exchange(dropped, grown, k, salt)
    return moves.masks["layer"][:, 0], new["layer"][:, 0]


def rewired(parts, state=None, devices=None):
    """(state, report) after one rewire of the tiny network at step `every`."""
    state = parts.state if state is None else state
    state = state.replace(step=jnp.int32(parts.method.every))
    step = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=devices)
    return step(state, parts.batch)


def one():
    """A single device, so that float sums do not depend on how a batch is split."""
    return jax.local_devices()[:1]


# ---------------------------------------------------------------------------------------- exchange
W = np.array([0.9, -0.05, 0.4, 0, 0, 0.1, -0.7, 0.02, 0, 0], np.float32)
GRADIENT = np.array([0.3, 9, -0.2, -3, 0.5, 0.1, 0.4, 8, 0.2, -0.1], np.float32)
A = np.array([1, 1, 1, 0, 0, 1, 1, 1, 0, 0], bool)


def test_exchange_is_global_and_does_not_regrow():
    """O4: drops a2, b3 and grows a4, a5; per layer b4 would grow, with regrowth nothing."""
    S = np.flatnonzero(~A)
    survivors, new = exchange(A, W, S, np.abs(GRADIENT[S]), jnp.int32(2), 3)
    assert np.flatnonzero(A & ~survivors).tolist() == [1, 7]
    assert np.flatnonzero(new & ~A).tolist() == [3, 4]


def exchange_oracle(A, w, S, score, k):
    (salt,) = np.asarray(salts(KEY, 0, 1))  # a layer of one output: the column is the position
    order = sorted(np.flatnonzero(A), key=lambda i: (abs(w[i]), hashed(salt, i)))
    best = sorted(range(len(S)), key=lambda i: (-score[i], hashed(salt, S[i])))
    new = A.copy()
    new[order[:k]] = False
    new[[S[i] for i in best[:k]]] = True
    return new


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_exchange_equals_a_sort(data):
    """Ties by hash: few distinct weights and scores. The number of connections never changes."""
    n = 24
    A = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    w = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), np.float32)
    S = np.flatnonzero(~A).astype(np.int32)
    score = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.float32)[
        : len(S)
    ]
    k = data.draw(st.integers(0, min(6, A.sum(), len(S))))
    padded = np.pad(S, (0, n - len(S)))
    scores = np.pad(score, (0, n - len(S)), constant_values=-1)
    _, new = exchange(A, w * A, padded, scores, jnp.int32(k), 6)
    np.testing.assert_array_equal(new, exchange_oracle(A, w * A, S, score, k))
    assert new.sum() == A.sum()


# ---------------------------------------------------------------------------------------- the plan
def test_plan_holds_the_papers_numbers():
    """98 % of ResNet-56's 848,944: 46 events, |P| = floor(p_t K), |S| = 10 |P| split by |W_l|."""
    parts = setup(sparsity=0.98, every=1000, end=46_920)
    sizes = [layer.size for layer in parts.net.layers.values()]
    _, active, P, S = plan(parts.net, parts.method)
    K = sum(sizes) - round(0.98 * sum(sizes))
    t = np.arange(1000, 46_920, 1000)
    exact = 0.1 * (1 + np.cos(np.pi * t / 46_920)) * K
    np.testing.assert_array_equal(P[:-1], np.floor(exact))
    assert len(P) == 47 and P[-1] == 0 and (active == K).all()
    np.testing.assert_array_equal(S.sum(1), np.minimum(10 * P, sum(sizes)))
    np.testing.assert_array_equal(S[0], largest_remainder(10 * int(P[0]), sizes, sizes))


def test_due_is_every_period_until_the_end():
    """Never at step 0, never at or after the end, never for a static network."""
    method = dst.method("gse", every=1000, end=46_800)
    assert [t for t in range(0, 60_000, 500) if dst.due(method, t)] == [*range(1000, 46_800, 1000)]
    assert not dst.due(dst.method("random", every=10, end=100), 10)


# ---------------------------------------------------------------------------------- the whole step
@pytest.mark.parametrize("name", METHODS)
def test_laws_of_a_rewire(name):
    """K is constant, P and G are disjoint, grown weights and moments of P and G exactly 0."""
    parts = setup(name, heuristic="grabo") if name == "gse" else setup(name)
    update = dst.make_update(parts.net, parts.tx, loss, devices=one())
    state, _ = update(parts.state, parts.batch)
    before = state
    state, report = rewired(parts, state, one())
    moved = 0
    for path, mask in before.masks.items():
        old, new = np.asarray(mask), np.asarray(state.masks[path])
        grown, dropped = new & ~old, old & ~new
        w = kernels(state.params, state)[path]
        v = np.asarray(state.opt_state[1][0].trace[path]["kernel"])
        assert (w[~new | grown] == 0).all() and (v[~new | grown] == 0).all()
        kept = old & new
        np.testing.assert_array_equal(w[kept], kernels(before.params, before)[path][kept])
        np.testing.assert_array_equal(
            v[kept], np.asarray(before.opt_state[1][0].trace[path]["kernel"])[kept]
        )
        moved += grown.sum() - dropped.sum()
        assert int(report["active"][path]) == new.sum()
    assert moved == 0
    K = sum(active(before).values())
    grown = sum(
        (np.asarray(state.masks[p]) & ~np.asarray(m)).sum() for p, m in before.masks.items()
    )
    assert sum(active(state).values()) == K
    assert int(report["pruned"]) == int(report["grown"]) == grown
    assert grown == plan(parts.net, parts.method).grown[0] > 0
    chex.assert_trees_all_equal(before.batch_stats, state.batch_stats)


def gradients(parts, state):
    """dL/dw_eff of every possible connection by plain autodiff on the unwrapped model."""
    model, (x, y) = parts.net.model, parts.batch

    def value(params):
        variables = {"params": params, **state.batch_stats}
        logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return kernels(jax.grad(value)(state.params), state)


def brute_force(parts, allowed):
    """The masks after a rewire, by NumPy: `allowed` says which inactive connections may grow."""
    state = parts.state
    G = np.concatenate([g.ravel() for g in gradients(parts, state).values()])
    w = np.concatenate([k.ravel() for k in kernels(state.params, state).values()])
    A = np.concatenate([np.asarray(m).ravel() for m in state.masks.values()])
    S = np.flatnonzero(allowed & ~A)
    k = int(plan(parts.net, parts.method).grown[0])
    return exchange_oracle(A, w, S, np.abs(G[S]), k)


def test_rigl_equals_brute_force():
    """The k largest dense gradients among the inactive, the k smallest weights among the active."""
    parts = setup("rigl")
    state, _ = rewired(parts, devices=one())
    expected = brute_force(parts, True)
    got = np.concatenate([np.asarray(m).ravel() for m in state.masks.values()])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("heuristic", ["uniform", "grabo", "synflow", "graest"])
def test_all_inactive_candidates_equal_rigl(heuristic):
    """P3: S = everything inactive gives RigL's masks exactly, whatever the heuristic."""
    parts = setup("gse", heuristic=heuristic, subset_ratio=1000.0, norm=True)
    guided, report = rewired(parts, devices=one())
    rigl, _ = rewired(setup("rigl"), devices=one())
    chex.assert_trees_all_equal(guided.masks, rigl.masks)
    inactive = sum(m.size for m in guided.masks.values()) - sum(active(guided).values())
    assert int(report["subset_realised"]) == inactive


def test_ratio_one_equals_set_given_the_counts():
    """P3: with |S| = |P| all of S grows: |S_l| per layer as asked, whatever the gradients are."""
    parts = setup("gse", heuristic="uniform", subset_ratio=1.0)
    state, report = rewired(parts, devices=one())
    S = plan(parts.net, parts.method).subset
    grown = {
        path: (np.asarray(state.masks[path]) & ~np.asarray(m)).sum()
        for path, m in parts.state.masks.items()
    }
    assert list(grown.values()) == S[0].tolist()
    assert int(report["subset_asked"]) == int(report["subset_realised"]) == int(report["grown"])


def test_set_grows_every_inactive_connection_alike():
    """SET's law: uniform over all inactive connections of the network, by chi-square."""
    parts = setup("set")
    step = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=one())
    count, rounds = 0, 300
    for seed in range(rounds):
        state = parts.state.replace(step=jnp.int32(2), key=jax.random.key(seed))
        new, report = step(state, parts.batch)
        count = count + np.concatenate(
            [np.asarray(new.masks[p] & ~m).ravel() for p, m in parts.state.masks.items()]
        )
    A = np.concatenate([np.asarray(m).ravel() for m in parts.state.masks.values()])
    expected = rounds * int(report["grown"]) / (~A).sum()
    chi2 = ((count[~A] - expected) ** 2 / expected).sum()
    dof = (~A).sum() - 1
    assert count[A].sum() == 0
    assert abs(chi2 - dof) < 5 * np.sqrt(2 * dof)


def test_every_annealed_fraction_is_exact_and_compiles_once():
    """A whole run of events: |P_t| to the connection each time, one trace of the rewire."""
    parts = setup("gse", heuristic="grabo", drop_fraction=0.3, every=2, end=21)
    P = plan(parts.net, parts.method).grown
    traces = chex.assert_max_traces(n=1)
    chex.clear_trace_counter()
    body = rewire_module.rewire_body(parts.net, parts.tx, parts.method, loss)
    counted = jax.pmap(
        traces(lambda s, b: body(s, b, {})),
        axis_name="devices",
        in_axes=(None, 0),
        out_axes=None,
        devices=one(),
    )
    state = dst.update.replicate(parts.state, one())
    K = sum(active(state).values())
    for event, step in enumerate(range(2, 21, 2)):
        state = state.replace(step=dst.update.replicate(jnp.int32(step), one()))
        x, y = batch(step)
        state, report = counted(state, (x[None], y[None]))
        assert int(report["pruned"]) == int(report["grown"]) == P[event]
        assert sum(active(state).values()) == K


def narrowed(execution, alive):
    """A run whose only live candidates lead from `alive` of Dense_0's 20 units to the 5 classes.

    A constant of the batch norm stops every unit of the convolution: no error comes before it and
    no activation leaves it. Dense_0 lives by its biases.
    """
    parts = setup("gse", heuristic="grabo", execution=execution)
    params = dict(parts.state.params)
    params["BatchNorm_0"] = {"scale": jnp.zeros(6), "bias": -jnp.ones(6)}
    bias = jnp.where(jnp.arange(20) < alive, 1.0, -1.0)
    params["Dense_0"] = {**params["Dense_0"], "bias": bias}
    return parts._replace(state=parts.state.replace(params=params))


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_fewer_candidates_than_asked_drop_fewer(execution):
    """Dead units leave S less than |P|: all of it grows, and as many are dropped as grow."""
    parts = narrowed(execution, alive=2)
    P = int(plan(parts.net, parts.method).grown[0])
    old = structure(parts.state)
    free = ~old["Dense_1"][:2]
    state, report = rewired(parts, devices=one())
    new = structure(state)
    assert int(report["subset_realised"]) == free.sum() < P < int(report["subset_asked"])
    assert int(report["grown"]) == int(report["pruned"]) == free.sum() > 0
    grown = {path: new[path] & ~mask for path, mask in old.items()}
    assert (grown["Dense_1"][:2] == free).all() and sum(
        g.sum() for g in grown.values()
    ) == free.sum()
    dropped = sum((mask & ~new[path]).sum() for path, mask in old.items())
    assert dropped == free.sum() and bool(report["finite"])


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_layer_may_be_emptied(execution):
    """The convolution's weights are the smallest and nothing can grow there: it has none left."""
    parts = narrowed(execution, alive=20)
    state = parts.state.replace(params=faded(parts.state, "Conv_0"))
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=one())
    update = dst.make_update(parts.net, parts.tx, loss, devices=one())
    K = sum(mask.sum() for mask in structure(state).values())
    state, report = rewire(state.replace(step=jnp.int32(2)), parts.batch)
    assert int(report["active"]["Conv_0"]) == structure(state)["Conv_0"].sum() == 0
    assert int(report["dead_units"]["Conv_0"]) == 6 and bool(report["finite"])
    for step in range(2):  # with nothing left of it, steps and the next rewire go on
        state, metrics = update(state, batch(step))
        assert bool(metrics["finite"])
    state, report = rewire(state, parts.batch)
    assert int(report["grown"]) > 0 and bool(report["finite"])
    assert sum(mask.sum() for mask in structure(state).values()) == K


def faded(state, path):
    """The parameters with a layer's weights so small that they go first."""
    if isinstance(state.masks, Masks):
        kernel = state.params[path]["kernel"] * 1e-6
        return {**state.params, path: {**state.params[path], "kernel": kernel}}
    part = next(part for part in state.masks.parts if part.layer.path == path)
    here, _ = positions(state.masks, part)
    values = state.params["arena"]["kernel"]
    return {**state.params, "arena": {"kernel": values.at[here].multiply(1e-6)}}


def test_nan_is_reported():
    """A NaN score must not be grown in silence (top_k ranks NaN first)."""
    parts = setup("gse", heuristic="uniform")
    params = dict(parts.state.params)
    params["Dense_0"] = {**params["Dense_0"], "bias": jnp.full(20, jnp.nan)}
    _, report = rewired(parts, parts.state.replace(params=params), one())
    assert not bool(report["finite"])


def test_no_dense_gradient_in_guided_exploration():
    """The guided step never differentiates a kernel: no product of n_in x n_out is formed by it."""
    parts = setup("gse", heuristic="grabo")
    sizes = {m.size for m in parts.state.masks.values()}
    produced = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if (
                equation.primitive is lax.conv_general_dilated_p
                or equation.primitive.name == "dot_general"
            ):
                produced.update(v.aval.size for v in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    def trace(name):
        produced.clear()
        p = setup(name)
        step = dst.make_rewire(p.net, p.tx, p.method, loss, devices=one())
        walk(jax.make_jaxpr(step)(p.state, p.batch).jaxpr)
        return produced & sizes

    assert not trace("gse")
    assert trace("rigl")
