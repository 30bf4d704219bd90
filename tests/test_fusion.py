"""What kernels compute at once, against the same model without fusing: values and all gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst import observe as probes
from dst.connections import execution, fusion
from dst.connections.arena import positions
from dst.connections.backends import cpp as kernels
from dst.connections.execution import forward
from dst.layers import Conv
from tests import tiny
from tests.convolutions import near, normal
from tests.executions import dense

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())

conv = functools.partial(nn.Conv, 6, (3, 3), use_bias=False)
norm = functools.partial(
    nn.BatchNorm, False, scale_init=nn.initializers.normal(1.0), bias_init=nn.initializers.normal()
)


class Model(nn.Module):
    """The body, between a first convolution and a head."""

    body: object

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(name="first_norm")(conv(name="first")(x)))
        x = self.body(x)
        return nn.Dense(4, name="head")(x.reshape(len(x), -1))


def parts(body, side=8):
    """A sparse network, its state and a batch of 10 images."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    net = dst.network(Model(body), image, execution="sparse")
    state = dst.init_state(net, tiny.SGD, dst.method("gse", 0.5), jax.random.key(0))
    return net, state, normal(np.random.default_rng(0), 10, side, side, 3)


def both(net, state, images):
    """(logits, new statistics, gradients of parameters and images), fused and not; the count."""
    found, counts = [], []
    options = {"mutable": list(state.batch_stats), "rngs": {"dropout": jax.random.key(3)}}
    weight = normal(np.random.default_rng(1), len(images), 4)
    for one in (net, net._replace(fuse=False)):

        def loss(params, images, one=one):
            logits, new = forward(
                one, params, state.masks, state.batch_stats, images, seen=counts.append, **options
            )
            # Through the running averages, too.
            others = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(new))
            return jnp.sum(weight * logits) + others, (logits, new)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        found.append(run(state.params, images))
    return found[0], found[1], sum(counts)


def same(body, tolerance):
    """How many convolutions are fused in a model that is the same with and without."""
    fused, plain, count = both(*parts(body))
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        # Some gradients, as a bias' before a norm, are 0 but for rounding.
        assert np.linalg.norm(a - b) <= tolerance * (np.linalg.norm(b) + 0.1 * np.sqrt(b.size))
    return count


def residual(x):
    y = nn.relu(norm()(conv()(x)))
    return nn.relu(norm()(conv()(y)) + x)


def two_readers(x):
    u = norm()(conv()(x))
    return nn.relu(u) + 2 * u


def two_relus(x):
    u = norm()(conv()(x))
    return conv(name="a")(nn.relu(u)) + norm()(conv(name="b")(nn.relu(u)))


def called_twice(x):
    layer, own = conv(), norm()
    return nn.relu(own(layer(nn.relu(own(layer(x))))))


def with_dropout(x):
    return conv()(nn.Dropout(0.5, deterministic=False)(nn.relu(norm()(conv()(x)))))


def at_zero(x):
    """A norm whose scale and bias are 0, so that u is: where the two ReLUs differ."""
    zeros = {"scale_init": nn.initializers.zeros, "bias_init": nn.initializers.zeros}
    return conv()(jnp.maximum(norm(**zeros)(conv()(x)), 0) + nn.relu(norm(**zeros)(conv()(x))))


