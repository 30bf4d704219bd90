"""Sparse execution held to the masked one: the same network, the same steps, and its memory."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst import rewire as masked_rewire
from dst.connections.backends import cpp as kernels
from dst.connections.execution import forward
from dst.methods.heuristics import synaptic_flow
from dst.update import update_body
from tests import tiny
from tests.executions import ADAMW, ONE, both, check_arena, close, dense, precisions, structure


# ------------------------------------------------------------------------------------ the start
@pytest.mark.parametrize("distribution", ["uniform", "er"])
def test_the_same_key_gives_the_same_network(distribution):
    """Connections, values and biases (not zero here) bitwise; no kernel among the parameters."""
    masked, sparse = both(distribution=distribution)
    for a, b in ((structure, structure), (dense, dense)):
        one, other = a(masked.state), b(sparse.state)
        assert all(one[p].tobytes() == other[p].tobytes() for p in one)
    params = dict(sparse.state.params)
    assert params.pop("arena")["kernel"].shape == (sum(tiny.active(masked.state).values()),)
    assert all(set(leaf) <= {"bias", "scale"} for leaf in params.values())
    for path, leaf in params.items():
        for name, value in leaf.items():
            assert value.tobytes() == masked.state.params[path][name].tobytes()
    assert np.abs(params["Dense_0"]["bias"]).max() > 0
    assert dst.sparsity_of(sparse.state.masks) == dst.sparsity_of(masked.state.masks)


def test_moments_are_of_the_size_of_what_exists():
    """No leaf of the state is as large as the largest kernel."""
    for tx in (tiny.SGD, ADAMW):
        state = tiny.setup(tx=tx, sparsity=0.95, execution="sparse").state
        assert max(leaf.size for leaf in jax.tree.leaves(state)) < 54 * 20


# ------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("tx", [tiny.SGD, ADAMW], ids=["sgd", "adamw"])
def test_steps_agree(tx, tier):
    """Forward, gradients, update, moments and batch statistics of five steps."""
    masked, sparse = both("random", tx)
    states = [masked.state, sparse.state]
    updates = [dst.make_update(s.net, tx, tiny.loss, devices=ONE) for s in (masked, sparse)]
    for step in range(5):
        results = [u(s, tiny.batch(step)) for u, s in zip(updates, states, strict=True)]
        states = [state for state, _ in results]
        close(results[0][1], results[1][1])
    close(dense(states[0]), dense(states[1]))
    close(states[0].batch_stats, states[1].batch_stats)
    vectors = [x for x in jax.tree.leaves(states[1].opt_state) if x.shape == (258,)]
    trees = jax.tree.leaves(states[0].opt_state, is_leaf=lambda x: isinstance(x, dict))
    trees = [tree for tree in trees if isinstance(tree, dict)]
    assert len(vectors) == len(trees) > 0
    for tree, vector in zip(trees, vectors, strict=True):
        close(dense(states[0], tree), dense(states[1], vector))


def test_the_logits_agree_in_evaluation(tier):
    """What `evaluate` computes, and for a single image."""
    logits = [
        forward(
            s.net, s.state.params, s.state.masks, s.state.batch_stats, s.batch[0][:1], train=False
        )
        for s in both()
    ]
    close(*logits)


class Lifted(nn.Module):
    """Layers under nn.remat, and one that is called twice."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.remat(nn.Dense)(12, name="remat")(x)
        x = nn.remat(nn.Dense)(12, name="again")(nn.relu(x))
        shared = nn.Dense(12, name="shared", use_bias=False)
        return nn.Dense(5, name="head")(shared(nn.relu(shared(x))))


def lifted(execution, heuristic="grabo"):
    """A state of `Lifted` with its parts."""
    method = dst.method("gse", 0.5, every=2, end=9, heuristic=heuristic)
    net = dst.network(Lifted(), jnp.zeros((1, 7)), execution=execution)
    return tiny.Setup(
        net, tiny.SGD, method, dst.init_state(net, tiny.SGD, method, jax.random.key(1)), ()
    )


