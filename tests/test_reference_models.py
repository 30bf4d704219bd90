"""What models of others do, unmodified and in both executions: streams, boxes, objects, ties."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import dst
from tests.executions import ONE, close

TX, TWO = optax.sgd(0.1), jax.local_devices()[:2]
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 6)).astype(np.float32), np.arange(8) % 5
BOTH = pytest.mark.parametrize("execution", ["masked", "sparse"])


def entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start(model, execution="masked", x=X, name="rigl", example=None, **kwargs):
    net = dst.network(model, x[:1] if example is None else example, execution=execution, **kwargs)
    options = {} if name == "dense" else {"every": 1, "end": 9}
    options |= {"growth_memory": "streamed"} if name == "rigl" else {}
    method = dst.method(name, 0.0 if name == "dense" else 0.5, **options)
    return net, method, dst.init_state(net, TX, method, jax.random.key(0))


def trained(model, loss, execution, x=X, y=Y, **kwargs):
    """Network and state after an update, a rewire and an update; the last loss."""
    net, method, state = start(model, execution, x, **kwargs)
    update = dst.make_update(net, TX, loss, devices=ONE)
    state, _ = update(state, (x, y))
    state, report = dst.make_rewire(net, TX, method, loss, devices=ONE)(state, (x, y))
    assert int(report["grown"]) > 0
    state, metrics = update(state, (x, y))
    return net, state, float(metrics["loss"])


# -------------------------------------------------------------------------- partitioned parameters
class Partitioned(nn.Module):
    """Kernels, biases and scales in boxes of both kinds."""

    @nn.compact
    def __call__(self, x):
        named, logical = nn.with_partitioning, nn.with_logical_partitioning
        h = nn.Dense(
            7,
            kernel_init=named(nn.initializers.lecun_normal(), (None, "model")),
            bias_init=logical(nn.initializers.normal(), ("mlp",)),
        )(x)
        h = nn.LayerNorm(scale_init=named(nn.initializers.ones, ("model",)))(nn.relu(h))
        h = nn.with_logical_constraint(h, ("batch", "mlp"))
        # Flax looks up its axes wherever the kernel is read.
        init = named(nn.initializers.lecun_normal(), (None, "data"))
        return nn.DenseGeneral(5, kernel_init=init)(h)


@BOTH
def test_partitioned_parameters_are_trained_written_and_read(execution, tmp_path):
    """A state holds no box, and the file is of the plain variables."""
    loss = lambda apply, b: (entropy(apply(b[0]), b[1]), {})  # noqa: E731
    net, state, _ = trained(Partitioned(), loss, execution)
    boxed = jax.tree.leaves(state, is_leaf=lambda a: isinstance(a, nn.meta.AxisMetadata))
    assert not any(isinstance(leaf, nn.meta.AxisMetadata) for leaf in boxed)
    dst.export(net, state, tmp_path / "net.npz")
    logits = dst.predictor(net, state)(X)
    close(dst.predictor(net, tmp_path / "net.npz")(X), logits)
    close(Partitioned().apply(dst.load(tmp_path / "net.npz"), X), logits)


# ------------------------------------------------------------------------- models of one example
class Single(nn.Module):
    """A convolution and a matrix, of one example, with batch normalisation or not."""

    norm: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2,))(x.reshape(2, 2))
        x = nn.BatchNorm(False)(x) if self.norm else x
        return nn.Dense(5)(nn.relu(x).reshape(-1))


@BOTH
def test_a_model_of_one_example_is_mapped_by_its_loss(execution):
    """With the kernels, too, as example by example; what would be wrong is refused."""
    mapped = lambda apply, b: (entropy(jax.vmap(apply)(b[0]), b[1]), {})  # noqa: E731
    hidden = lambda apply, b: mapped(jax.checkpoint(apply), b)  # noqa: E731
    looped = lambda apply, b: (entropy(jnp.stack([*map(apply, b[0])]), b[1]), {})  # noqa: E731
    given = {"x": X[:2, :4], "y": Y[:2], "example": X[0, :4]}
    states = [
        trained(Single(), loss, execution, name="set", **given)[1] for loss in (mapped, looped)
    ]
    close(*(state.params for state in states), 1e-5)
    with pytest.raises(dst.ConfigError, match=r"apply writes 'batch_stats/.*' under jax\.vmap"):
        trained(Single(norm=True), mapped, execution, **given)
    for loss in (mapped, hidden):
        with pytest.raises(dst.ConfigError, match=r"layer 'Conv_0' is called under jax\.vmap"):
            trained(Single(), loss, execution, **given)


# --------------------------------------------------------------------------------- random streams
class Drawing(nn.Module):
    """Hands out what it draws from streams of three names."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(5)(x)
        if not train:
            return y, {}
        names = ("noise", "params", "dropout")
        return y, {n: jax.random.uniform(self.make_rng(n), (len(x),)) for n in names}


