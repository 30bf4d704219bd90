"""Probes against dense autodiff and brute force, through every way a layer can be called."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dst import observe as probes
from dst.discovery import network
from dst.layers import base

CONVS = {
    "same": {"kernel_size": (3, 3)},
    "valid": {"kernel_size": (3, 3), "padding": "VALID", "use_bias": False},
    "one_by_one": {"kernel_size": (1, 1), "strides": 2},
    "strided_same": {"kernel_size": (3, 3), "strides": (2, 2)},  # pads one side only
    "unequal_strides": {"kernel_size": (2, 3), "strides": (3, 2), "padding": "VALID"},
    "wide": {"kernel_size": (1, 5), "padding": 2},
    "pairs": {"kernel_size": (4, 2), "padding": ((0, 2), (3, 1)), "strides": (2, 1)},
    "ints": {"kernel_size": (3, 2), "padding": (1, 0)},
    "dilated": {"kernel_size": (3, 2), "kernel_dilation": (2, 3)},
    "dilated_strided": {
        "kernel_size": (2, 2),
        "kernel_dilation": 2,
        "strides": 2,
        "padding": [(2, 1), 1],
    },
}


def head(outputs, mix):
    """A scalar whose gradient differs at every output."""
    flat = jnp.concatenate([o.ravel() for o in outputs]).astype(mix.dtype)
    return jnp.sum(jnp.sin(flat + mix[: flat.size]) * mix[: flat.size])


class Layers(nn.Module):
    """Every covered kind of Dense and Conv, side by side, on x (2, 7, 6, 3)."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, mix):
        conv = functools.partial(nn.Conv, 2, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        out = [conv(**options, name=name)(x) for name, options in CONVS.items()]
        out.append(conv((3, 3), name="unbatched")(x[0]))
        out.append(conv((3, 3), strides=(2, 1), name="leading")(x.reshape(1, 2, 1, 7, 6, 3)))
        out.append(dense(3, name="rows")(x.reshape(2, -1)))
        out.append(dense(4, use_bias=False, name="sequence")(x.reshape(2, 14, 9)))
        out.append(dense(2, name="keyword")(inputs=x[0]))
        out.append(dense(2, name="vector")(x[0, 0, 0]))
        return head(out, mix)


class Pair(nn.Module):
    """A convolution and a Dense made in setup()."""

    def setup(self):
        self.conv = nn.Conv(3, (3, 3), strides=2)
        self.dense = nn.Dense(3)

    def __call__(self, x):
        return self.dense(nn.leaky_relu(self.conv(x)))


class Structure(nn.Module):
    """Layers under remat (if `lifted`), shared, in Sequential, and in setup()."""

    lifted: bool

    @nn.compact
    def __call__(self, x, mix):
        lift = nn.remat if self.lifted else lambda module: module
        x = lift(nn.Conv)(3, (3, 3), name="remat_layer")(x)
        x = nn.Dense(3, name="dense")(nn.leaky_relu(x))
        x = lift(Pair)(name="remat_block")(x)
        x = Pair(name="block")(jnp.concatenate([x, x], 1))
        shared = nn.Dense(3, name="shared")
        x = shared(nn.leaky_relu(shared(x[:, :1])))
        x = nn.Sequential([nn.Dense(4, name="first"), nn.leaky_relu, nn.Dense(3, name="last")])(x)
        return head([x], mix)


@functools.lru_cache
def setting(model):
    """(network, float64 variables, x, mix) as NumPy arrays, so that they fit any precision."""
    rng = np.random.default_rng(0)
    x, mix = rng.normal(size=(2, 7, 6, 3)), rng.normal(size=3000)
    net = network(model, jnp.zeros(x.shape), jnp.zeros(mix.shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(x.shape), jnp.zeros(mix.shape))
    variables = jax.tree.map(lambda a: 0.6 * rng.normal(size=a.shape), shapes)
    return net, variables, x, mix


@functools.lru_cache
def by_call(model):
    """{path: [(h, delta) of each call]} and {path: dL/dw} by plain autodiff in float64."""
    net, variables, x, mix = setting(model)

    def record(nudges):
        calls = {}

        def interceptor(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            path = "/".join(context.module.path)
            if path not in net.layers or context.method_name != "__call__":
                return y
            call = f"{path}:{len(calls):03}"
            calls[call] = (args[0] if args else kwargs["inputs"], y)
            return y + nudges[call] if nudges else y

        with nn.intercept_methods(interceptor):
            return model.apply(variables, x, mix), calls

    with jax.enable_x64(True):
        calls = jax.eval_shape(lambda: record(None)[1])
        zeros = {call: jnp.zeros(y.shape) for call, (_, y) in calls.items()}
        deltas, seen = jax.jit(jax.grad(record, has_aux=True))(zeros)
        dense = jax.jit(jax.grad(lambda v: model.apply(v, x, mix)))(variables)["params"]
    found = {path: [] for path in net.layers}
    for call in calls:
        found[call.split(":")[0]].append((np.asarray(seen[call][0]), np.asarray(deltas[call])))
    assert all(found.values())
    kernel = lambda path: functools.reduce(lambda tree, name: tree[name], path.split("/"), dense)  # noqa: E731
    return found, {path: np.asarray(kernel(path)["kernel"]) for path in found}


def brute_force(model):
    """{path: (sum |h|, sum |delta|, dL/dw)}; calls are summed."""
    calls, kernels = by_call(model)
    total = lambda a: np.abs(a).reshape(-1, a.shape[-1]).sum(0)  # noqa: E731
    return {
        path: (sum(total(h) for h, _ in each), sum(total(d) for _, d in each), kernels[path])
        for path, each in calls.items()
    }


def loss_of(net, variables, x, mix):
    return lambda extra: net.model.apply({**variables, **extra}, x, mix)


def subsets(net, keep=1.0):
    """Flat positions of every layer, in no order: all of them, or the first share of them."""
    rng = np.random.default_rng(1)
    return {
        path: jnp.asarray(rng.permutation(layer.size)[: int(keep * layer.size)], jnp.int32)
        for path, layer in net.layers.items()
    }


def assert_close(found, expected, path, tolerance):
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=path)


def check(net, expected, fg=None, G=None, S=None, tolerance=1e-5):
    """Marginals and gradients of every layer against brute force."""
    for path, (f, g, kernel) in expected.items():
        if fg is not None:
            assert_close(fg[path][0], f, path, tolerance)
            assert_close(fg[path][1], g, path, tolerance)
        if G is not None:
            assert G[path].dtype == jnp.float32
            assert_close(G[path], kernel.ravel()[np.asarray(S[path])], path, tolerance)


@pytest.mark.parametrize("model", [Layers(), Structure(True)], ids=["layers", "structure"])
def test_sums_and_gradients_are_those_of_dense_autodiff(model):
    net, variables, x, mix = setting(model)
    expected = brute_force(Structure(False) if isinstance(model, Structure) else model)
    S = subsets(net)
    with jax.enable_x64(True):
        loss = loss_of(net, variables, x, mix)
        fg = jax.jit(lambda: probes.marginals(net.layers, loss))()
        G = jax.jit(lambda S: probes.gradient_on(net.layers, loss, S))(S)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(fg))
    check(net, expected, fg, G, S, 2e-6)


def test_bfloat16_layers_give_float32_sums():
    net, variables, x, mix = setting(Layers(jnp.bfloat16))
    single = jax.tree.map(jnp.float32, variables)
    S = subsets(net)
    loss = loss_of(net, single, jnp.float32(x), jnp.float32(mix))
    fg = jax.jit(lambda: probes.marginals(net.layers, loss))()
    G = jax.jit(lambda: probes.gradient_on(net.layers, loss, S))()
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(fg))
    check(net, brute_force(Layers()), fg, G, S, 0.1)


