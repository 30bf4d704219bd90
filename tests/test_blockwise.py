"""RigL's choice from blocks of the dense gradient: that of the whole one, in both executions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dst
from dst import observe as probes
from dst.connections.backends import cpp as kernels
from dst.connections.base import row_salts
from dst.connections.hashing import salts
from dst.connections.masks import Masks
from dst.layers import Conv, Dense
from dst.methods import blockwise
from dst.methods.quota import Quota
from dst.update import AXIS, parallel
from tests import tiny
from tests.arenas import hashed, random_case
from tests.executions import ONE, both, check_arena, close, dense, structure
from tests.test_probes import Layers, Structure, arrays_of, assert_close, by_call, loss_of, setting

BLOCKS = [3, 7, 2**20]
KEY = jax.random.key(9)


def on_devices(f, *args):
    """f on each entry of the leading axis, as on that many devices."""
    return jax.jit(jax.vmap(f, axis_name=AXIS))(*args)


# -------------------------------------------------------------------------------------- one block
@pytest.mark.parametrize("model", [Layers(), Structure(True)], ids=["layers", "structure"])
def test_blocks_are_pieces_of_the_dense_gradient(model):
    """Plain autodiff, put together from blocks that overlap at the layer's end."""
    net, variables, x, mix = setting(model)
    _, exact = by_call(Structure(False) if isinstance(model, Structure) else model)
    sizes = {p: (min(2, l.n_in), min(3, l.n_out)) for p, l in net.layers.items()}
    places = {p: blockwise.corners(l, sizes[p], l.n_in) for p, l in net.layers.items()}

    def blocks(_):
        found = {}
        units = probes.observe(net.layers, loss_of(net, variables, x, mix))
        for path, layer in net.layers.items():

            def one(corner, layer=layer, n=sizes[path], units=units[layer.path]):
                at, due = blockwise.fit(layer, list(corner), n)
                return jnp.stack(at), due, blockwise.gradient_block(layer, *units, at, n)

            found[path] = jax.lax.map(one, jnp.asarray(places[path]))
        return found

    with jax.enable_x64(True):
        found = on_devices(blocks, jnp.zeros(1))
    for path, layer in net.layers.items():
        whole = np.full((*(layer.shape[:-2] or (1, 1)), layer.n_in, layer.n_out), np.nan)
        for (a, b, i, o), due, G in zip(*(np.asarray(v[0]) for v in found[path]), strict=True):
            here = whole[a, b, i : i + due.shape[0], o : o + due.shape[1]]
            assert np.isnan(here[due]).all()  # each connection is due once
            here[due] = G[due]
        assert_close(whole.reshape(layer.shape), exact[path], path, 2e-6)


def test_a_block_is_summed_in_float32():
    """256 ones and then a 1: in bfloat16 the sum would stay at 256."""
    layer = dst.network(Layers(), *(jnp.zeros(a.shape) for a in setting(Layers())[2:])).layers
    h, delta = jnp.ones((126, 257), jnp.bfloat16), jnp.ones((3, 257), jnp.bfloat16)
    corner = [jnp.int32(0)] * 4
    block = lambda h, d: blockwise.gradient_block(layer["rows"], h, d, corner, (2, 2))  # noqa: E731
    for d in (delta, delta.astype(jnp.float32)):
        G = on_devices(block, h[None], d[None])
        assert G.dtype == jnp.float32
        np.testing.assert_array_equal(G, np.full((1, 2, 2), 257))


# ------------------------------------------------------------------------- the best of all of them
def gradient(layer, h, delta):
    """dL/dw from h and delta, by sums over windows in float64."""
    h, delta = np.float64(h), np.float64(delta)
    if isinstance(layer, Dense):
        return h @ delta.T
    G, (sx, sy), (dx, dy) = np.zeros(layer.shape), layer.window.strides, layer.window.dilation
    for a, b, x, y in np.ndindex(*layer.shape[:2], *delta.shape[2:]):
        G[a, b] += h[:, :, a * dx + x * sx, b * dy + y * sy] @ delta[:, :, x, y].T
    return G


