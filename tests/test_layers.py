"""Kinds of layers: the protocol's defaults, and a kind that is added from outside the package."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.base import Part
from dst.connections.execution import described, forward
from dst.connections.initialised import init_rest
from dst.layers import Conv, Dense, Layer, register
from dst.layers.window import Window
from dst.methods.sample import group_by_shape
from dst.observe import gradient_on, observe
from tests import tiny
from tests.executions import ONE, close, structure
from tests.executions import dense as kernels_of

SHAPE = (4, 6, 3)  # sequences
X = jax.ShapeDtypeStruct(SHAPE, jnp.float32)


class Sequences(nn.Module):
    """The page's convolution, once under remat and once called twice, and a matrix behind it."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.remat(self.layer)(5, 2, name="first")(x))
        shared = self.layer(5, name="shared")
        return nn.Dense(5)(shared(h=nn.relu(shared(x))).mean(1))


class Biased(nn.Module):
    """A matrix, which nothing is told about, and a random bias that is made before it."""

    features: int
    width: int = 1

    @nn.compact
    def __call__(self, h):
        bias = self.param("bias", nn.initializers.normal(1), (self.features,))
        shape = (self.width, h.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1), shape)
        return h @ kernel.sum(0) + bias.reshape(1, 1, -1)


class BiasedLayer(Layer):
    module_type = Biased

    @classmethod
    def describe(cls, path, module, h):
        return cls(path, (module.width, h.shape[-1], module.features))

    def apply(self, h, kernel):
        return h @ kernel.sum(0)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE).astype(np.float32), rng.integers(5, size=4).astype(np.int32)


def started(layer, execution, name="gse", **options):
    method = dst.method(name, 0.5, every=2, end=12, **options)
    net = dst.network(Sequences(layer), X, execution=execution)
    return net, method, dst.init_state(net, tiny.SGD, method, jax.random.key(0))


def run(layer, execution, steps, name, **options):
    """Some steps, a rewire and a step: the connections before and after, weights, the report."""
    net, method, state = started(layer, execution, name, **options)
    update = dst.make_update(net, tiny.SGD, tiny.loss, devices=ONE)
    rewire = dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE)
    before = structure(state)
    for seed in range(steps):
        state, _ = update(state, batch_of(seed))
    state, report = rewire(state, batch_of(2))
    if steps:
        state, _ = update(state, batch_of(3))
    return before, structure(state), kernels_of(state), jax.device_get(report)


OPTIONS = [
    (2, "gse", {}),
    (1, "rigl", {"growth_memory": "streamed"}),
    (0, "gse", {"heuristic": "graest"}),
    (0, "gse", {"heuristic": "synflow"}),
]


@pytest.mark.parametrize(("steps", "name", "options"), OPTIONS, ids=str)
def test_a_kind_of_ones_own_trains_and_both_executions_choose_the_same(page, steps, name, options):
    layer = page["Conv1d"]
    before, after, weights, report = run(layer, "masked", steps, name, **options)
    _, other, also, again = run(layer, "sparse", steps, name, **options)
    assert int(report["grown"]) > 10 and report == again
    assert all((before[path] != after[path]).any() for path in ("first", "shared"))
    for path, mask in after.items():
        np.testing.assert_array_equal(mask, other[path])
    close(weights, also)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("name", ["Conv1d", "Biased"])
def test_its_gradient_on_S_is_that_of_autodiff(page, name, execution):
    """Two calls are summed; from what `observe` holds it is the same, and 0 of no call."""
    register(BiasedLayer)
    net, _, state = started({**page, "Biased": Biased}[name], execution)
    x, mix = batch_of(1)[0], np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    dense = {**state.params, **{p: dict(state.params.get(p, {})) for p in net.layers}}
    for path, kernel in kernels_of(state).items():
        dense[path]["kernel"] = kernel
    dense.pop("arena", None)
    G = jax.grad(lambda p: (net.model.apply({"params": p}, x) * mix).sum())(dense)

    @jax.jit
    def look(state):
        run = lambda extra: forward(net, state.params, state.masks, extra, x)  # noqa: E731
        loss = lambda extra: (run(extra) * mix).sum()  # noqa: E731
        S = {path: jnp.arange(layer.size)[::2] for path, layer in net.layers.items()}
        return gradient_on(net.layers, loss, S), observe(net.layers, loss)

    found, seen = look(state)
    for path, layer in net.layers.items():
        expected = np.ravel(G[path]["kernel"])[::2]
        assert np.abs(expected).max() > 0.03
        pairs = jnp.divmod(jnp.arange(layer.size)[::2], layer.n_out)
        close(found[path], expected)
        close(layer.gradient_at(*seen[path], *pairs), expected)
        np.testing.assert_array_equal(layer.gradient_at(*layer.never_called(), *pairs), 0)