def test_lifted_and_shared_layers_agree(tier):
    """nn.remat and a layer with two calls take the same steps and can be rewired."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(8, 7)).astype(np.float32), rng.integers(5, size=8)
    runs = [lifted("masked"), lifted("sparse")]
    states = []
    for s in runs:
        update = dst.make_update(s.net, s.tx, tiny.loss, devices=ONE)
        state = s.state
        for _ in range(3):
            state, _ = update(state, data)
        states.append(state)
    close(dense(states[0]), dense(states[1]))
    rewire = dst.make_rewire(runs[1].net, runs[1].tx, runs[1].method, tiny.loss, devices=ONE)
    state, report = rewire(states[1], data)
    check_arena(state, states[1].masks.column.size)
    assert int(report["grown"]) > 0


class Precise(nn.Module):
    """As on an accelerator, whose products are of TF32 or bfloat16 unless asked for more."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), precision="highest")(x))
        return nn.Dense(2, precision="highest")(x.reshape(len(x), -1))


def test_a_modules_precision_reaches_every_product(tier):
    """Of the forward and the backward pass: whatever is a product says so."""
    net = dst.network(Precise(), jnp.zeros((1, 4, 4, 2)), execution="sparse")
    state = dst.init_state(net, tiny.SGD, dst.method("set", 0.5), jax.random.key(0))
    x = jnp.ones((2, 4, 4, 2))
    run = lambda p, x: forward(net, p, state.masks, {}, x).sum()  # noqa: E731
    products = precisions(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(state.params, x))
    least = 1 if kernels.available() else 3  # the kernels are of float32 whatever is asked for
    assert len(products) >= least and all("HIGHEST" in str(product) for product in products)


class Teacher(nn.Module):
    """Its layers have the paths of `Distilled`'s own."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(5)(x)


class Distilled(nn.Module):
    """A model that calls another one on variables of its own, before and after its layers."""

    @nn.compact
    def __call__(self, x, train=True):
        wide = {"kernel": np.eye(7, 6, dtype=np.float32), "bias": np.ones(6, np.float32)}
        narrow = {"kernel": np.eye(6, 5, dtype=np.float32), "bias": np.ones(5, np.float32)}
        teacher = lambda: Teacher().apply({"params": {"Dense_0": wide, "Dense_1": narrow}}, x)  # noqa: E731
        h = nn.relu(nn.Dense(12)(jnp.concatenate([x, teacher()], -1)))
        return nn.Dense(5)(h) + teacher()


@pytest.mark.parametrize(
    "options", [{"name": "gse"}, {"name": "rigl", "growth_memory": "streamed"}]
)
def test_layers_of_another_model_are_not_taken_for_the_models_own(options, tmp_path):
    """Of the same paths; through the predictions, the update and both kinds of rewire."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(8, 7)).astype(np.float32), rng.integers(5, size=8)
    method = dst.method(sparsity=0.5, every=2, end=9, **options)
    states = []
    for execution in ("masked", "sparse"):
        net = dst.network(Distilled(), jnp.zeros((1, 7)), execution=execution)
        assert {p: layer.shape for p, layer in net.layers.items()} == {
            "Dense_0": (12, 12), "Dense_1": (12, 5)
        }  # fmt: skip
        state = dst.init_state(net, tiny.SGD, method, jax.random.key(1))
        update = dst.make_update(net, tiny.SGD, tiny.loss, devices=ONE)
        state, _ = update(state, data)
        dst.export(net, state, tmp_path / "net.npz")
        expected = Distilled().apply(dst.load(tmp_path / "net.npz"), data[0])
        close(dst.predictor(net, state)(data[0]), expected)
        rewire = dst.make_rewire(net, tiny.SGD, method, tiny.loss, devices=ONE)
        state, report = rewire(state, data)
        assert int(report["grown"]) > 0
        states.append(state)
    if method.name == "rigl":  # which draws nothing
        close(dense(states[0]), dense(states[1]))


