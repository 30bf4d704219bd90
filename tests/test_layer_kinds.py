"""Layers over other axes, in other dimensions and of groups, against Flax; both executions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst.connections.backends import cpp as kernels
from dst.connections.execution import described
from dst.layers import kind_of
from dst.layers.conv_nd import ConvND
from dst.layers.fit import misfit
from dst.methods.distributions import first_counts, layer_counts
from dst.methods.heuristics import HEURISTICS
from dst.observe import gradient_on, marginals
from tests import tiny
from tests.executions import ONE, close, dense, structure

MODULES = {
    "several axes": (nn.DenseGeneral((2, 3), axis=(-3, -1)), (2, 3, 4, 5)),
    "axes out of order": (nn.DenseGeneral(3, axis=(3, -3)), (2, 3, 4, 5)),
    "one axis": (nn.DenseGeneral(features=(3, 1), use_bias=False), (2, 5)),
    "lower case": (nn.Conv(3, (2, 4), padding="same_lower", strides=2), (2, 5, 6, 4)),
    "causal": (nn.Conv(3, 4, padding="CAUSAL", kernel_dilation=2), (2, 9, 4)),
    "sequence": (nn.Conv(3, (4,), strides=2, padding=((2, 1),)), (2, 9, 4)),
    "circular": (nn.Conv(3, (3, 4), padding="CIRCULAR", strides=(2, 1)), (2, 5, 6, 4)),
    "reflect": (nn.Conv(3, 3, padding="REFLECT", kernel_dilation=2), (2, 9, 4)),
    "volume": (nn.Conv(3, (2, 1, 3), strides=(1, 2, 1), padding=1), (2, 3, 4, 5, 4)),
    "four dimensions": (nn.Conv(3, (2, 1, 2, 1), strides=(1, 1, 2, 1)), (2, 3, 2, 4, 2, 4)),
    "groups": (nn.Conv(6, (3, 2), feature_group_count=2, kernel_dilation=(1, 2)), (2, 5, 6, 4)),
    "depthwise": (nn.Conv(8, 3, feature_group_count=4, padding="VALID"), (2, 9, 4)),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_layer_is_what_its_module_computes(case):
    """y, its gradients and sums, as a kind from outside would have to."""
    module, shape = MODULES[case]
    h = jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = kind_of(module).describe("a", module, h)
    assert kind_of(module).obstacle(module) is None
    assert misfit("a", layer, module, h) is None


class Kinds(nn.Module):
    """All of them in a row, with attention, on x (B, 6, 6, 2)."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), padding="CIRCULAR", name="circular")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, strides=2, name="groups")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Conv(4, (2, 2, 2), strides=(1, 1, 2), name="volume")(x[..., None, :]))
        x = x.reshape(x.shape[0], 9, 4)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.relu(nn.Conv(6, 3, padding="CAUSAL", name="causal")(x))
        return nn.DenseGeneral(5, axis=(-2, -1), name="head")(x)


LAYERS = [*(f"attention/{n}" for n in ("key", "out", "query", "value")), "causal", "circular"]
LAYERS += ["depthwise", "groups", "head", "volume"]


def started(execution, name="gse", **options):
    net = dst.network(Kinds(), tiny.IMAGE, train=False, execution=execution)
    method = dst.method(name, 0.6, every=2, end=12, drop_fraction=0.5, **options)
    return net, method, dst.init_state(net, tiny.SGD, method, jax.random.key(0))


def test_gradients_on_a_subset_and_sums_are_autodiffs():
    net, _, state = started("masked")
    assert list(net.layers) == LAYERS and not net.dense
    x, labels = tiny.batch(1)

    def value(params, extra=None):
        run = lambda x, train: net.model.apply({"params": params, **(extra or {})}, x)  # noqa: E731
        return tiny.loss(run, (x, labels))[0]

    G = jax.jit(jax.grad(value))(state.params)
    S = {path: jnp.arange(0, layer.size, 3) for path, layer in net.layers.items()}
    probed = lambda extra: value(state.params, extra)  # noqa: E731
    found = jax.jit(lambda: gradient_on(net.layers, probed, S))()
    sums = jax.jit(lambda: marginals(net.layers, probed))()
    for path in LAYERS:
        kernel = G["attention"][path[10:]] if path.startswith("a") else G[path]
        close(found[path], kernel["kernel"].reshape(-1)[::3], 1e-4)
    head = jax.eval_shape(net.layers["head"].inputs, jnp.zeros((1, 9, 6)))
    assert sums["head"][0].shape == head.shape[-1:] == (54,)
    assert sums["depthwise"][0].shape == (8,) and net.layers["depthwise"].n_in == 1