def drawn(devices, steps=1, rngs=None):
    """{stream: what it gave the first and last rows} in each step, the loss's own key too."""
    net, _, state = start(Drawing())

    def loss(apply, batch, key):
        (y, one), (_, two) = (apply(batch[0], train=True, rngs=rngs) for _ in range(2))
        rows = batch[2]
        two = {f"{name} again": values for name, values in two.items()}
        every = {**one, **two, "key": jax.random.uniform(key, (len(rows),))}
        # Metrics are means over devices: each row's number comes from the one that has it.
        at = lambda values, row: (values * (rows == row)).sum() * len(devices)  # noqa: E731
        return entropy(y, batch[1]), {n: {"0": at(v, 0), "7": at(v, 7)} for n, v in every.items()}

    update = dst.make_update(net, TX, loss, devices=devices)
    found = []
    for _ in range(steps):
        state, metrics = update(state, (X, Y, np.arange(8)))
        found.append({n: m for n, m in metrics.items() if isinstance(m, dict)})
    return found


def test_every_stream_differs_by_step_device_call_and_name():
    """Of any name, without rngs; and the same run draws the same."""
    found, again = drawn(TWO, steps=2), drawn(TWO, steps=1)
    numbers = [float(n) for n in jax.tree.leaves(found)]
    # 2 steps x 2 devices x (3 streams x 2 calls + the loss's key); "noise" draws from "params".
    assert len(numbers) == 28 and len(set(numbers)) == 28 and 0 < min(numbers) < max(numbers) < 1
    jax.tree.map(np.testing.assert_array_equal, found[0], again[0])


def test_a_key_given_for_all_streams_is_that_of_params():
    """As in Flax; dropout keeps its own."""
    plain, given = drawn(ONE)[0], drawn(ONE, rngs=jax.random.key(3))[0]
    assert plain["dropout"] == given["dropout"]
    key = jax.random.key(3)
    params = start(Drawing())[2].params
    _, draws = Drawing().apply({"params": params}, X, train=True, rngs={"params": key})
    np.testing.assert_allclose(given["noise"]["0"], draws["noise"][0], rtol=1e-6)
    np.testing.assert_allclose(given["noise"]["7"], draws["noise"][7], rtol=1e-6)


def test_a_stream_that_is_handed_on_by_name_is_asked_for():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            def body(module, h, _):
                noise = jax.random.normal(module.make_rng("noise"), h.shape) if train else 0.0
                return h + noise, None

            scan = nn.scan(body, split_rngs={"noise": True}, length=2)
            return nn.Dense(5)(scan(self, x, None)[0])

    net, _, state = start(Scanned(), name="set")
    lost = lambda apply, b: (entropy(apply(b[0], train=True), b[1]), {})  # noqa: E731

    def given(apply, b, key):
        return entropy(apply(b[0], train=True, rngs={"noise": key}), b[1]), {}

    with pytest.raises(
        dst.ConfigError, match=r'needs PRNG for "noise".*; give the stream as apply'
    ):
        dst.make_update(net, TX, lost, devices=ONE)(state, (X, Y))
    assert np.isfinite(dst.make_update(net, TX, given, devices=ONE)(state, (X, Y))[1]["loss"])


# --------------------------------------------------------------------- what is called and returned
@struct.dataclass
class Output:
    logits: Any
    aux: Any


@dataclasses.dataclass
class Opaque:
    logits: Any


class Returning(nn.Module):
    """An object that holds a dictionary and a tuple, unless `kind` says another."""

    kind: Any = Output

    def setup(self):
        self.conv, self.norm, self.head = nn.Conv(4, (3, 3)), nn.BatchNorm(), nn.Dense(5)

    def features(self, x, train=False):
        x = self.norm(self.conv(x), use_running_average=not train)
        return nn.relu(x).mean((1, 2))

    def __call__(self, x, train=False):
        h = self.features(x, train)
        self.sow("intermediates", "h", h)
        aux = {"h": h, "pair": (h.mean(), 3)}
        return self.kind(self.head(h), aux) if self.kind is Output else self.kind(self.head(h))


MAPS = RNG.normal(size=(8, 6, 6, 2)).astype(np.float32)


@BOTH
def test_a_model_returns_any_pytree(execution):
    """To the loss, in an update and a rewire, and from the predictor."""
    loss = lambda apply, b: (entropy(apply(b[0], train=True).logits, b[1]), {})  # noqa: E731
    net, state, _ = trained(Returning(), loss, execution, MAPS)
    found = dst.predictor(net, state)(MAPS)
    assert isinstance(found, Output) and found.logits.shape == (8, 5)
    np.testing.assert_allclose(found.aux["pair"][0], found.aux["h"].mean(), rtol=1e-5)
    assert found.aux["pair"][1] == 3