pool = functools.partial(nn.max_pool, strides=(2, 2))
# Bodies that follow each other in one model, each with the number of its convolutions that fuse.
BODIES = {
    "relu": [
        (lambda x: nn.relu(norm()(conv()(x))), 1),
        (lambda x: nn.relu(norm()(conv(strides=(1, 2), padding="VALID")(x))), 1),
        (lambda x: conv()(nn.relu6(norm()(conv()(x)))), 1),
        (lambda x: conv()(jnp.maximum(norm()(conv()(x)), 0)), 1),
        (at_zero, 2),
    ],
    "additions": [
        (residual, 2),
        (residual, 2),
        (lambda x: nn.relu(norm()(conv()(x)) + norm()(conv()(x))), 2),
        (lambda x: nn.tanh(norm()(conv()(x)) + x), 1),
        (lambda x: nn.relu(norm()(conv()(x)) + x[:, :1]), 1),
        (lambda x: nn.relu(norm()(conv()(x) + x)), 0),
    ],
    "readers": [
        (two_readers, 1),
        (two_relus, 2),
        (called_twice, 2),
        (lambda x: (lambda y: norm()(y) * y)(conv(use_bias=True)(x)), 0),
        (lambda x: norm()(conv()(x)).mean((1, 2)), 1),
    ],
    "pooling": [
        (lambda x: pool(nn.relu(norm()(conv()(x))), (2, 2)), 1),
        (lambda x: nn.relu(pool(norm()(conv()(x)), (2, 2))), 1),
        (lambda x: jnp.repeat(pool(nn.relu(conv(use_bias=True)(x)), (2, 2)), 2, 1), 0),
        (lambda x: nn.max_pool(nn.relu(norm()(conv()(x))), (3, 3), padding="SAME"), 1),
        (lambda x: nn.avg_pool(nn.relu(norm()(conv()(x))), (2, 1)), 1),
    ],
    "kinds": [
        (lambda x: nn.relu(norm()(conv(feature_group_count=3)(x))), 1),
        (lambda x: nn.relu(norm()(nn.Conv(6, (7, 7), feature_group_count=6)(x))), 1),
        (lambda x: nn.relu(norm()(nn.Conv(6, (3, 2, 2))(x[..., None, :])))[..., 0, :], 0),
        (lambda x: nn.relu(norm()(nn.Conv(6, (14,))(x))), 0),
    ],
    "norms": [
        (lambda x: nn.relu(norm()(conv(use_bias=True)(x))), 1),
        (lambda x: nn.relu(norm(use_scale=False, use_bias=False)(conv()(x))), 1),
        (lambda x: nn.relu(conv()(x)), 0),
        (lambda x: norm(dtype=jnp.bfloat16)(conv()(x)).astype(jnp.float32), 0),
        (lambda x: nn.BatchNorm(True)(conv()(x)), 0),
        (with_dropout, 1),
        (lambda x: nn.remat(conv)()(nn.relu(norm()(conv()(x)))), 1),
    ],
}


@pytest.mark.parametrize("name", BODIES)
def test_a_fused_model_is_the_same_model(name):
    def body(x):
        for part, _ in BODIES[name]:
            x = part(x)
        return x

    count = same(body, 2e-5)
    assert count == 1 + sum(count for _, count in BODIES[name])


STEPS = {
    "conv": lambda x, _: conv()(x),
    "bias": lambda x, _: conv(use_bias=True)(x),
    "norm": lambda x, _: norm()(x),
    "relu": lambda x, _: nn.relu(x),
    "maximum": lambda x, _: jnp.maximum(x, 0.1 * x),
    "add": lambda x, before: x + before if x.shape == before.shape else x,
    "pool": lambda x, _: pool(x, (2, 2)) if min(x.shape[1:3]) > 1 else x,
    "tanh": lambda x, _: nn.tanh(x),
}


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=6, max_size=12), st.integers(0, 3))
def test_any_model_is_the_same_model(names, back):
    """Operations drawn at random; an addition is of what there was `back` steps before."""

    def body(x):
        before = [x]
        for name in names:
            before.append(STEPS[name](before[-1], before[max(0, len(before) - 1 - back)]))
        return before[-1]

    same(body, 1e-4)


def test_gradients_of_a_fused_model_are_those_of_float64():
    """On a seed where no ReLU and no maximum changes sides."""
    net, state, images = parts(lambda x: pool(residual(x), (2, 2)))
    weight = normal(np.random.default_rng(1), len(images), 4)
    full = {k: dict(v) for k, v in state.params.items() if k != "arena"}
    for path, kernel in dense(state).items():
        full.setdefault(path, {})["kernel"] = kernel

    def gradients(run, params, images, stats):
        options = {"mutable": list(stats)}
        loss = lambda params, images: (weight * run(params, images, stats, options)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, images)

    def fused(params, images, stats, options):
        return forward(net, params, state.masks, stats, images, **options)[0]

    def plain(params, images, stats, options):
        return net.model.apply({"params": params, **stats}, images, **options)[0]

    found, d_images = gradients(fused, state.params, images, state.batch_stats)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (full, images, state.batch_stats))
        wanted, d_wide = gradients(plain, *wide)
    pairs = [(d_images, d_wide)]
    for part in state.masks.parts:
        here, where = positions(state.masks, part)
        kernel = np.asarray(wanted[part.layer.path]["kernel"]).reshape(-1)
        pairs.append((found["arena"]["kernel"][here], kernel[where]))
    pairs += [(found[n][leaf], wanted[n][leaf]) for n in found if n != "arena" for leaf in found[n]]
    for a, b in pairs:
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 2e-5 * np.linalg.norm(b)


