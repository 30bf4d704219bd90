"""Networks whose convolutions and batch norms run in the kernels, against Flax and float64."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.connections import execution
from dst.connections.arena import positions
from dst.connections.backends import cpp as kernels
from dst.connections.execution import forward
from dst.connections.normalization import normalise
from tests import tiny
from tests.convolutions import near, normal
from tests.executions import ONE, both, close, dense

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())


# ------------------------------------------------------------------------------ batch normalisation
def test_normalisation_is_flax_s_with_all_its_gradients():
    """Values, running averages, gradients of x, scale and bias, and through the averages."""
    rng = np.random.default_rng(11)
    x, weight = 1 + normal(rng, 6, 4, 3, 5), normal(rng, 6, 4, 3, 5)
    variables = {"params": {"scale": normal(rng, 5), "bias": normal(rng, 5)}}
    variables["batch_stats"] = {"mean": normal(rng, 5), "var": normal(rng, 5) ** 2}

    def objective(own, params, x):
        module = nn.BatchNorm(use_running_average=False, dtype=x.dtype, param_dtype=x.dtype)
        stats = jax.tree.map(lambda a: a.astype(x.dtype), variables["batch_stats"])
        given = {"params": params, "batch_stats": stats}
        call = module.apply
        if own:
            maps = execution.sparse_layers(arena, jnp.zeros(1), False)
            call = lambda *args, **kwargs: intercepted(maps, module, *args, **kwargs)  # noqa: E731
        y, new = call(given, x, mutable=["batch_stats"])
        stats = new["batch_stats"]
        return (weight * y).sum() + (y[0] ** 2).sum() + (stats["mean"] * stats["var"]).sum(), new

    def intercepted(maps, module, *args, **kwargs):
        with nn.intercept_methods(maps):
            return module.apply(*args, **kwargs)

    arena = tiny.setup(execution="sparse").state.masks
    text = jax.jit(functools.partial(objective, True)).lower(variables["params"], x).as_text()
    assert text.count("dst_channel_sums") == 1
    gradients = lambda own: jax.jit(  # noqa: E731
        jax.value_and_grad(functools.partial(objective, own), argnums=(0, 1), has_aux=True)
    )
    found = gradients(True)(variables["params"], x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64), (variables["params"], x))
        wanted = gradients(False)(*wide)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        near(np.asarray(a), np.asarray(b), 2e-6)


def test_a_dead_channel_has_finite_gradients():
    x = jnp.zeros((4, 2, 2, 3))
    ones = jnp.ones(3)
    gradient = jax.grad(lambda x: normalise(1e-5, x, ones, ones)[0][..., 0].sum())(x)
    assert np.isfinite(gradient).all()


# -------------------------------------------------------------------------------- a whole network
class Net(nn.Module):
    """Convolutions of several kinds with bias, batch norm, pooling, an addition and a head."""

    channels: int = 6
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.channels, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, not train, dtype=self.dtype)
        x = nn.relu(norm()(conv((3, 3), padding=1, use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        y = nn.remat(nn.Conv)(self.channels, (3, 2), kernel_dilation=2, dtype=self.dtype)(x)
        x = nn.relu(norm()(y) + x)
        x = nn.relu(conv((5, 5), strides=(2, 1), padding="VALID")(x))
        return nn.Dense(4, dtype=self.dtype)(x.reshape(x.shape[0], -1))


def network_of(channels=6, sparsity=0.7, side=12):
    """The parts of a sparse run on `Net`, and a batch."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    net = dst.network(Net(channels), image, train=False, execution="sparse")
    method = dst.method("gse", sparsity, every=2, end=12)
    state = dst.init_state(net, tiny.SGD, method, jax.random.key(0))
    rng = np.random.default_rng(0)
    return net, method, state, (normal(rng, 10, side, side, 3), rng.integers(4, size=10))


def test_a_network_s_gradients_are_those_of_the_expanded_path_and_of_float64(monkeypatch):
    net, _, state, (images, labels) = network_of()

    def gradients(run, params, images):
        def loss(params):
            logits, new = run(params, images)
            return tiny.loss(lambda *_, **__: logits, (images, labels))[0], new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def sparse(params, images):
        options = {"train": True, "mutable": ["batch_stats"]}
        return forward(net, params, state.masks, state.batch_stats, images, **options)

    (loss, stats), found = gradients(sparse, state.params, images)
    monkeypatch.setattr(execution, "covered", lambda *_: False)
    (other_loss, other_stats), other = gradients(sparse, state.params, images)
    close((loss, stats, found), (other_loss, other_stats, other))
    full = {k: v for k, v in state.params.items() if k != "arena"}
    full = {name: dict(full.get(name, {})) for name in {**full, **net.layers}}
    for path, kernel in dense(state).items():
        full[path]["kernel"] = kernel
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)  # noqa: E731
        model = Net(dtype=jnp.float64)

        def exact(params, images):
            variables = {"params": params, **wide(state.batch_stats)}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        (loss64, _), wanted = gradients(exact, wide(full), wide(images))
    np.testing.assert_allclose(loss, loss64, rtol=1e-6)
    for part in state.masks.parts:
        here, where = positions(state.masks, part)
        flat = np.asarray(wanted[part.layer.path]["kernel"]).reshape(-1)[where]
        error = np.linalg.norm(found["arena"]["kernel"][here] - flat) / np.linalg.norm(flat)
        assert error <= 2e-5, part.layer.path
    for name in (n for n in found if n != "arena"):
        for leaf in found[name]:
            # That of a bias before a batch norm is 0.
            np.testing.assert_allclose(found[name][leaf], wanted[name][leaf], 2e-5, 1e-6)


