"""The CPU's own convolution equals XLA's, forwards and backwards."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst.layers.conv import fast_convolution
from tests.executions import precisions

CASES = [
    dict(kernel_size=(3, 3)),
    dict(kernel_size=(3, 3), strides=2, padding=1),
    dict(kernel_size=(3, 2), strides=(1, 2), padding="VALID", use_bias=False),
    dict(kernel_size=(3, 3), kernel_dilation=2, padding=((2, 1), (0, 3))),
    dict(kernel_size=(1, 1), strides=2),
    dict(kernel_size=(3, 3), strides=4, padding=1),  # 2x2 pixels: the sum of dots
    dict(kernel_size=(2, 3), strides=(5, 3), kernel_dilation=(1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_flax_in_float64(case):
    """Output, dx, dW and db, to the rounding of float64."""
    with jax.enable_x64(True):
        model = nn.Conv(4, param_dtype=jnp.float64, **case)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, 8, 7, 3)))
        variables = model.init(jax.random.key(0), x)
        weight = jnp.asarray(rng.normal(size=model.apply(variables, x).shape))

        def run(variables, x):
            y = model.apply(variables, x)
            return (y * weight).sum(), y

        def ours(variables, x):
            with nn.intercept_methods(fast_convolution):
                return run(variables, x)

        grad = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(variables, x)  # noqa: E731
        for got, expected in zip(
            jax.tree.leaves(grad(ours)), jax.tree.leaves(grad(run)), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


class Standardised(nn.Conv):
    """Weight standardisation, as in BiT."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - value.mean((0, 1, 2), keepdims=True) if name == "kernel" else value


def signs(x, kernel, bias, dtype):
    """Binary weights."""
    return x, jnp.sign(kernel), bias


def test_leaves_other_layers_alone():
    """Grouped and 1-D convolutions run as they are, and those that are more than a convolution."""
    for layer, shape in (
        (Standardised(4, (3, 3)), (2, 8, 8, 2)),
        (nn.Conv(4, (3, 3), promote_dtype=signs), (2, 8, 8, 2)),
        (nn.WeightNorm(nn.Conv(4, (3, 3))), (2, 8, 8, 2)),
        (nn.Conv(4, (3,)), (2, 8, 2)),
        (nn.Conv(4, (3, 3), feature_group_count=2), (2, 8, 8, 2)),
    ):
        x = jnp.ones(shape)
        variables = layer.init(jax.random.key(0), x)
        with nn.intercept_methods(fast_convolution):
            got = layer.apply(variables, x)
        np.testing.assert_array_equal(got, layer.apply(variables, x))


def test_bfloat16_and_extra_batch_axes():
    """The module's dtype holds, and leading axes are flattened as in Flax."""
    layer = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 2))
    variables = layer.init(jax.random.key(1), x)
    with nn.intercept_methods(fast_convolution):
        got = layer.apply(variables, x)
    expected = layer.apply(variables, x)
    assert got.dtype == expected.dtype == jnp.bfloat16 and got.shape == expected.shape
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=0.05)


@pytest.mark.parametrize("strides", [1, 4])
def test_the_modules_precision_is_asked_for(strides):
    """In the product, dx and dW, whether convolution or dots: no product without it."""
    layer = nn.Conv(4, (3, 3), strides, precision="highest")
    x = jnp.ones((2, 8, 8, 2))
    variables = layer.init(jax.random.key(0), x)

    def value(variables, x):
        with nn.intercept_methods(fast_convolution):
            return layer.apply(variables, x).sum()

    products = precisions(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(variables, x))
    assert len(products) >= 3 and all("HIGHEST" in str(product) for product in products)
