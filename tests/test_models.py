"""The models: the parameter counts of the paper, types, shapes, shortcuts without parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dst.errors import ConfigError
from dst.models import MLP, VGG16, ResNet, build
from dst.models.resnet import Block

# Paper, Table 2 (CIFAR-100): |W| in millions by width factor. At 3.0 both columns of the paper are
# cut where all others are rounded (7.65 M and 8.46 M), so only there 0.1 is allowed.
WIDTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
TABLE_2 = {
    "resnet": (0.9, 1.9, 3.4, 5.3, 7.6, 10.4, 13.6),
    "vgg": (0.9, 2.1, 3.8, 5.9, 8.4, 11.5, 15.0),
}
MODELS = {
    "resnet": ResNet(8, 10, dtype=jnp.bfloat16),
    "vgg": VGG16(10, dtype=jnp.bfloat16),
    "mlp": MLP((12, 7), 10, dtype=jnp.bfloat16),
}


def shapes(model, train=False):
    return jax.eval_shape(
        lambda key, x: model.init(key, x, train), jax.random.key(0), jnp.zeros((2, 32, 32, 3))
    )


def count(tree, *names):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size for path, leaf in leaves if path[-1].key in names)


def config(**fields):
    base = {"model": "resnet", "depth": 56, "width": 1.0, "hidden": (5,), "precision": "float32"}
    return ml_collections.ConfigDict(base | fields)


@pytest.mark.parametrize("name", TABLE_2)
@pytest.mark.parametrize("at", range(len(WIDTHS)))
def test_kernel_counts_are_those_of_table_2(name, at):
    model = build(config(model=name, width=WIDTHS[at]), 100)
    tenths = round(count(shapes(model)["params"], "kernel") / 1e5)
    assert abs(tenths - round(10 * TABLE_2[name][at])) <= (WIDTHS[at] == 3.0)


def test_resnet56_counts():
    params = shapes(ResNet(56, 10))["params"]
    assert count(params, "kernel") == 848_944
    norms = {name: p for name, p in params.items() if name != "Dense_0"}
    assert count(norms, "scale", "bias") == 4_064
    assert count(params["Dense_0"], "bias") == 10
    assert count(params, "kernel", "scale", "bias") == 853_018


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_computes_with_float32_parameters_and_logits(name):
    model = MODELS[name]
    variables = shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = jnp.zeros((2, 32, 32, 3))
    logits, out = jax.eval_shape(
        lambda v: model.apply(v, x, True, mutable=True, capture_intermediates=True), variables
    )
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    layers = jax.tree_util.tree_leaves_with_path(out["intermediates"])
    # Everything but the model's own last result is computed in bfloat16.
    inner = {leaf.dtype for path, leaf in layers if len(path) > 2}
    assert inner == {jnp.dtype("bfloat16")}


def test_shortcut_is_the_subsampled_input_with_zero_channels():
    block = Block(7, stride=2)
    x = jax.random.uniform(jax.random.key(0), (2, 6, 6, 4))  # >= 0: the last ReLU changes nothing
    variables = block.init(jax.random.key(1), x, False)
    assert set(variables["params"]) == {"Conv_0", "Conv_1", "BatchNorm_0", "BatchNorm_1"}
    silent = jax.tree.map(jnp.zeros_like, variables["params"])
    y = block.apply({**variables, "params": silent}, x, False)
    expected = np.zeros((2, 3, 3, 7), np.float32)
    expected[..., 1:5] = np.asarray(x)[:, ::2, ::2]
    np.testing.assert_array_equal(y, expected)


def test_strided_convolution_pads_both_sides_by_one():
    block = Block(1, stride=2)
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
    variables = block.init(jax.random.key(0), x, False)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    _, out = block.apply(
        {**variables, "params": variables["params"] | {"Conv_0": {"kernel": kernel}}},
        x, False, mutable=True, capture_intermediates=True,
    )  # fmt: skip
    # The corner pixel lies under the kernel's centre, as with padding=1 in PyTorch.
    y = out["intermediates"]["Conv_0"]["__call__"][0]
    np.testing.assert_array_equal(y[0, :, :, 0], [[4.0, 0.0], [0.0, 0.0]])


def test_batch_norm_keeps_pytorch_statistics():
    model = ResNet(8, 3)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = model.init(jax.random.key(1), x, False)
    _, out = model.apply(variables, x, True, mutable=True, capture_intermediates=True)
    y = np.asarray(out["intermediates"]["Conv_0"]["__call__"][0], np.float64)
    moved = out["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(moved, 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-7)


def test_dropout_in_the_head_is_another_model_of_the_same_parameters():
    """Off in evaluation; in training half of the head's units are left out."""
    plain, dropping = (build(config(model=name), 10) for name in ("vgg", "vgg_dropout"))
    assert shapes(plain) == shapes(dropping)
    x, rngs = jnp.ones((2, 32, 32, 3)), {"dropout": jax.random.key(1)}
    variables = plain.init(jax.random.key(0), x, False)
    same = [model.apply(variables, x, False) for model in (plain, dropping)]
    np.testing.assert_array_equal(*same)
    trained = [
        model.apply(variables, x, True, rngs=rngs, mutable=["batch_stats"])[0]
        for model in (plain, dropping)
    ]
    assert not np.allclose(*trained)


@pytest.mark.parametrize("depth", [2, 9, 57])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"^depth must be 6n\+2 .* is {depth}\.$"):
        build(config(depth=depth), 10)


def test_unknown_model_and_small_images_are_refused():
    with pytest.raises(
        ConfigError, match=r"^model must be 'mlp', .* or 'vgg_dropout', not 'vit'\.$"
    ):
        build(config(model="vit"), 10)
    with pytest.raises(ValueError, match="32x32 or more"):
        VGG16(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), False)
