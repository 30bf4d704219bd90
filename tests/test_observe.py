"""h and delta of every call of every layer, against brute force; what cannot be seen is refused."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst import observe as probes
from dst.discovery import network
from dst.errors import ConfigError
from dst.layers import Dense
from tests.test_probes import (
    Layers,
    Structure,
    arrays_of,
    assert_close,
    by_call,
    loss_of,
    setting,
    subsets,
)


def units_first(layer, calls):
    """What `observe` should give: channels, then the batch of all calls, then space."""
    h, delta = [], []
    for x, y in calls:
        if isinstance(layer, Dense):
            h.append(x.reshape(-1, x.shape[-1]).T)
            delta.append(y.reshape(-1, y.shape[-1]).T)
        else:
            x, y = (a.reshape(-1, *a.shape[-3:]) for a in (x, y))
            x = np.pad(x, ((0, 0), *layer.pads(x.shape[1:3]), (0, 0)))
            h.append(np.moveaxis(x, -1, 0))
            delta.append(np.moveaxis(y, -1, 0))
    return np.concatenate(h, 1), np.concatenate(delta, 1)


@pytest.mark.parametrize("model", [Layers(), Structure(True)], ids=["layers", "structure"])
def test_h_and_delta_of_every_call_are_observed(model):
    net, variables, x, mix = setting(model)
    calls, kernels = by_call(Structure(False) if isinstance(model, Structure) else model)
    S = subsets(net)
    with jax.enable_x64(True):
        loss = loss_of(net, variables, x, mix)

        @jax.jit
        def look(S):
            seen = probes.observe(net.layers, loss)
            G = {}
            for path, layer in net.layers.items():
                column, output = jnp.divmod(S[path], layer.n_out)
                G[path] = layer.gradient_at(*seen[path], column, output)
            return seen, G

        seen, G = look(S)
    for path, layer in net.layers.items():
        for found, expected in zip(seen[path], units_first(layer, calls[path]), strict=True):
            assert found.shape == expected.shape, path
            assert_close(found, expected, path, 2e-6)
        assert_close(G[path], kernels[path].ravel()[np.asarray(S[path])], path, 2e-6)


def twice(lifted):
    """A model that calls one layer twice, with inputs of one shape or of two."""

    class Twice(nn.Module):
        rows: int = 3

        @nn.compact
        def __call__(self, x):
            layer = lifted(4, name="layer")
            return layer(nn.tanh(layer(x)[: self.rows])).sum()

    return Twice


@pytest.mark.parametrize("rows", [3, 2])
@pytest.mark.parametrize("lift", [lambda m: m, nn.remat], ids=["plain", "remat"])
def test_a_layer_called_twice_is_observed_twice(lift, rows):
    model = twice(lift(nn.Dense))(rows)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    net = network(model, x)
    W, b = (np.float64(variables["params"]["layer"][name]) for name in ("kernel", "bias"))
    first = np.tanh((x @ W + b)[:rows])
    loss = loss_of_one(net, variables, x)
    h, delta = jax.jit(lambda: probes.observe(net.layers, loss))()["layer"]
    second = np.zeros((3, 4))
    second[:rows] = (1 - first**2) * (np.ones(4) @ W.T)
    np.testing.assert_allclose(h, np.concatenate([x, first]).T, atol=1e-5)
    np.testing.assert_allclose(delta, np.concatenate([second, np.ones((rows, 4))]).T, atol=1e-5)


def loss_of_one(net, variables, x):
    return lambda extra: net.model.apply({**variables, **extra}, x)


def test_observing_computes_no_array_of_the_size_of_a_kernel():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(300)(nn.relu(nn.Dense(200)(x)))

    x = jnp.ones((4, 250))
    net = network(Wide(), x)
    variables = jax.eval_shape(net.model.init, jax.random.key(0), x)
    value = lambda v: lambda extra: jnp.sum(net.model.apply({**v, **extra}, x) ** 2)  # noqa: E731
    jaxpr = jax.make_jaxpr(lambda v: probes.observe(net.layers, value(v)))(variables)
    assert max(np.prod(shape, initial=1) for shape in arrays_of(jaxpr.jaxpr)) < 5000


class Heads(nn.Module):
    """A Dense and a convolution that only some calls use."""

    @nn.compact
    def __call__(self, x, all_heads=True):
        conv = nn.Conv(2, (3, 2), kernel_dilation=2, name="conv")
        if not all_heads:
            return nn.Dense(3, name="used")(x).sum()
        return (
            nn.Dense(3, name="used")(x).sum() + nn.Dense(4, name="unused")(x).sum() + conv(x).sum()
        )


def test_a_layer_that_is_never_called_is_seen_as_zeros():
    x = jnp.ones((1, 7, 6, 3))
    net = network(Heads(), x)
    variables = net.model.init(jax.random.key(0), x)
    loss = lambda extra: net.model.apply({**variables, **extra}, x, all_heads=False)  # noqa: E731
    seen = probes.observe(net.layers, loss)
    assert set(seen) == {"used", "unused", "conv"}
    np.testing.assert_array_equal(seen["used"][1], np.ones((3, 42)))
    for path in ("unused", "conv"):
        assert not any(a.any() for a in seen[path])
        layer = net.layers[path]
        column, output = jnp.divmod(jnp.arange(layer.size), layer.n_out)
        G = layer.gradient_at(*seen[path], column, output)
        np.testing.assert_array_equal(G, np.zeros(layer.size))


def test_a_convolution_of_images_of_two_sizes_is_refused_in_a_sentence():
    class Scales(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(3, (3, 3), name="conv")
            return conv(x).sum() + conv(x[:, ::2, ::2]).sum()

    x = jnp.ones((1, 8, 8, 3))
    net = network(Scales(), x)
    variables = net.model.init(jax.random.key(0), x)
    with pytest.raises(
        ConfigError, match=r"'conv' is called on inputs of several sizes; .*dense='conv'"
    ):
        probes.observe(net.layers, loss_of_one(net, variables, x))