def integers(rng, layer, devices=2, batch=2):
    """h and delta of small integers on each device: sums are exact and many are equal."""
    out, extent = (), []
    if isinstance(layer, Conv):
        out = (3, 2)
        steps = zip(out, layer.window.strides, layer.shape, layer.window.dilation, strict=False)
        extent = [(n - 1) * s + (k - 1) * d + 2 for n, s, k, d in steps]
    draw = lambda *shape: rng.integers(-1, 2, (devices, *shape)).astype(np.float32)  # noqa: E731
    return draw(layer.n_in, batch, *extent), draw(layer.n_out, batch, *out)


def mean_gradient(layer, units):
    """The average over the devices."""
    return np.mean([gradient(layer, *each) for each in zip(*units, strict=True)], 0)


@pytest.mark.parametrize("block", BLOCKS)
def test_masked_the_choice_is_top_k_of_all_layers(monkeypatch, block):
    """Ties by hash, whatever the blocks; what is active is never chosen."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    rng = np.random.default_rng(block)
    layers = setting(Layers())[0].layers
    layers = {p: layers[p] for p in ("dilated_strided", "rows", "same", "sequence", "valid")}
    units = {path: integers(rng, layer) for path, layer in layers.items()}
    masks = {path: rng.random(layer.shape) < 0.3 for path, layer in layers.items()}
    A = Masks(layers.values(), {path: jnp.asarray(mask) for path, mask in masks.items()})
    salt = row_salts(A.parts, KEY)
    score = np.concatenate(
        [
            np.where(masks[p], -np.inf, np.abs(mean_gradient(layer, units[p]))).ravel()
            for p, layer in layers.items()
        ]
    )
    ties = []
    for l, layer in enumerate(layers.values()):
        of = np.asarray(salts(KEY, l, layer.n_out))
        places = np.ndindex(layer.size // layer.n_out, layer.n_out)
        ties += [hashed(of[output], column) for column, output in places]
    order = np.lexsort((ties, -score))
    inactive = int(np.isfinite(score).sum())
    for size in (30, inactive + 5):
        held = Quota(jnp.int32(size), size, salt)
        choose = functools.partial(blockwise.strongest_missing, A, held=held)
        two = parallel(choose, (0,), jax.local_devices()[:2])
        found, finite = two(units)
        held = np.asarray(found.valid)
        p, s = (np.asarray(a)[held] for a in (A.entry(found.row, found.column), found.score))
        assert bool(finite) and held.sum() == min(size, inactive)
        np.testing.assert_array_equal(np.sort(p), np.sort(order[: held.sum()]))
        np.testing.assert_array_equal(s, score[p])


@pytest.mark.parametrize("block", BLOCKS)
def test_sparse_the_choice_is_the_best_of_what_does_not_exist(monkeypatch, tier, block):
    """Of equals the lower hashes; blocks cut rows, or hold many."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    rng = np.random.default_rng(block)
    case = random_case(rng, 60)
    layers = [part.layer for part in case.arena.parts]
    units = {layer.path: integers(rng, layer) for layer in layers}
    missing, salt = [], row_salts(case.arena.parts, KEY)
    salts_of_rows = np.asarray(salt)
    for part, mask in zip(case.arena.parts, case.masks, strict=True):
        G = np.abs(mean_gradient(part.layer, units[part.layer.path])).reshape(-1, part.n_out)
        for i, o in zip(*np.nonzero(~mask), strict=True):
            row = part.first + i // part.block * part.n_out + o
            missing.append((-G[i, o], hashed(salts_of_rows[row], i), row, i))
    missing.sort()
    choose = lambda units, P: blockwise.strongest_missing(case.arena, units, Quota(P, 99, salt))  # noqa: E731
    two = parallel(choose, (0, None), jax.local_devices()[:2])
    for P in (20, 99):
        found, finite = two(units, jnp.int32(P))
        assert bool(finite)
        row, column, score = (np.asarray(a)[np.asarray(found.score) >= 0] for a in found)
        expected = sorted((r, i, -s) for s, _, r, i in missing[:P])
        assert list(zip(row, column, score, strict=True)) == expected


# ------------------------------------------------------------------------------------- end to end
def wide(state):
    """The state in float64, so that no two scores are near each other."""
    cast = lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf  # noqa: E731
    fields = ("params", "opt_state", "batch_stats")
    return state.replace(**{f: jax.tree.map(cast, getattr(state, f)) for f in fields})