# What reads a layer's kind: sums, signed ones, the gradient on S, blocks of its gradient.
RUNS = [("gse", {}), ("gse", {"heuristic": "graest"}), ("rigl", {"growth_memory": "streamed"})]


@pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())
def test_the_kernels_compute_all_of_them():
    net, _, state = started("sparse")
    assert described(net, state.params, state.masks, {}) == "compiled kernels"


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_both_executions_train_and_rewire_alike(name, options):
    after = []
    for execution in ("masked", "sparse"):
        net, method, state = started(execution, name, **options)
        first = structure(state)
        update = dst.make_update(net, tiny.SGD, tiny.loss, devices=ONE)
        rewire = dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE)
        state, report = rewire(update(state, tiny.batch(1))[0], tiny.batch(2))
        state, _ = update(state, tiny.batch(3))
        after.append((first, structure(state), dense(state), jax.device_get(report)))
    (first, masks, kernels, report), (_, other, other_kernels, other_report) = after
    assert report == other_report and int(report["grown"]) > 20
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, other[path])
    moved = {path for path, mask in masks.items() if (mask != first[path]).any()}
    assert {"groups", "volume", "head", "causal"} <= moved
    close(kernels, other_kernels, 1e-4)


def test_a_flow_through_them_is_the_same_in_both_executions():
    flows = []
    for execution in ("masked", "sparse"):
        net, _, state = started(execution)
        flows.append(HEURISTICS["synflow"].on_host(net)(state))
    close(*flows, 1e-5)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_file_has_matrices_as_they_multiply_and_comes_back(tmp_path, execution):
    net, _, state = started(execution)
    x = tiny.batch(0)[0]
    logits = dst.predictor(net, state)(x)
    dst.export(net, state, tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as stored:
        sizes = {path: stored[f"params/{path}/kernel/indptr"].size - 1 for path in LAYERS}
    assert {path: layer.columns for path, layer in net.layers.items()} == sizes
    assert sizes["attention/query"] == 4 and sizes["head"] == 54 and sizes["volume"] == 64
    close(net.model.apply(dst.load(tmp_path / "net.npz"), x), logits)
    close(dst.predictor(net, tmp_path / "net.npz")(x), logits)


def test_erk_sees_attention_as_a_matrix():
    net = dst.network(Kinds(), tiny.IMAGE)
    shapes = {path: layer.shape for path, layer in net.layers.items()}
    shapes |= {f"attention/{name}": (4, 4) for name in ("query", "key", "value", "out")}
    shapes["head"] = (54, 5)
    method = dst.method("set", 0.6, distribution="erk")
    assert first_counts(net, method) == layer_counts(shapes, 0.6, "erk")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_f_and_g_of_groups_are_the_marginals_of_their_pairs(groups, n_in, of_each, seed):
    """Of f_a g_o on the pairs (i, o) of one group; exact where that is a product."""
    rng = np.random.default_rng(seed)
    layer = ConvND("a", (2, n_in, groups * of_each), groups=groups)
    f, g = rng.random((2, groups * n_in)), rng.random(groups * of_each)
    joint = np.zeros((2, n_in, g.size))
    for place, i, o in np.ndindex(joint.shape):
        joint[place, i, o] = f[place, o // of_each * n_in + i] * g[o]
    found = layer.paired(jnp.asarray(f.ravel()), jnp.asarray(g))
    product = np.outer(*(np.asarray(a, np.float64) for a in found)).reshape(joint.shape)
    marginal = np.outer(joint.sum(2).ravel(), joint.sum((0, 1))).reshape(joint.shape)
    np.testing.assert_allclose(product / product.sum(), marginal / marginal.sum(), rtol=1e-4)
    if groups == 1:
        np.testing.assert_allclose(product / product.sum(), joint / joint.sum(), rtol=1e-4)
