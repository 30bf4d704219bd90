"""States that begin with weights that one has: the largest are kept, or a file's own."""

from __future__ import annotations

import functools
import tracemalloc

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst.methods import lottery
from dst.methods.distributions import active_count, first_counts
from dst.methods.given import largest
from tests import tiny
from tests.executions import dense, structure

EXECUTIONS = ("masked", "sparse")
KEY = jax.random.key(0)
N = 1288


@functools.cache
def network(execution: str = "masked") -> dst.Network:
    return dst.network(tiny.Classifier(), tiny.IMAGE, train=False, execution=execution)


@functools.cache
def variables():
    """A dense network's, with statistics that are not those of the start."""
    made = tiny.Classifier().init(jax.random.key(5), tiny.batch(0)[0], train=False)
    return {**made, "batch_stats": jax.tree.map(lambda a: a + 0.5, made["batch_stats"])}


def begin(params, execution="masked", name="set", sparsity=0.8, *, keep="global", **options):
    method = dst.method(name, sparsity, every=2, end=12, **options)
    return dst.init_state(network(execution), tiny.SGD, method, KEY, params=params, keep=keep)


def weights():
    return {path: np.asarray(variables()["params"][path]["kernel"]) for path in network().layers}


# ------------------------------------------------------------------------------------- the choice
@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=4),
    st.data(),
)
def test_the_largest_are_those_of_a_sort(values, data):
    """Few distinct values, so that ties are the rule; nothing and everything included."""
    w = {str(l): np.array(v, np.float32) / 3 for l, v in enumerate(values)}
    flat = np.concatenate([*w.values()])
    k = data.draw(st.integers(0, flat.size))
    found = largest(w, k, jax.random.key(data.draw(st.integers(0, 3))))
    inside = np.concatenate([np.isin(np.arange(v.size), found[path]) for path, v in w.items()])
    assert inside.sum() == sum(p.size for p in found.values()) == k
    assert all((np.diff(p) > 0).all() for p in found.values())
    if 0 < k < flat.size:
        assert np.abs(flat[inside]).min() >= np.abs(flat[~inside]).max()


def test_of_equals_some_by_chance():
    """Not the first: a layer of zeros would have its connections at its first inputs."""
    w = {"a": np.zeros((100, 10), np.float32), "b": np.zeros((100, 10), np.float32)}
    counts = np.array(
        [[p.size for p in largest(w, 1000, jax.random.key(s)).values()] for s in range(9)]
    )
    assert (counts.sum(1) == 1000).all() and (abs(counts - 500) < 80).all()
    assert len({tuple(row) for row in counts.tolist()}) > 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_largest_of_the_network_are_kept(execution):
    """All else is as it was given, the statistics too; and the user's arrays stay their own."""
    state = begin(flax.core.freeze(variables()), execution)
    flat = np.sort(np.abs(np.concatenate([w.ravel() for w in weights().values()])))
    K = active_count(N, 0.8)
    for path, mask in structure(state).items():
        np.testing.assert_array_equal(mask, np.abs(weights()[path]) >= flat[-K])
        np.testing.assert_array_equal(dense(state)[path], np.where(mask, weights()[path], 0))
    np.testing.assert_array_equal(
        state.params["Dense_0"]["bias"], variables()["params"]["Dense_0"]["bias"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, state.batch_stats["batch_stats"], variables()["batch_stats"]
    )
    update = dst.make_update(
        network(execution), tiny.SGD, tiny.loss, donate=True, devices=jax.local_devices()[:1]
    )
    update(state, tiny.batch(0))
    assert np.isfinite(jax.tree.leaves(variables())[0]).all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_or_as_many_of_each_layer_as_the_method_gives(execution):
    state = begin(variables(), execution, keep="layer", distribution="erk")
    method = dst.method("set", 0.8, distribution="erk")
    for path, count in first_counts(network(), method).items():
        mask, w = structure(state)[path], np.abs(weights()[path])
        assert mask.sum() == count and w[mask].min() > w[~mask].max(initial=0)


def test_a_layer_of_its_own_sparsity_has_its_count():
    """The others are ranked together."""
    state = begin(variables(), sparsity_of={"Dense_1": None, "Conv_0": 0.5})
    counts = tiny.active(state)
    assert counts == {"Conv_0": 54, "Dense_0": active_count(N, 0.8) - 154, "Dense_1": 100}


@pytest.mark.parametrize("name", ["snip", "lottery", "pruning"])
def test_methods_that_begin_with_all_connections_keep_all_weights(name):
    """A ticket goes back to them."""
    state = begin(variables(), name=name)
    for path, w in weights().items():
        np.testing.assert_array_equal(dense(state)[path], w)
    if name == "lottery":
        masks = lottery.winning(network(), state, 0.5)
        method = dst.method("lottery", 0.8)
        state = lottery.ticket(network(), tiny.SGD, method, KEY, masks, params=variables())
        for path, w in weights().items():
            np.testing.assert_array_equal(dense(state)[path], np.where(masks[path], w, 0))


def test_nothing_as_large_as_what_was_given_is_made():
    """In sparse execution: a kernel of 16 MB, of which 1 % stays."""

    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8192)(x)

    x = jnp.zeros((1, 512))
    net = dst.network(_In(Huge()), x, execution="sparse")
    given = jax.tree.map(np.asarray, _In(Huge()).init(KEY, x))
    begin = lambda: dst.init_state(net, optax.sgd(0.1), dst.method("set", 0.99), KEY, params=given)  # noqa: E731
    begin()
    tracemalloc.start()
    begin()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 4 * 512 * 8192


