"""The compiled convolutions against float64 sums; nothing here runs where they were not built."""

import ctypes
import functools
import os
import re
import subprocess
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dst
from dst import execution, kernels
from dst.arena import positions
from dst.execution import forward
from dst.network import Layer
from dst.normalization import normalise
from tests import tiny
from tests.executions import ONE, close, dense

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.why_not())


# ----------------------------------------------------------------------- the same in NumPy, float64
class Case(NamedTuple):
    """A convolution's connections in an arena with 3 foreign ones before and 2 behind, and maps."""

    layer: Layer
    W: np.ndarray  # (kx ky n_in, n_out), float32 numbers
    column: np.ndarray
    output: np.ndarray  # of the layer's own connections
    arrays: tuple  # values, column, pointer
    x: np.ndarray
    delta: np.ndarray
    kept: np.ndarray  # the gradient so far


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make(
    seed, batch, sides, channels, taps, strides=(1, 1), padding="SAME", dilation=(1, 1), p=0.3
):
    rng = np.random.default_rng(seed)
    layer = Layer("layer", "conv", (*taps, *channels), strides, padding, dilation)
    n_in = layer.size // layer.n_out
    W = np.where(rng.random((n_in, layer.n_out)) < p, normal(rng, n_in, layer.n_out), 0)
    output, column = np.nonzero(W.T)
    values = np.concatenate([normal(rng, 3), W[column, output], normal(rng, 2)])
    columns = np.concatenate([[7] * 3, column, [5] * 2]).astype(np.int32)
    counts = np.bincount(output, minlength=layer.n_out)
    pointer = np.concatenate([[3], 3 + np.cumsum(counts)]).astype(np.int32)
    x = normal(rng, batch, *sides, channels[0])
    delta = normal(rng, batch, *kernels.output_sides(layer, sides), channels[1])
    kept = normal(rng, values.size)
    return Case(layer, W, column, output, (values, columns, pointer), x, delta, kept)


FRAME = 12  # zeros around a map in NumPy, more than any padding here


def taps_of(layer, framed, pads, out):
    """(flat tap, what it reads for every output pixel, a view of the maps in their frames)."""
    (sx, sy), (dx, dy) = layer.strides, layer.dilation
    (top, _), (left, _) = pads
    for a in range(layer.shape[0]):
        for b in range(layer.shape[1]):
            row, column = FRAME - top + a * dx, FRAME - left + b * dy
            rows = slice(row, row + (out[0] - 1) * sx + 1, sx)
            columns = slice(column, column + (out[1] - 1) * sy + 1, sy)
            yield a * layer.shape[1] + b, framed[:, rows, columns]