def rewired(s, devices=ONE):
    """(state, report) after one rewire in float64."""
    with jax.enable_x64(True):
        images, labels = tiny.batch(2)
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=devices)
        return rewire(wide(s.state), (images.astype(np.float64), labels))


def test_all_executions_take_rigls_step(monkeypatch):
    """Dense on one device, streamed and sparse on four: the same connections and report."""
    monkeypatch.setattr(blockwise, "BLOCK", 50)
    monkeypatch.setattr(kernels, "available", lambda: False)
    options = {"floor": 0.8, "drop_fraction": 0.4, "norm": False}
    whole, report = rewired(tiny.setup("rigl", **options))
    assert int(report["grown"]) > 40
    for s in both("rigl", growth_memory="streamed", **options):
        state, same = rewired(s, jax.local_devices())
        for path, mask in structure(whole).items():
            np.testing.assert_array_equal(structure(state)[path], mask)
        assert jax.device_get(report) == jax.device_get(same)
        close(dense(whole), dense(state))


def test_in_float32_the_choice_is_rigls_but_for_equals(monkeypatch, tier):
    """What differs from the dense gradient's choice lies within 1e-5 of the cut."""
    monkeypatch.setattr(blockwise, "BLOCK", 50)
    masked = tiny.setup("rigl")
    rewire = dst.make_rewire(masked.net, masked.tx, masked.method, tiny.loss, devices=ONE)
    expected = structure(rewire(masked.state, masked.batch)[0])

    def value(params):
        apply = lambda x, **kw: masked.net.model.apply(  # noqa: E731
            {"params": params, **masked.state.batch_stats}, x, **kw, mutable=["batch_stats"]
        )[0]
        return tiny.loss(apply, masked.batch)[0]

    G = tiny.kernels(jax.grad(value)(masked.state.params), masked.state)
    grown = [np.abs(G[p])[m & ~structure(masked.state)[p]] for p, m in expected.items()]
    cut = np.concatenate(grown).min()
    s = tiny.setup("rigl", execution="sparse", growth_memory="streamed")
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    state, _ = rewire(s.state, s.batch)
    check_arena(state, s.state.masks.column.size)
    found = structure(state)
    for path, mask in expected.items():
        near = np.abs(G[path])[mask != found[path]]
        np.testing.assert_allclose(near, cut, rtol=1e-5)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_nan_is_reported(execution):
    """One NaN in the inputs, in a block that is not the last."""
    s = tiny.setup("rigl", norm=False, execution=execution, growth_memory="streamed")
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    assert bool(rewire(s.state, s.batch)[1]["finite"])
    images = s.batch[0].copy()
    images[0, 0, 0, 0] = np.nan
    assert not bool(rewire(s.state, (images, s.batch[1]))[1]["finite"])


# ----------------------------------------------------------------------------------------- memory
class Wide(nn.Module):
    """A layer of 50,000 possible connections, and a few."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(5)(nn.relu(nn.Dense(200)(x)))


def wide_run(execution):
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(4, 250)).astype(np.float32), np.zeros(4, np.int32)
    net = dst.network(Wide(), jnp.zeros((1, 250)), train=True, execution=execution)
    method = dst.method("rigl", 0.98, every=2, end=12, growth_memory="streamed")
    state = dst.init_state(net, tiny.SGD, method, jax.random.key(0))
    return net, method, state, batch


@pytest.mark.parametrize("block", [1000, 2**20])
def test_sparse_no_array_is_larger_than_a_block(monkeypatch, tier, block):
    monkeypatch.setattr(blockwise, "BLOCK", block)
    net, method, state, batch = wide_run("sparse")
    rewire = dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE)
    shapes = arrays_of(jax.make_jaxpr(rewire)(state, batch).jaxpr)
    largest = max(np.prod(shape, initial=1) for shape in shapes)
    assert (largest >= 50_000) == (block > 50_000)


@pytest.mark.parametrize("block", [1000, 2**20])
def test_masked_no_block_of_the_gradient_is_larger_than_asked(monkeypatch, block):
    """Activations are products, too, but of 4 rows."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    net, method, state, batch = wide_run("masked")
    largest = []

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                largest.append(max(v.aval.size for v in equation.outvars))
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        products(inner)

    rewire = dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE)
    products(jax.make_jaxpr(rewire)(state, batch).jaxpr)
    assert max(largest) <= 50_000 and (max(largest) == 50_000) == (block > 50_000)