def test_a_rewire_sees_the_same_in_a_fused_model():
    """Sums of |h| and |delta|, and the gradient on S, of maps that no kernel stores."""

    def body(x):
        x = pool(residual(two_readers(x)), (2, 2))
        x = nn.relu(norm()(conv(feature_group_count=3)(x)))
        return nn.relu(norm()(conv(use_bias=True)(conv()(x))))

    net, state, images = parts(body)
    rng, found = np.random.default_rng(2), []
    S = {p: rng.integers(layer.size, size=40, dtype=np.int32) for p, layer in net.layers.items()}
    weight = normal(rng, len(images), 4)
    for one in (net, net._replace(fuse=False)):
        count: list[int] = []

        def look(params, one=one, count=count):
            def loss(extra):
                collections = {**state.batch_stats, **extra}
                options = {"frozen": True, "mutable": list(state.batch_stats), "seen": count.append}
                y, _ = forward(one, params, state.masks, collections, images, **options)
                return jnp.sum(weight * y)

            maps = {path: layer for path, layer in one.layers.items() if isinstance(layer, Conv)}
            _, sums = probes.observe_and_sum({}, maps, loss, reads_maps=True)
            return sums, probes.gradient_on(one.layers, loss, S)

        found.append(jax.jit(look)(state.params))
        assert set(count) == ({6} if one.fuse else set())
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        near(np.asarray(a), np.asarray(b), 2e-5)


@jax.custom_jvp
def straight_through(x):
    """Looks like nn.relu forwards."""
    return jnp.maximum(x, 0)


straight_through.defjvps(lambda g, answer, x: g)


def test_only_relu_counts_as_relu():
    x = jnp.zeros((2, 3))

    def recognised(f):
        jaxpr = jax.make_jaxpr(f)(x).jaxpr
        return any(fusion.is_relu(jaxpr, eqn) for eqn in jaxpr.eqns)

    assert recognised(nn.relu) and recognised(lambda x: 2 * jax.nn.relu(x + 1))
    others = (jax.nn.relu6, straight_through, nn.silu, lambda x: jnp.maximum(x, 0), nn.leaky_relu)
    assert not any(map(recognised, others))


def test_the_log_counts_what_is_fused():
    net, state, _ = parts(residual)
    said = execution.described(net, state.params, state.masks, state.batch_stats)
    assert said == "compiled kernels; 3 of 3 convolutions are fused with their batch normalisation"
    net = net._replace(fuse=False)
    said = execution.described(net, state.params, state.masks, state.batch_stats)
    assert said == "compiled kernels"


def test_a_rewire_holds_no_more_maps_than_a_step():
    """Else both of its passes would be held at once."""

    def body(x):
        for _ in range(4):
            x = nn.relu(norm()(conv()(x)))
        return pool(pool(x, (2, 2)), (2, 2))

    net, state, _ = parts(body, side=16)
    method, state = dst.method("gse", 0.5), jax.device_get(state)
    images = np.zeros((64, 16, 16, 3), np.float32)

    def loss(apply, batch):
        return (apply(batch[0]) ** 2).mean(), {}

    def planned(program, *rest):
        step = jax.pmap(
            program, axis_name="devices", in_axes=(None, 0, *[None] * len(rest)), out_axes=None,
            devices=jax.local_devices()[:1],
        )  # fmt: skip
        compiled = step.lower(state, (images[None],), *rest).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    step = planned(dst.update.update_body(net, tiny.SGD, loss))
    rewire = planned(dst.rewire.rewire_body(net, tiny.SGD, method, loss), {})
    assert rewire < 1.4 * step
