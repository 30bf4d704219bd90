"""Weights from the model's own initialisers, scaled to the fan-in; heads of zeros stay zero."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst import start
from dst.methods import lottery
from dst.methods.settings import resolve, unread_message
from tests.executions import dense, structure
from tests.test_train import small

KEY = jax.random.key(4)
EXECUTIONS = ("masked", "sparse")


class Own(nn.Module):
    """Initialisers that differ, a layer that is called twice, one under remat, a head of zeros."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal()
        x = nn.remat(nn.DenseGeneral)((5, 6), bias_init=normal, name="first")(x)
        x = x.reshape(-1, 30)
        shared = nn.Dense(30, kernel_init=nn.initializers.orthogonal(0.01), name="shared")
        x = shared(nn.relu(shared(x)))
        return nn.Dense(10, kernel_init=nn.initializers.zeros_init(), name="head")(x)


def begin(execution="masked", sparsity=0.8, name="set", **options):
    net = dst.network(Own(), jnp.zeros((1, 40)), execution=execution)
    return dst.init_state(net, optax.sgd(0.1), dst.method(name, sparsity), KEY, **options)


def of_flax():
    return jax.jit(Own().init)(jax.random.split(KEY, 4)[2], jnp.zeros((1, 40)))["params"]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("together", [1, 2**22])
def test_the_weights_are_the_models_times_the_root_of_the_fan_ins(execution, together, monkeypatch):
    """Kernel by kernel or all at once; of the connections that any first network has."""
    monkeypatch.setattr(start, "TOGETHER", together)
    state, usual, own = begin(execution, init="model"), begin(execution), of_flax()
    for path, mask in structure(state).items():
        np.testing.assert_array_equal(mask, structure(usual)[path])
        factor = np.sqrt(len(mask) / np.maximum(mask.sum(0), 1))
        expected = np.where(mask, np.asarray(own[path]["kernel"]) * factor, 0)
        np.testing.assert_allclose(dense(state)[path], expected, rtol=1e-6)
    assert np.any(dense(state)["shared"]) and not np.any(dense(state)["head"])
    np.testing.assert_array_equal(state.params["first"]["bias"], own["first"]["bias"])


def test_a_dense_network_is_the_models_own_and_so_is_a_ticket():
    state = begin("masked", 0.0, "dense", init="model")
    jax.tree.map(np.testing.assert_array_equal, state.params, of_flax())
    net = dst.network(Own(), jnp.zeros((1, 40)))
    ticket = lottery.ticket(net, optax.sgd(0.1), dst.method("lottery", 0.5), KEY, init="model")
    jax.tree.map(np.testing.assert_array_equal, ticket.params, of_flax())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_head_of_zeros_stays_zero_whatever_draws_the_others(execution):
    """The other layers' weights are fan-in scaled."""
    weights = dense(begin(execution))
    assert not np.any(weights["head"]) and np.any(weights["first"])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_layer_that_begins_without_a_connection_is_told(execution, caplog):
    begin(execution)
    assert not caplog.messages
    begin(execution, sparsity=0.99875)
    assert caplog.messages == [
        'head begins without a connection; sparsity_of={"its path": ...} gives it some.'
    ]


def test_what_the_models_own_does_not_go_with_is_refused():
    net = dst.network(Own(), jnp.zeros((1, 40)))
    method = dst.method("set", 0.8, gain=2.0)
    for options, sentence in (
        ({"init": "own"}, "init must be 'fan_in' or 'model', not 'own'"),
        ({"init": "model", "params": of_flax()}, "init must be 'fan_in' with params"),
        ({"init": "model"}, "gain must be 1.0 with init='model', .* not 2.0"),
    ):
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.init_state(net, optax.sgd(0.1), method, KEY, **options)

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2**16, name="wide")(x)

    net = dst.network(Wide(), jax.ShapeDtypeStruct((1, 2**16), jnp.float32), execution="sparse")
    with pytest.raises(dst.ConfigError, match=r"that of 'wide' has 4294967296 weights"):
        dst.init_state(net, optax.sgd(0.1), dst.method("set", 0.9999), KEY, init="model")


def test_a_config_says_so():
    config = small(init="model", init_gain=2.0)
    sentence = "Method 'gse' does not read init_gain=2.0, which changes nothing."
    assert unread_message(resolve(config)) == sentence