def step_text(net, state, data):
    """The compiled step."""
    body = dst.update.update_body(net, tiny.SGD, tiny.loss)
    step = jax.pmap(body, axis_name="devices", in_axes=(None, 0), out_axes=None, devices=ONE)
    data = jax.tree.map(lambda a: a[None], data)
    return step.lower(state, data).compile().as_text()


def test_no_buffer_of_the_step_has_the_size_of_a_dense_kernel():
    net, _, state, (images, labels) = network_of(channels=64, sparsity=0.98, side=12)
    text = step_text(net, state, (images[:1], labels[:1]))
    assert text.count('custom_call_target="dst_convolve') == 6
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
    assert largest < 5 * 5 * 64 * 64 // 8


class Chain(nn.Module):
    """Convolutions with batch norm and elementwise operations between them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(2 * nn.Conv(8, (3, 3))(x) + x)
        return nn.Conv(7, (3, 3), strides=4)(x).mean((1, 2))


def test_maps_stay_as_they_lie_between_convolutions():
    """No copy and no other layout of a map (16, 10, 9, 8) in the whole step."""
    net = dst.network(
        Chain(), jax.ShapeDtypeStruct((1, 10, 9, 3), np.float32), train=False, execution="sparse"
    )
    state = dst.init_state(net, tiny.SGD, dst.method("gse", 0.8), jax.random.key(0))
    rng = np.random.default_rng(0)
    data = normal(rng, 16, 10, 9, 3), rng.integers(7, size=16)
    text = step_text(net, state, data)
    layouts = re.findall(r"f32\[16,10,9,8\](\{[\d,]+\})", text)
    assert len(layouts) > 20 and set(layouts) == {"{0,3,2,1}"}
    assert not re.findall(r"= f32\[16,10,9,8\]\S* (?:copy|transpose)\(", text)


class Uncovered(nn.Module):
    """A kernel that is too large, a layer in bfloat16, and one that the kernels compute."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(4, (33, 1), name="large")(x)
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16, name="narrow")(x).astype(jnp.float32)
        return nn.Dense(3)(nn.Conv(4, (3, 3), name="plain")(x).mean((1, 2)))


def test_what_the_kernels_do_not_cover_is_expanded_and_said(monkeypatch, caplog):
    net = dst.network(Uncovered(), jnp.zeros((1, 5, 5, 2)), execution="sparse")
    state = dst.init_state(net, tiny.SGD, dst.method("gse", 0.5), jax.random.key(0))
    described = lambda s, n: execution.described(n, s.params, s.masks, s.batch_stats)  # noqa: E731
    assert described(state, net) == "compiled kernels; 2 of 3 convolutions are expanded"
    run = lambda x: forward(net, state.params, state.masks, {}, x)  # noqa: E731
    text = jax.jit(run).lower(jnp.zeros((2, 5, 5, 2))).as_text()
    assert text.count("@dst_convolve(") == 1
    assert run(jnp.zeros((0, 5, 5, 2))).shape == (0, 3)
    other = tiny.setup(execution="sparse")
    assert described(other.state, other.net) == "compiled kernels"
    for one in (net, other.net, tiny.setup().net):  # without a command line, by what is slower
        dst.make_update(one, tiny.SGD, tiny.loss)
    assert caplog.messages == ["Sparse execution: 2 of 3 convolutions are expanded."]
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no compiler")
    assert described(state, net).endswith("no compiler; 3 of 3 convolutions are expanded")
    assert execution.slower(net).startswith("pure JAX, as there is no compiler; 3 of 3 conv")


def test_batch_norm_on_four_devices_is_that_of_masked_execution():
    """Each device normalises its own rows; weights and averaged statistics after two steps."""
    ends = []
    for s in both("set"):
        update = dst.make_update(s.net, s.tx, tiny.loss)
        state = update(update(s.state, tiny.batch(1))[0], tiny.batch(2))[0]
        ends.append((dense(state), state.batch_stats))
    close(ends[0], ends[1])


class Remat(nn.Module):
    """A convolution and its batch norm computed again in the backward pass."""

    @nn.compact
    def __call__(self, x, train: bool):
        block = nn.remat(Block, static_argnums=(2,))
        return nn.Dense(5)(block(name="block")(x, train).reshape(len(x), -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))


def test_under_remat_it_is_that_of_masked_execution():
    ends = []
    for way in ("masked", "sparse"):
        net = dst.network(Remat(), tiny.IMAGE, train=False, execution=way)
        method = dst.method("set", 0.5, every=2, end=8)
        state = dst.init_state(net, tiny.SGD, method, jax.random.key(0))
        loss = lambda apply, b: tiny.loss(lambda x, train: apply(x, train), b)  # noqa: E731
        update = dst.make_update(net, tiny.SGD, loss, devices=ONE)
        state = update(update(state, tiny.batch(1))[0], tiny.batch(2))[0]
        ends.append((dst.predictor(net, state)(tiny.batch(3)[0]), state.batch_stats))
    close(ends[0], ends[1])