class _In(nn.Module):
    """A module in another, as a layer needs a path."""

    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


# --------------------------------------------------------------------------------------- of a file
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_sparse_file_gives_its_connections(execution, tmp_path):
    """Those of either execution, zeros too; other numbers are refused."""
    first = begin(variables(), "masked", "gse", distribution="erk")
    zero = {**first.params, "Dense_1": jax.tree.map(jnp.zeros_like, first.params["Dense_1"])}
    first = first.replace(params=zero)
    file = tmp_path / "network.npz"
    dst.export(network(), first, file)
    state = begin(str(file), execution, "gse")
    for path, mask in structure(first).items():
        np.testing.assert_array_equal(structure(state)[path], mask)
        np.testing.assert_array_equal(dense(state)[path], dense(first)[path])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, first.batch_stats)
    with pytest.raises(
        dst.ConfigError, match=r"npz has 258 connections, but .* begins with 129, at"
    ):
        begin(file, execution, sparsity=0.9)
    with pytest.raises(
        dst.ConfigError, match=r"connections in layer 'Conv_0', but method 'set' beg"
    ):
        begin(file, execution, sparsity_of={"Conv_0": 0.9})
    with pytest.raises(
        dst.ConfigError, match="connections in layer 'Conv_0', but method 'set' beg"
    ):
        begin(file, execution, keep_counts=True)
    begin(dst.load(file), execution, sparsity=0.9)


@pytest.mark.parametrize("as_arrays", [True, False])
def test_a_file_with_every_connection_is_pruned(as_arrays, tmp_path):
    """As training it dense leaves it."""
    trained = begin(variables(), name="dense", sparsity=0.0)
    dst.export(network(), trained, tmp_path / "dense.npz", dense=as_arrays)
    state, expected = begin(tmp_path / "dense.npz", "sparse"), begin(variables(), "sparse")
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.masks, state.params),
        (expected.masks, expected.params),
    )


# ---------------------------------------------------------------------------------- the sentences
def changed(**layers):
    """The variables with these entries of "params"; None takes one away."""
    params = {**variables()["params"], **layers}
    return {**variables(), "params": {k: v for k, v in params.items() if v is not None}}


def wrong(what):
    w = variables()["params"]["Dense_1"]["kernel"]

    def with_kernel(kernel):
        return changed(Dense_1={**variables()["params"]["Dense_1"], "kernel": kernel})

    return {
        "missing": changed(Dense_1=None),
        "extra": changed(head={"bias": jnp.zeros(3)}),
        "shape": with_kernel(w.T),
        "dtype": with_kernel(np.asarray(w, np.float64)),
        "list": with_kernel([1.0]),
        "nan": with_kernel(w.at[0, 0].set(jnp.nan)),
        "stats": variables()["params"],
        "path": "nowhere.npz",
        "model": tiny.Classifier(),
    }[what]


OURS = "which the network has as float32 (20, 5)."
SENTENCES = {
    "missing": "params has no params/Dense_1/bias, which the network has as float32 (5,).",
    "extra": "params has params/head/bias as float32 (3,), which the network has not.",
    "shape": "params has params/Dense_1/kernel as float32 (5, 20), " + OURS,
    "dtype": "params has params/Dense_1/kernel as float64 (20, 5), " + OURS,
    "list": "params has params/Dense_1/kernel as a list, " + OURS,
    "nan": "params must have finite weights, but some of layer 'Dense_1' is NaN or infinite.",
    "stats": "params has no batch_stats/BatchNorm_0/mean, which the network has as float32 (6,).",
    "path": "Cannot read nowhere.npz: No such file or directory.",
    "model": "params must be the model's variables as Flax holds them, a dict {'params': ...} or "
    "what is in it, or the path of a file of dst.export, not a Classifier.",
}  # fmt: skip


@pytest.mark.parametrize("what", SENTENCES)
def test_what_is_not_this_networks_is_told(what):
    with pytest.raises(dst.ConfigError) as caught:
        begin(wrong(what))
    assert str(caught.value) == SENTENCES[what]


def test_keep_is_about_params():
    with pytest.raises(dst.ConfigError, match="keep must be 'global' or 'layer', not 'all'"):
        begin(variables(), keep="all")
    with pytest.raises(dst.ConfigError, match="keep must be 'layer' for a method with keep_counts"):
        begin(variables(), keep_counts=True)
    begin(variables(), keep_counts=True, keep="layer")
    with pytest.raises(dst.ConfigError, match="keep must be 'global' without params"):
        begin(None, keep="layer")


def test_dense_weights_put_into_a_masked_state_leave_its_file_and_predictor_alike(tmp_path):
    """Both leave out what is off the masks."""
    state = tiny.setup("set").state.replace(params=variables()["params"])
    dst.export(network(), state, tmp_path / "a.npz")
    x = tiny.batch(3)[0]
    of_file, of_state = (dst.predictor(network(), a)(x) for a in (tmp_path / "a.npz", state))
    np.testing.assert_array_equal(of_file, of_state)


def test_a_layer_that_begins_empty_is_told(caplog):
    """As the largest of all layers together may leave one."""
    weights = variables()
    small = jax.tree.map(jnp.asarray, weights)
    head = small["params"]["Dense_0"]["kernel"]
    small["params"]["Dense_0"]["kernel"] = 1e-9 * head
    begin(small, sparsity=0.9)
    assert 'Dense_0 begins without a connection; keep="layer" keeps some of each.' in caplog.text
    caplog.clear()
    begin(small, sparsity=0.9, keep="layer")
    assert "begins without" not in caplog.text