# ----------------------------------------------------------------------------------- its memory
class Wide(nn.Module):
    """An MLP whose hidden layers' dense kernels dwarf everything else."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(4)(nn.relu(nn.Dense(1024)(x)))


LIMIT = 1024 * 1024


@functools.cache
def wide(execution, heuristic="grabo"):
    """Its parts; 4096 is the least chunk, so K is well above it."""
    net = dst.network(Wide(), jnp.zeros((1, 1024)), execution=execution)
    method = dst.method("gse", 0.98, heuristic=heuristic, every=2, end=9)
    return net, method, dst.init_state(net, tiny.SGD, method, jax.random.key(0))


def largest(compiled: str) -> int:
    """Elements of the largest array of any type in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def compiled(body, *args):
    """The program of a device of one."""
    axes = (None, 0, None)[: len(args)]
    alone = jax.pmap(body, axis_name="devices", in_axes=axes, out_axes=None, devices=ONE)
    return alone.lower(*args).compile().as_text()


def wide_batch():
    return jnp.zeros((1, 8, 1024)), jnp.zeros((1, 8), jnp.int32)


def test_no_step_has_the_size_of_a_dense_kernel(tier):
    """Which is the same for all heuristics; the masked one has."""
    for execution in ("sparse", "masked"):
        net, _, state = wide(execution)
        step = largest(compiled(update_body(net, tiny.SGD, tiny.loss), state, wide_batch()))
        assert step < LIMIT // 4 if execution == "sparse" else step >= LIMIT


def test_no_rewire_has_the_size_of_a_dense_kernel(tier):
    """GraBo's; those of uniform and SynFlow are the same without the observation."""
    net, method, state = wide("sparse", "grabo")
    fg = {p: (jnp.ones(layer.n_in), jnp.ones(layer.n_out)) for p, layer in net.layers.items()}
    body = masked_rewire.rewire_body(net, tiny.SGD, method, tiny.loss)
    assert largest(compiled(body, state, wide_batch(), fg)) < LIMIT // 2


def test_no_pass_of_synflow_has_the_size_of_a_dense_kernel(tier):
    net, _, state = wide("sparse", "synflow")
    with jax.enable_x64(True):
        flow = jax.jit(functools.partial(synaptic_flow, net))
        text = flow.lower(state.params, state.masks, state.batch_stats).compile().as_text()
    assert largest(text) < LIMIT // 4


def test_activations_stay_feature_major_from_layer_to_layer(tier):
    """(units, B), as the products have them: of all transposes XLA leaves that of the batch."""
    net, _, state = wide("sparse")
    text = compiled(update_body(net, tiny.SGD, tiny.loss), state, wide_batch())
    assert len(re.findall(r"= f32\[(?:8,1024|1024,8)\]\S* transpose\(", text)) == 1


@pytest.mark.parametrize("width", [1, 60, 80])
def test_an_input_of_another_width_is_refused(tier, width):
    """No product would notice: kernels read what stands behind a row."""
    net = dst.network(nn.Sequential([nn.Dense(4)]), jnp.zeros((1, 64)), execution="sparse")
    state = dst.init_state(net, tiny.SGD, dst.method("set", 0.5), jax.random.key(0))
    with pytest.raises(dst.ConfigError, match=f"reads 64 units, not {width}: its input is"):
        dst.predictor(net, state)(np.zeros((2, width), np.float32))
    update = dst.make_update(net, tiny.SGD, lambda apply, x: (apply(x).sum(), {}), devices=ONE)
    with pytest.raises(dst.ConfigError, match=f"reads 64 units, not {width}: its input is"):
        update(state, np.zeros((2, width), np.float32))