def test_a_sum_of_many_bfloat16_terms_is_not_rounded_away():
    # In bfloat16 a sum of ones stops at 256, and 4099 is 4096.
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, dtype=jnp.bfloat16, name="dense")(x)

    x = jnp.ones((4099, 3), jnp.bfloat16)
    net = network(Wide(), x)
    kernel = {"params": {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
    loss = lambda extra: jnp.sum(net.model.apply({**kernel, **extra}, x).astype(jnp.float32))  # noqa: E731
    f, g = probes.marginals(net.layers, loss)["dense"]
    G = probes.gradient_on(net.layers, loss, {"dense": jnp.arange(6)})["dense"]
    for found in (f, g, G):
        np.testing.assert_array_equal(found, np.full(found.shape, 4099, np.float32))


def test_chunks_with_a_remainder_and_subsets_of_nothing(monkeypatch):
    net, variables, x, mix = setting(Structure(False))
    variables = jax.tree.map(jnp.float32, variables)
    loss = loss_of(net, variables, jnp.float32(x), jnp.float32(mix))
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 100)
    S = subsets(net, 0.7) | {"remat_layer": jnp.zeros(0, jnp.int32)}
    del S["first"]  # a layer that is not asked
    G = jax.jit(lambda: probes.gradient_on(net.layers, loss, S))()
    assert G.keys() == S.keys()
    expected = brute_force(Structure(False))
    check(net, {path: expected[path] for path in S}, G=G, S=S, tolerance=1e-4)


def arrays_of(jaxpr):
    """Shapes of all intermediate results, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_no_array_of_the_size_of_a_kernel_is_ever_made():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(300)(nn.relu(nn.Dense(200)(x)))

    x = jnp.ones((4, 250))
    net = network(Wide(), x)
    variables = jax.eval_shape(net.model.init, jax.random.key(0), x)
    S = {path: jnp.arange(50) for path in net.layers}

    def largest(f):
        shapes = arrays_of(jax.make_jaxpr(f)(variables).jaxpr)
        return max(np.prod(shape, initial=1) for shape in shapes)

    value = lambda v: lambda extra: jnp.sum(net.model.apply({**v, **extra}, x) ** 2)  # noqa: E731
    assert largest(lambda v: jax.grad(lambda v: value(v)({}))(v)) >= 250 * 200  # it can be seen
    assert largest(lambda v: probes.marginals(net.layers, value(v))) < 5000
    assert largest(lambda v: probes.gradient_on(net.layers, value(v), S)) < 50 * 300