def test_its_bias_is_drawn_as_in_masked_execution_and_its_kernel_left_out(registry):
    register(BiasedLayer)
    (net, _, masked), (_, _, sparse) = (started(Biased, e) for e in ("masked", "sparse"))
    for path in ("first", "shared"):
        assert type(net.layers[path]) is BiasedLayer and set(sparse.params[path]) == {"bias"}
        ours, theirs = (np.asarray(s.params[path]["bias"]) for s in (sparse, masked))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.any()
    assert "kernel" not in str(jax.tree_util.tree_structure(jax.eval_shape(
        lambda key: init_rest(net, key)["params"], jax.random.key(0)
    )))  # fmt: skip


def test_the_log_says_that_it_is_expanded(page):
    net, _, state = started(page["Conv1d"], "sparse")
    said = described(net, state.params, state.masks, state.batch_stats)
    assert said.endswith("2 of 2 Conv1dLayer layers are expanded")


# ------------------------------------------------------------------------------- the defaults
class Plain(Layer):
    """The product of a matrix, and all defaults."""

    apply = Dense.apply


class PlainConv(Conv):
    """A convolution by the defaults: all but `apply` and what describes it."""

    by_unit, gradient_at, gradient_block = Layer.by_unit, Layer.gradient_at, Layer.gradient_block
    signed_sums, never_called = Layer.signed_sums, Layer.never_called


UNEVEN, PADDED = Window((2, 1), "SAME", (1, 2)), Window((1, 1), ((2, 0), (0, 1)), (1, 1))
CASES = {
    "dense": (Dense, Plain, (5, 3), {}, (4, 5)),
    "sequence": (Dense, Plain, (5, 3), {}, (2, 4, 5)),
    "conv": (Conv, PlainConv, (3, 2, 2, 3), {"window": UNEVEN}, (2, 5, 6, 2)),
    "padded": (Conv, PlainConv, (2, 2, 2, 3), {"window": PADDED}, (1, 3, 4, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_defaults_are_what_the_built_in_kinds_compute(case):
    """On small integers, whose sums are exact."""
    kind, default, shape, fields, size = CASES[case]
    own, general = kind("a", shape, **fields), default("a", shape, **fields)
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)  # noqa: E731
    h = draw(size)
    y = own.apply(h, draw(shape))
    assert y.shape == own.output(h, jnp.float32).shape == general.output(h, jnp.float32).shape
    np.testing.assert_array_equal(own.apply_fast(h, jnp.ones(shape)), own.apply(h, jnp.ones(shape)))
    delta = draw(y.shape)
    column, output = jnp.divmod(jnp.arange(own.size), own.n_out)
    units, by_default = own.by_unit(h, delta), general.by_unit(h, delta)
    assert (own.columns, own.places) == (own.size // own.n_out, (*shape[:-2], 1, 1)[:2])
    G = own.gradient_at(*units, column, output)
    np.testing.assert_array_equal(general.gradient_at(*by_default, column, output), G)
    for corner in itertools.product(*map(range, own.places), (0, 1), (0, 1)):
        at, block = jnp.asarray(corner, jnp.int32), (1, 2)
        np.testing.assert_array_equal(
            general.gradient_block(*by_default, at, block), own.gradient_block(*units, at, block)
        )
    if case != "sequence":  # whose rows are one axis by unit, and two by default
        sign = draw(units[1].shape[1:])
        for a, b in zip(
            own.signed_sums(*units, sign), general.signed_sums(*by_default, sign), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_sketch_by_the_defaults_is_unbiased(page):
    """The mean of f g over all signs is the gradient, exactly."""
    layer = page["Conv1dLayer"]("a", (2, 3, 2))
    rng = np.random.default_rng(0)
    h, delta = (2 * rng.integers(-2, 3, (n, 2, 4)).astype(np.float32) for n in (3, 2))
    signs = jnp.float32([*itertools.product((-1, 1), repeat=8)]).reshape(-1, 2, 4)
    f, g = jax.vmap(lambda r: layer.signed_sums(h, delta, r))(signs)
    G = layer.kernel_gradient(h, delta)
    assert jnp.abs(G).max() > 1
    mean = np.einsum("sc,so->co", f, g) / len(signs)
    np.testing.assert_array_equal(mean.reshape(G.shape), G)


def test_layers_of_two_kinds_are_never_equal_and_can_be_keys():
    same, other = Dense("a", (2, 3)), Plain("a", (2, 3))
    assert same == Dense("a", (2, 3)) and hash(same) == hash(Dense("a", (2, 3)))
    assert same != other and len({same, other, Conv("a", (2, 3))}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.path = "b"


def test_layers_of_one_shape_that_are_read_unlike_share_no_sampler():
    parts = [Part(kind("a", (4, 4)), 4, 4 * l) for l, kind in enumerate((Dense, Plain, Dense))]
    assert group_by_shape(parts) == [[0, 2], [1]]


def test_an_optimizer_works_on_it_in_sparse_execution(page):
    net = dst.network(Sequences(page["Conv1d"]), X, execution="sparse")
    state = dst.init_state(net, optax.adam(1e-3), dst.method("set", 0.5), jax.random.key(0))
    assert state.params["arena"]["kernel"].shape == state.masks.column.shape
