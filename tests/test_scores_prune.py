"""Pruning before training, end to end: exactly K stay, nothing else changes, clear refusals."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst.methods.before import strongest
from dst.methods.distributions import active_count
from dst.start import prune_at_init
from tests.tiny import SGD, active, batch, kernels, loss, setup

NAMES = ["snip", "grasp", "grasp_abs", "synflow"]


def one():
    """A single device."""
    return jax.local_devices()[:1]


def prune(parts, batches=None, devices=None, **options):
    batches = [parts.batch] if batches is None else batches
    return prune_at_init(
        parts.net, parts.tx, parts.method, loss, parts.state, batches,
        devices=devices or one(), **options,
    )  # fmt: skip


def plain(state):
    """Every leaf as NumPy, the key as its numbers."""
    return jax.tree.map(np.array, state.replace(key=jax.random.key_data(state.key)))


# ---------------------------------------------------------------------------------- what is chosen
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_strongest_are_those_of_a_stable_sort(data):
    """Ties, zeros of both signs and negative scores; an inactive one never comes in."""
    n = 15
    score = data.draw(
        st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.0]), min_size=n, max_size=n)
    )
    active = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    k = data.draw(st.integers(0, n))
    order = sorted(np.flatnonzero(active), key=lambda i: (-score[i], i))
    layers = lambda flat: {"a": flat[:6].reshape(2, 3), "b": flat[6:].reshape(3, 3)}  # noqa: E731
    got = strongest(layers(np.array(score)), layers(active), k, "score")
    assert [got["a"].shape, got["b"].shape] == [(2, 3), (3, 3)]
    chosen = np.concatenate([got["a"].ravel(), got["b"].ravel()])
    assert set(np.flatnonzero(chosen)) == set(order[:k])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_told(bad):
    """Only of an active connection: the others have none."""
    score, mask = {"a": np.array([1.0, bad, 2.0])}, np.array([True, True, True])
    with pytest.raises(dst.ConfigError, match=r"^the score of layer 'a' must be finite.*\.$"):
        strongest(score, {"a": mask}, 1, "the score")
    mask[1] = False
    assert strongest(score, {"a": mask}, 1, "")["a"].tolist() == [False, False, True]


# --------------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize("name", NAMES)
def test_exactly_k_stay_and_nothing_else_changes(name):
    """P7: weights that stay, everything dense, statistics, key and step are the same bits."""
    parts = setup(name, 0.8)
    before = plain(parts.state)
    assert all(mask.all() for mask in before.masks.values())
    state = prune(parts, [parts.batch, batch(1)])
    chex.assert_trees_all_equal(plain(parts.state), before)  # what went in
    K = active_count(parts.net.possible, 0.8)
    assert sum(active(state).values()) == K < parts.net.possible
    after = plain(state)
    for path, mask in after.masks.items():
        kernel = before.params[path]["kernel"]
        expected = np.where(mask, kernel, np.float32(0))
        assert after.params[path]["kernel"].tobytes() == expected.tobytes()
        before.params[path]["kernel"] = after.params[path]["kernel"]
    # It was marked as one that may not train yet, without an array.
    assert list(before.method) == ["waiting"] and after.method == {}
    same = before.replace(masks=after.masks, opt_state=after.opt_state, method={})
    assert jax.tree.structure(same) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    chex.assert_trees_all_equal(state.opt_state, parts.tx.init(state.params))
    update = dst.make_update(parts.net, parts.tx, loss, devices=one())
    state, metrics = update(state, parts.batch)
    assert bool(metrics["finite"])
    for tree in (state.params, state.opt_state[1][0].trace):
        for path, kernel in kernels(tree, state).items():
            assert (kernel[~after.masks[path]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_trains_truly_sparse_from_its_file(name, tmp_path):
    """As `dst` says: the same connections and weights, and after three steps the same network."""
    parts = setup(name, 0.8)
    masked, file = prune(parts), tmp_path / "left.npz"
    dst.export(parts.net, masked, file)
    sparse = setup("random", 0.8, execution="sparse").net
    random = dst.method("random", 0.8)
    left = dst.init_state(sparse, parts.tx, random, jax.random.key(1), params=file)
    ends = []
    for net, state in ((parts.net, masked), (sparse, left)):
        update = dst.make_update(net, parts.tx, loss, devices=one())
        for n in range(3):
            state, _ = update(state, batch(n))
        ends.append(dst.predictor(net, state)(parts.batch[0]))
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)


def test_the_optimizer_starts_anew():
    """Moments of all connections, even after steps, are those of `tx.init`: here 0.1."""
    tx = optax.chain(optax.scale_by_rss(initial_accumulator_value=0.1), optax.scale(-0.1))
    parts, trained = setup("snip", tx=tx), setup("dense", tx=tx).state
    trained, _ = dst.make_update(parts.net, tx, loss, devices=one())(trained, parts.batch)
    state = prune(parts._replace(state=trained))
    assert all((leaf == np.float32(0.1)).all() for leaf in jax.tree.leaves(state.opt_state))


def test_the_same_choice_on_four_devices():
    parts = setup("snip", norm=False)
    x, y = batch(1, 24)
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    four = prune(parts, batches, jax.local_devices())
    chex.assert_trees_all_equal(plain(prune(parts, batches)), plain(four))


class Stream:
    """Batches that can be iterated again and have no length."""

    def __iter__(self):
        return iter([batch(0, 8), batch(1, 8)])


def test_progress_is_shown():
    """Once a batch and pass, or once a round of SynFlow."""
    told = []
    show = lambda done, total: told.append((done, total))  # noqa: E731
    two = [batch(0, 8), batch(1, 8)]
    shown = {
        "grasp": (two, [(n, 4) for n in (1, 2, 3, 4)]),
        "synflow": ((), [(n, 3) for n in (1, 2, 3)]),
    }
    for name, (batches, expected) in shown.items():
        options = {"iterations": 3} if name == "synflow" else {}
        prune(setup(name, **options), batches, show=show)
        assert told == expected
        told.clear()
    prune(setup("snip"), Stream(), show=show)
    assert told == [(1, None), (2, None)]


# ----------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_pruned_is_told_in_a_sentence():
    def refused(parts, sentence, batches=None, **options):
        with pytest.raises(dst.ConfigError, match=sentence):
            prune(parts, batches, **options)

    refused(setup("gse"), r"method is 'gse', which does not prune .*snip, grasp, .*synflow\.$")
    truly = setup("random", 0.5, execution="sparse")
    refused(
        truly._replace(method=dst.method("snip")),
        r"^method 'snip' cannot run in execution 'sparse', because .* use a file of .*'masked'\.$",
    )
    refused(setup("snip"), r"^batches gives no examples", [])
    refused(setup("grasp"), r"16 examples at first and 0 when", iter([batch(0)]))
    few = setup("random", 0.9)
    refused(few._replace(method=dst.method("snip", 0.5)), r"^state has \d+ connections, fewer than")


def test_a_score_that_is_not_finite_is_refused():
    parts = setup("snip")
    x, y = parts.batch
    with pytest.raises(dst.ConfigError, match=r"^the 'snip' score of layer '.*' must be finite"):
        prune(parts, [(np.full_like(x, np.nan), y)])
    weights = jax.tree.map(lambda leaf: leaf * jnp.nan, parts.state.params)
    broken = setup("synflow", tx=SGD)
    with pytest.raises(dst.ConfigError, match=r"the flow is infinite"):
        prune(broken._replace(state=broken.state.replace(params=weights)), ())