def expected(case):
    """y, dx and dW (n_in, n_out), by a product for each tap."""
    layer, pads = case.layer, case.layer.pads(case.x.shape[1:3])
    frame = (FRAME, FRAME)
    x = np.pad(case.x.astype(np.float64), ((0, 0), frame, frame, (0, 0)))
    delta, out = case.delta.astype(np.float64), case.delta.shape[1:3]
    W = case.W.reshape(-1, *layer.shape[2:]).astype(np.float64)
    y, dx, dW = np.zeros(delta.shape), np.zeros(x.shape), np.zeros(W.shape)
    writes = dict(taps_of(layer, dx, pads, out))
    for tap, seen in taps_of(layer, x, pads, out):
        y += seen @ W[tap]
        dW[tap] = np.einsum("nhwi,nhwo->io", seen, delta)
        writes[tap][...] += delta @ W[tap].T
    dx = dx[:, FRAME:-FRAME, FRAME:-FRAME]
    return y, dx, dW.reshape(case.W.shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def computed(layer, threads, values, column, pointer, x, delta, kept, pairs):
    """y, dx, gradient, and dx alone; dW on the pairs. `threads` is what is compiled for."""
    y = kernels.convolve(values, column, pointer, x, layer)
    back = functools.partial(kernels.convolve_backward, values, column, pointer, x, delta)
    only, _ = back(jnp.zeros(0), layer)
    on_pairs = kernels.convolve_gradient_on(*pairs, x, delta, layer)
    return y, *back(kept, layer), only, on_pairs


def run(case, threads=0, pairs=None, **changed):
    if pairs is None:
        rng = np.random.default_rng(8)
        pairs = [rng.integers(-1, n, 60, np.int32) for n in case.W.shape]
    case = case._replace(**changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "THREADS", threads)
        found = computed(case.layer, threads, *case.arrays, case.x, case.delta, case.kept, pairs)
    return [np.asarray(a) for a in found], pairs


def near(got, wanted, tolerance=3e-6):
    """Equal to a share of the largest number."""
    assert got.shape == wanted.shape
    scale = np.abs(wanted).max(initial=1e-3)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


def check(case, threads=0):
    (y, dx, gradient, only_dx, on_pairs), (i, o) = run(case, threads)
    y64, dx64, dW64 = expected(case)
    near(y, y64)
    near(dx, dx64)
    np.testing.assert_array_equal(only_dx, dx)
    own = slice(3, case.kept.size - 2)
    near(gradient[own], case.kept[own] + dW64[case.column, case.output])
    np.testing.assert_array_equal(gradient[:3], case.kept[:3])
    np.testing.assert_array_equal(gradient[-2:], case.kept[-2:])
    near(on_pairs, np.where((i < 0) | (o < 0), 0, dW64[i, o]))


# ---------------------------------------------------------------------------------- one convolution
CASES = {
    "3x3": ((130, (9, 7), (3, 4), (3, 3)), {}),
    "unequal strides, VALID, dilated": (
        (5, (9, 11), (3, 4), (5, 3)),
        {"strides": (2, 3), "padding": "VALID", "dilation": (1, 2)},
    ),
    "1x1, stride 2": ((100, (8, 9), (17, 5), (1, 1)), {"strides": (2, 2)}),
    "7x7": ((33, (14, 15), (2, 3), (7, 7)), {"strides": (2, 2), "padding": ((3, 3), (3, 3))}),
    "11x2, cut": ((3, (13, 9), (2, 3), (11, 2)), {"padding": ((-1, 6), (0, -2))}),
    "2x2 pixels, narrow ring": ((70, (2, 2), (90, 30), (3, 3)), {"p": 0.1}),
    "padded on one side, dilated": (
        (20, (9, 9), (3, 4), (3, 2)),
        {"strides": (2, 2), "padding": ((4, 0), (0, 3)), "dilation": (3, 2)},
    ),
    "one pixel": ((128, (1, 1), (10, 4), (3, 3)), {"padding": ((1, 1), (1, 1))}),
    "tiles of columns": ((16, (5, 61), (96, 3), (3, 3)), {"strides": (1, 2), "p": 0.05}),
    "more sums than a cache": ((16, (4, 6), (32, 40), (3, 3)), {"p": 0.7}),
    "rows for all threads": ((64, (20, 20), (8, 8), (3, 3)), {}),
    "no connection": ((4, (5, 5), (2, 3), (3, 3)), {"p": 0.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions_match_float64_ones(name):
    given, options = CASES[name]
    check(make(0, *given, **options), threads=2 if name == "rows for all threads" else 0)


sides, few, taps = st.integers(1, 12), st.integers(1, 6), st.integers(1, 5)
pads = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 150),
    sides=st.tuples(sides, sides),
    channels=st.tuples(few, few),
    taps=st.tuples(taps, taps),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.one_of(st.just("SAME"), st.just("VALID"), st.tuples(pads, pads)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    threads=st.integers(1, 3),
)
def test_any_convolution_matches_a_float64_one(threads, **geometry):
    layer = Layer(
        "layer",
        "conv",
        (*geometry["taps"], 1, 1),
        geometry["strides"],
        geometry["padding"],
        geometry["dilation"],
    )
    if min(kernels.output_sides(layer, geometry["sides"])) > 0:
        check(make(**geometry), threads)


@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_every_instruction_set_computes_the_convolutions(level):
    environment = os.environ | {"DST_KERNELS": level}
    name = "from dst.native.library import library; import ctypes; f = ctypes.CDLL(library()).dst_"
    script = f"{name}level; f.restype = ctypes.c_char_p; print(f())"
    if level not in process([sys.executable, "-c", script], environment):
        pytest.skip(f"this machine has no {level}")
    options = [
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "match_float64 or channel",
    ]
    process([sys.executable, "-m", "pytest", *options], environment)


def process(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_any_number_of_threads_gives_the_same_bits():
    for case in (
        make(1, 77, (12, 11), (8, 9), (3, 3), strides=(2, 1)),
        make(2, 128, (2, 2), (70, 20), (3, 3)),
    ):
        first, _ = run(case, 1)
        for threads in (2, 3, 16):
            for a, b in zip(first, run(case, threads)[0], strict=True):
                np.testing.assert_array_equal(a, b)


# --------------------------------------------------------------------------------------------- laws
def test_the_kernels_are_linear_and_adjoint():
    """In x and in w; <y(x), d> = <x, dx(d)> = <w, dW(d)>, the latter by finite differences, too."""
    case = make(3, 40, (7, 6), (5, 4), (3, 2), strides=(1, 2))
    other = make(4, 40, (7, 6), (5, 4), (3, 2), strides=(1, 2))
    values, column, pointer = case.arrays
    twice = (2 * values, column, pointer)
    (y, dx, gradient, *_), _ = run(case, kept=np.zeros_like(values))
    x = 2 * case.x - 3 * other.x
    near(run(case, x=x)[0][0], 2 * y - 3 * run(case, x=other.x)[0][0])
    np.testing.assert_array_equal(run(case, arrays=twice)[0][0], 2 * y)
    pairing = lambda a, b: np.sum(a.astype(np.float64) * b)  # noqa: E731
    own = slice(3, values.size - 2)
    for side in (pairing(case.x, dx), pairing(values[own], gradient[own])):
        np.testing.assert_allclose(pairing(y, case.delta), side, rtol=1e-5)
    for p in (0, 20, case.column.size - 1):
        changed = []
        for step in (0.5, -0.5):
            W = case.W.astype(np.float64)
            W[case.column[p], case.output[p]] += step
            changed.append(pairing(case.delta, expected(case._replace(W=W))[0]))
        np.testing.assert_allclose(gradient[3 + p], changed[0] - changed[1], rtol=1e-4, atol=1e-3)


def test_nan_and_infinity_reach_what_they_touch_and_nothing_else():
    case = make(5, 20, (5, 5), (4, 3), (3, 3))
    clean, _ = run(case)
    x, delta = case.x.copy(), case.delta.copy()
    x[7, 0, 0, 1] = np.nan
    delta[11, 4, 4, 2] = np.inf
    (y, dx, gradient, *_), _ = run(case, x=x, delta=delta)
    W = case.W.reshape(3, 3, 4, 3)
    touched = np.zeros(y.shape, bool)
    touched[7, :2, :2] = (W[1::-1, 1::-1, 1] != 0)[..., :]
    np.testing.assert_array_equal(np.isnan(y), touched)
    assert not np.isfinite(dx[11, 3:, 3:]).all() and np.isfinite(dx[:11]).all()
    tap, i = np.divmod(case.column, 4)
    a, b = np.divmod(tap, 3)
    bad = (i == 1) & (a < 2) & (b < 2) | (case.output == 2) & (a < 2) & (b < 2)
    np.testing.assert_array_equal(~np.isfinite(gradient[3:-2]), bad)
    np.testing.assert_array_equal(y[~touched], clean[0][~touched])


def test_wrong_arguments_are_named():
    case = make(6, 2, (5, 5), (2, 3), (3, 3))
    values, column, pointer = case.arrays
    for said, arrays in (
        ("pointer must have C' \\+ 1", (values, column, pointer[:-1])),
        ("pointer must lie in the arena", (values, column, pointer + 9)),
        ("a column lies outside of its kernel", (values, column + 18, pointer)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            run(case, arrays=arrays)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a pair lies outside of the kernel"):
        run(case, pairs=[np.int32([0]), np.int32([3])])
    wide = case.layer._replace(shape=(13, 1, 2, 3), padding=((6, 6), (0, 0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="kernels have 1 to 11 rows"):
        run(case, layer=wide)


def test_scratch_is_of_the_size_of_connections_units_and_rings():
    """Neither a dense kernel (4.7 MB here) nor a map (8.4 MB) is ever held beside the results."""
    scratch = ctypes.CDLL(str(kernels.library())).dst_scratch
    scratch.restype = ctypes.c_int64
    case = make(7, 128, (8, 8), (256, 512), (3, 3), p=0.002)
    pairs = [np.arange(9000, dtype=np.int32) % n for n in case.W.shape]
    scratch()
    run(case, 2, pairs)
    K, units, ring = case.column.size, 256 + 512, 2 * 3 * 6 * 512 * 32 * 4
    assert 0 < scratch() < 2 * ring + 2 * 4096 * 300 + 200 * K + 100 * units
    assert scratch() < 2**16


# ------------------------------------------------------------------------------ batch normalisation
@pytest.mark.parametrize("batch", [3, 37])
def test_channels_are_summed_in_double(batch):
    rng = np.random.default_rng(10)
    a, b = 30 + normal(rng, batch, 6, 7, 5), normal(rng, batch, 6, 7, 5)
    with pytest.MonkeyPatch.context() as patch:
        for threads in (1, 3):
            patch.setattr(kernels, "THREADS", threads)
            found = jax.jit(lambda a, b: (kernels.moments(a), kernels.channel_sums(a, b)))(a, b)
            wide, axes = a.astype(np.float64), (0, 1, 2)
            near(np.asarray(found[0]), np.stack([wide.mean(axes), wide.var(axes)]), 1e-6)
            near(np.asarray(found[1]), np.stack([wide.sum(axes), (wide * b).sum(axes)]), 1e-6)
            jax.clear_caches()


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
        x = nn.Conv(4, (12, 1), name="large")(x)
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16, name="narrow")(x).astype(jnp.float32)
        return nn.Dense(3)(nn.Conv(4, (3, 3), name="plain")(x).mean((1, 2)))


def test_what_the_kernels_do_not_cover_is_expanded_and_said(monkeypatch):
    net = dst.network(Uncovered(), jnp.zeros((1, 5, 5, 2)), execution="sparse")
    said = execution.described(net)
    assert said == "compiled kernels; 2 of 3 convolutions are expanded"
    state = dst.init_state(net, tiny.SGD, dst.method("gse", 0.5), jax.random.key(0))
    run = lambda x: forward(net, state.params, state.masks, {}, x)  # noqa: E731
    text = jax.jit(run).lower(jnp.zeros((2, 5, 5, 2))).as_text()
    assert text.count("@dst_convolve(") == 1
    assert run(jnp.zeros((0, 5, 5, 2))).shape == (0, 3)
    assert execution.described(tiny.setup(execution="sparse").net) == "compiled kernels"
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no compiler")
    assert execution.described(net).endswith("no compiler; 3 of 3 convolutions are expanded")
