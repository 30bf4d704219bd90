"""The update step: what does not exist stays exactly 0, under any optimizer; O6, O11."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.moments import recognise
from dst.update import parallel, replicate, update_body
from tests.tiny import SGD, batch, kernels, loss, setup


def one():
    """A single device."""
    return jax.local_devices()[:1]


def labels(params):
    """Kernels to 'a', everything else to 'b'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "a" if path[-1].key == "kernel" else "b", params
    )


OPTIMIZERS = {
    "sgd": SGD,
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.ema(0.5)),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2),
    "multi_transform": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, 0.9)}, labels
    ),
    # Its accumulator starts at 0.1, and so do those of connections that do not exist.
    "rss": optax.chain(optax.scale_by_rss(initial_accumulator_value=0.1), optax.scale(-0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_weights_and_moments_stay_at_their_start(name):
    """Over updates and a rewire: weights exactly 0, moments exactly `tx.init`'s, off the masks."""
    tx = OPTIMIZERS[name]
    parts = setup("rigl", tx=tx)
    update = dst.make_update(parts.net, tx, loss, devices=one())
    rewire = dst.make_rewire(parts.net, tx, parts.method, loss, devices=one())
    state = parts.state
    for step in range(6):
        if dst.due(parts.method, step):
            before = state
            state, _ = rewire(state, batch(step))
            new = {p: state.masks[p] & ~before.masks[p] for p in state.masks}
            assert sum(int(n.sum()) for n in new.values()) > 0
            assert_at_start(tx, state, {p: ~state.masks[p] | new[p] for p in new})
        state, metrics = update(state, batch(step))
        assert bool(metrics["finite"])
        assert_at_start(tx, state, {p: ~m for p, m in state.masks.items()})
    moved = [np.abs(k).sum() for k in kernels(state.params, state).values()]
    assert min(moved) > 0


def assert_at_start(tx, state, where):
    """Weights 0 and moments as `tx.init` has them, wherever `where` is True."""
    for path, kernel in kernels(state.params, state).items():
        assert (kernel[np.asarray(where[path])] == 0).all()
    owners = recognise(state.opt_state, state.params, state.masks)
    fresh = jax.tree.leaves(tx.init(state.params))
    assert sum(owner is not None for owner in owners) >= len(where)
    for leaf, start, owner in zip(jax.tree.leaves(state.opt_state), fresh, owners, strict=True):
        if owner is not None:
            off = np.asarray(where[owner])
            np.testing.assert_array_equal(np.asarray(leaf)[off], np.asarray(start)[off])


def test_unrecognised_optimizers_are_refused():
    """Moments in another shape than the parameters get one sentence at the start."""
    with pytest.raises(dst.ConfigError, match=r"optimizer state .* belongs to no parameter"):
        setup("rigl", tx=optax.flatten(optax.adam(1e-2)))


class Linear(nn.Module):
    """One matrix, no bias."""

    @nn.compact
    def __call__(self, h):
        return nn.Dense(2, use_bias=False)(h)


def linear_state(tx, weights, mask):
    """`Linear` with these weights and this mask."""
    net = dst.network(Linear(), jnp.ones((1, 3)))
    state = dst.init_state(net, tx, dst.method("random", 0.5), jax.random.key(0))
    params = {"Dense_0": {"kernel": jnp.asarray(weights, jnp.float32)}}
    return net, state.replace(
        params=params,
        masks=state.masks.but({"Dense_0": jnp.asarray(mask)}),
        opt_state=tx.init(params),
    )


def test_masked_gradient_o6():
    """L = 1/2 ||h W - I||^2: the step is -lr x the gradient, on the mask alone."""
    W = np.array([[0.5, 0], [-0.1, 0.3], [0, -0.2]])
    net, state = linear_state(optax.sgd(1.0), W, W != 0)

    def squared(apply, h):
        return 0.5 * jnp.sum((apply(h) - jnp.eye(2)) ** 2), {}

    update = dst.make_update(net, optax.sgd(1.0), squared, devices=one())
    state, _ = update(state, jnp.array([[1.0, 0, 2], [0, 1, 1]]))
    masked = np.array([[-0.5, 0], [-0.1, -0.9], [0, -1.7]])
    np.testing.assert_allclose(state.params["Dense_0"]["kernel"], W - masked, atol=1e-6)


def test_momentum_does_not_revive_o11():
    """w = 0 with v = 0.5 off the mask would be -0.045 after one step, -0.45 in the end: it is 0."""
    tx = optax.sgd(0.1, 0.9)
    mask = np.array([[True, False]] * 3)
    net, state = linear_state(tx, np.where(mask, 1.0, 0.0), mask)
    state = state.replace(opt_state=jax.tree.map(lambda v: jnp.full_like(v, 0.5), state.opt_state))
    update = dst.make_update(net, tx, lambda apply, h: (jnp.sum(apply(h)) * 0, {}), devices=one())
    for _ in range(3):
        state, _ = update(state, jnp.ones((1, 3)))
        assert (np.asarray(state.params["Dense_0"]["kernel"])[~mask] == 0).all()
        assert (np.asarray(state.opt_state[0].trace["Dense_0"]["kernel"])[~mask] == 0).all()
    assert (np.asarray(state.params["Dense_0"]["kernel"])[mask] != 1).all()


def test_dense_is_plain_training():
    """With every connection active, ten steps equal a loop in plain Flax and optax."""
    parts = setup("dense")
    update = dst.make_update(parts.net, parts.tx, loss, devices=one())
    state = parts.state
    variables, opt_state = {"params": state.params, **state.batch_stats}, parts.state.opt_state

    @jax.jit
    def plain(variables, opt_state, x, y):
        def value(params):
            logits, new = parts.net.model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        gradient, new = jax.grad(value, has_aux=True)(variables["params"])
        updates, opt_state = parts.tx.update(gradient, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    for step in range(10):
        state, _ = update(state, batch(step))
        variables, opt_state = plain(variables, opt_state, *batch(step))
    assert int(state.step) == 10
    got = {"params": state.params, **state.batch_stats}
    chex.assert_trees_all_close(got, variables, rtol=2e-5, atol=2e-6)


@pytest.fixture
def compiled():
    """A list with an entry for every program that is compiled during the test."""
    events = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_trace_and_one_compilation_for_a_whole_run(compiled):
    """Steps, rewires and learning rate drops never retrace or compile the update again."""
    rate = optax.piecewise_constant_schedule(0.1, {5: 0.1})
    parts = setup("rigl", tx=optax.sgd(rate, 0.9))
    chex.clear_trace_counter()
    body = chex.assert_max_traces(n=1)(update_body(parts.net, parts.tx, loss))
    step = parallel(body, (None, 0), one())
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=one())
    state = replicate(parts.state, one())
    for i in range(9):
        if dst.due(parts.method, i):
            state, _ = rewire(state, batch(i))
        x, y = batch(i)
        state, _ = step(state, (x[None], y[None]))
        if i == 2:
            assert compiled  # the first update and the first rewire
            compiled.clear()
    assert not compiled


@pytest.mark.parametrize(
    ("devices", "donate", "heuristic"), [(1, True, "synflow"), (4, False, "uniform")]
)
def test_the_readmes_loop_compiles_update_and_rewire_once(compiled, devices, donate, heuristic):
    """From `init_state`, whose arrays lie elsewhere, and from a state that the user changed."""
    parts = setup("gse", tx=optax.adamw(1e-3), heuristic=heuristic)
    options = dict(devices=jax.local_devices()[:devices], donate=donate)
    update = dst.make_update(parts.net, parts.tx, loss, **options)
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, loss, **options)
    state, own = parts.state, None
    for i in range(6):
        if i == 4:  # as NumPy and as fresh arrays of JAX
            own = jax.tree.map(np.array, state.params)
            before = jax.tree.map(np.copy, own)
            state = state.replace(params=own, masks=jax.tree.map(jnp.array, state.masks))
            compiled.clear()  # `jnp.array` is such a program
        if dst.due(parts.method, i):
            state, _ = rewire(state, batch(i))
            if i == 2:
                assert compiled
                compiled.clear()
        state, metrics = update(state, batch(i))
        if i == 0:
            assert compiled
            compiled.clear()
        assert not compiled
    assert np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(own, before)


def test_pruned_and_rewound_states_compile_update_once(compiled):
    """What `prune_at_init` and `lottery.ticket` return, whose masks are NumPy's."""
    parts = setup("snip")
    masks = {path: np.ones(mask.shape, bool) for path, mask in parts.state.masks.items()}
    lottery = dst.method("lottery", 0.8)
    for state in (
        dst.prune_at_init(parts.net, parts.tx, parts.method, loss, parts.state, [batch(0)]),
        dst.lottery.ticket(parts.net, parts.tx, lottery, jax.random.key(0), masks),
    ):
        update = dst.make_update(parts.net, parts.tx, loss)
        for i in range(3):
            state, _ = update(state, batch(i))
            if i == 0:
                assert compiled
                compiled.clear()
        assert not compiled


def test_nan_is_reported_and_the_input_state_unchanged():
    """A NaN in the batch gives finite = False; the state that went in is immutable."""
    parts = setup("random")
    x, y = parts.batch
    before = jax.tree.map(np.asarray, parts.state.params)
    update = dst.make_update(parts.net, parts.tx, loss, devices=one())
    _, metrics = update(parts.state, (np.full_like(x, np.nan), y))
    assert not bool(metrics["finite"])
    chex.assert_trees_all_equal(before, parts.state.params)


def test_infinite_gradient_of_a_finite_loss_is_reported():
    """sqrt at 0: the loss is 0, its gradient infinite."""
    net, state = linear_state(SGD, np.zeros((3, 2)), np.ones((3, 2), bool))
    update = dst.make_update(
        net, SGD, lambda apply, h: (jnp.sum(jnp.sqrt(jnp.abs(apply(h)))), {}), devices=one()
    )
    _, metrics = update(state, jnp.ones((1, 3)))
    assert float(metrics["loss"]) == 0 and not bool(metrics["finite"])


class Dropped(nn.Module):
    """A Dense layer of what dropout leaves."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


def test_every_call_of_the_model_has_its_own_dropout():
    """As a loss needs that compares two of them; the same step gives the same again."""

    def apart(apply, x):
        first, second = apply(x), apply(x)
        return first.mean(), {"apart": jnp.abs(first - second).max()}

    net = dst.network(Dropped(), jnp.ones((1, 8)))
    state = dst.init_state(net, SGD, dst.method("random", 0.5), jax.random.key(0))
    update = dst.make_update(net, SGD, apart, devices=one())
    found = [float(update(state, jnp.ones((4, 8)))[1]["apart"]) for _ in range(2)]
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("scalar", [0.1, jnp.float32(1), jax.random.key(0)], ids=str)
def test_a_batch_holds_arrays_of_examples(scalar):
    parts = setup("set")
    update = dst.make_update(parts.net, parts.tx, loss)
    with pytest.raises(dst.ConfigError, match=r"^batch must hold arrays \(B, \.\.\.\), not "):
        update(parts.state, (*parts.batch, scalar))
