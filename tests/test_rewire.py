"""Laws and oracles of the rewire step: O4, P3; exact counts; what moves and what stays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dst
from dst import rewire as rewire_module
from dst.connections.arena import positions
from dst.connections.masks import Masks
from dst.methods.plan import plan
from tests.executions import structure
from tests.test_exchange import exchange_oracle
from tests.tiny import active, batch, kernels, loss, setup

METHODS = ["set", "rigl", "gse"]
KEY = jax.random.key(4)


def rewired(parts, state=None, devices=None):
    """(state, report) after one rewire of the tiny network at step `every`."""
    state = parts.state if state is None else state
    state = state.replace(step=jnp.int32(parts.method.every))
    step = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=devices)
    return step(state, parts.batch)


def one():
    """A single device, so that float sums do not depend on how a batch is split."""
    return jax.local_devices()[:1]


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
    count, rounds = 0, 100
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