@BOTH
def test_a_model_may_return_to_the_loss_what_is_no_pytree(execution):
    """And trains as with a pytree; it cannot be predicted with, which is told."""
    losses = []
    for kind in (Opaque, lambda y: {"logits": y}):
        read = (lambda out: out.logits) if kind is Opaque else (lambda out: out["logits"])
        loss = lambda apply, b, read=read: (entropy(read(apply(b[0], train=True)), b[1]), {})  # noqa: E731
        net, state, value = trained(Returning(kind), loss, execution, MAPS)
        losses.append(value)
        if kind is Opaque:
            with pytest.raises(dst.ConfigError, match=r"^the model returns a value of .*Opaque, "):
                dst.predictor(net, state)(MAPS)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@BOTH
def test_flaxs_own_arguments_of_apply(execution):
    """method= by name and by function, capture_intermediates= and mutable=, with the statistics."""
    net, _, state = start(Returning(), execution, MAPS)
    seen = {}

    def loss(apply, batch):
        h = apply(batch[0], train=True, method="features")
        same = apply(batch[0], train=True, method=Returning.features)
        found, new = apply(
            batch[0], train=True, capture_intermediates=True, mutable=["intermediates"]
        )
        seen.update(jax.tree.map(jnp.shape, new["intermediates"]))
        gap = jnp.abs(h - same).max() + jnp.abs(h - found.aux["h"]).max()
        return entropy(found.logits, batch[1]), {"gap": gap}

    after, metrics = dst.make_update(net, TX, loss, devices=ONE)(state, (MAPS, Y))
    assert metrics["gap"] < 1e-5 and seen["h"] == ((8, 4),) and "head" in seen
    old, new = (s.batch_stats["batch_stats"]["norm"]["mean"] for s in (state, after))
    assert np.abs(new - old).max() > 0


# ----------------------------------------------------------------------------- a model to predict
class Noisy(nn.Module):
    """With a field that says whether it trains."""

    deterministic: bool = False
    hidden: int = 7

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(self.hidden)(x))
        h = nn.Dropout(0.5, deterministic=self.deterministic)(h)
        if not self.deterministic:
            h = h + jax.random.normal(self.make_rng("noise"), h.shape)
        return nn.Dense(5)(h)


@BOTH
def test_prediction_with_the_model_that_is_made_for_it(execution, tmp_path):
    loss = lambda apply, b: (entropy(apply(b[0]), b[1]), {})  # noqa: E731
    net, state, _ = trained(Noisy(), loss, execution)
    quiet = Noisy(deterministic=True)
    dst.export(net, state, tmp_path / "net.npz")
    logits = dst.predictor(net, state, model=quiet)(X)
    close(quiet.apply(dst.load(tmp_path / "net.npz"), X), logits)
    close(dst.predictor(net, tmp_path / "net.npz", model=quiet)(X), logits)
    keys = {"dropout": jax.random.key(1), "noise": jax.random.key(2)}
    noisy = Noisy().apply(dst.load(tmp_path / "net.npz"), X, rngs=keys)
    close(dst.predictor(net, state, rngs=keys)(X), noisy)
    with pytest.raises(
        dst.ConfigError, match=r"^model is of another network: params/Dense_0/bias is"
    ):
        dst.predictor(net, state, model=Noisy(True, hidden=8))
    with pytest.raises(
        dst.ConfigError, match=r"^model must be a flax\.linen module, not the class"
    ):
        dst.predictor(net, state, model=Noisy)


# ------------------------------------------------------------------------------------ tied heads
class Attending(nn.Module):
    """A head that is the embedding, by its own method."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 6, name="wte")
        return embed.attend(nn.Dense(6)(nn.relu(nn.Dense(9)(embed(tokens)))))


class Applying(nn.Module):
    """A head that is applied to the embedding, as in Hugging Face's GPT-2."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 6, name="wte")
        h = nn.Dense(6)(nn.relu(nn.Dense(9)(embed(tokens))))
        head = nn.Dense(12, use_bias=False, name="lm_head")
        return head.apply({"params": {"kernel": embed.embedding.T}}, h)


@BOTH
def test_a_head_tied_to_an_embedding_stays_dense_and_trains(execution):
    tokens = RNG.integers(0, 12, (8, 4)).astype(np.int32)
    loss = lambda apply, b: (entropy(apply(b[0]), b[1]), {})  # noqa: E731
    losses = []
    for model in (Attending(), Applying()):
        net, state, value = trained(model, loss, execution, tokens, tokens)
        assert list(net.layers) == ["Dense_0", "Dense_1"] and "wte/embedding" in net.dense
        first = start(model, execution, tokens)[2]
        moved = np.asarray(state.params["wte"]["embedding"] != first.params["wte"]["embedding"])
        assert moved.all()  # the head has a gradient on every row of the embedding
        losses.append(value)
    np.testing.assert_allclose(*losses, rtol=1e-5)
