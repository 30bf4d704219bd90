"""Which optimizers may see all connections as one vector: accepted, or refused in one sentence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from dst.connections.initialised import init_rest
from dst.connections.moments import recognise, refuse_unless_coordinate_wise
from dst.discovery import network
from dst.errors import ConfigError
from dst.layers import Conv


class Model(nn.Module):
    """Every kind of sparse layer, one of them large enough to be factored, and a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(4, (3, 3))(x))
        return nn.Dense(5)(nn.Dense(200)(x.reshape(x.shape[0], -1)))


@pytest.fixture(scope="module")
def model():
    """(params without the sparse kernels, sparse layers)."""
    net = network(Model(), jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))
    return init_rest(net, jax.random.key(0))["params"], net.layers


def by_path(test):
    """A mask: whether a parameter's path passes `test`."""
    names = lambda path: [entry.key for entry in path]  # noqa: E731
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: test(names(path)), tree)


def by_shape(test):
    return lambda tree: jax.tree.map(lambda leaf: test(leaf), tree)


ACCEPTED = {
    "sgd": optax.sgd(0.1, 0.9, nesterov=True),
    "adamw": optax.adamw(1e-3),
    "a global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 3),
    "no decay of biases": optax.adamw(1e-3, mask=by_path(lambda names: names[-1] == "kernel")),
    "a schedule from 0": optax.lion(optax.linear_schedule(0.0, 0.1, 10)),
}
REFUSED = {
    "lamb": optax.lamb(1e-3),
    "lars": optax.lars(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "factored moments": optax.scale_by_factored_rms(),
    "muon": optax.contrib.muon(1e-3),
    "sm3": optax.sm3(0.1),
    "the norm of a layer": optax.clip_by_block_rms(100.0),
    "the norm of a unit": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "a mask by ndim": optax.adamw(1e-3, weight_decay=1e-6, mask=by_shape(lambda a: a.ndim > 1)),
    "rates by ndim": optax.multi_transform(
        {"many": optax.sgd(0.1), "one": optax.sgd(0.2)},
        by_shape(lambda leaf: "many" if leaf.ndim > 1 else "one"),
    ),
    "a mask by layer": optax.masked(
        optax.set_to_zero(), by_path(lambda names: names[0] == "Dense_0")
    ),
    "a mask as a tree": optax.masked(
        optax.set_to_zero(),
        {"Conv_0": True, "Dense_0": False, "Dense_1": False, "LayerNorm_0": False},
    ),
    "lamb in MultiSteps": optax.MultiSteps(optax.lamb(1e-3), 5),
    "lamb after steps of 0": optax.lamb(lambda step: jnp.where(step < 6, 0.0, 1e-3)),
}


# All keep moments in ways of their own: under names, masked, within other states.
KEPT = {
    **ACCEPTED,
    "a schedule inside": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
    "only kernels": optax.masked(optax.adam(1e-3), by_path(lambda names: names[-1] == "kernel")),
    "two of them": optax.multi_transform(
        {"many": optax.adam(1e-3), "one": optax.sgd(0.2, 0.9)},
        by_shape(lambda leaf: "many" if leaf.ndim > 1 else "one"),
    ),
    "prodigy": optax.contrib.prodigy(),
    "several in a row": optax.apply_if_finite(optax.MultiSteps(optax.lamb(1e-3), 5), 3),
}


@pytest.mark.parametrize("name", KEPT)
def test_optax_finds_the_same_moments(name, model):
    """`optax.tree_map_params` as the oracle, where it knows the optimizer."""
    tx, (rest, layers) = KEPT[name], model
    kernels = {path: {"kernel": jnp.zeros(layer.shape)} for path, layer in layers.items()}
    params = {path: {**rest.get(path, {}), **kernels.get(path, {})} for path in rest | kernels}
    owners = jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key if path[-1].key == "kernel" else "", params
    )
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    found = optax.tree_map_params(
        tx,
        lambda leaf, owner: leaf if is_masked(leaf) else owner,
        tx.init(params),
        owners,
        transform_non_params=lambda _: "",
        is_leaf=is_masked,
    )
    ours = recognise(tx.init(params), params, {path: k["kernel"] for path, k in kernels.items()})
    assert [owner or "" for owner in ours] == jax.tree.leaves(found)


def test_optimizers_that_look_at_the_parameters_are_recognised_too(model):
    """As a user's own may, which `optax.tree_map_params` cannot call."""
    kernels = {path: {"kernel": jnp.zeros(layer.shape)} for path, layer in model[1].items()}
    state = {"v": {path: {**leaves} for path, leaves in kernels.items()}}
    masks = {path: leaves["kernel"] for path, leaves in kernels.items()}
    assert recognise(state, kernels, masks) == list(kernels)


@pytest.mark.parametrize("name", ACCEPTED)
def test_optimizers_that_work_coordinate_by_coordinate_are_accepted(name, model):
    refuse_unless_coordinate_wise(ACCEPTED[name], *model)


def test_rounding_in_one_of_many_layers_refuses_nothing():
    """Where gradients nearly cancel in Adam's moment, the last bits of a global norm show."""
    layers = {f"{n:03}": Conv(f"{n:03}", (3, 3, 64, 64)) for n in range(70)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    refuse_unless_coordinate_wise(tx, {}, layers)


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_look_at_shapes_or_layers_are_refused_in_a_sentence(name, model):
    with pytest.raises(ConfigError, match=r"all connections are one vector; use .*\.$") as error:
        refuse_unless_coordinate_wise(REFUSED[name], *model)
    assert "\n" not in str(error.value)


def test_a_model_with_nothing_but_sparse_kernels_is_no_exception(model):
    _, layers = model
    refuse_unless_coordinate_wise(ACCEPTED["adamw"], {}, layers)
    with pytest.raises(ConfigError, match="coordinate by coordinate"):
        refuse_unless_coordinate_wise(REFUSED["lamb"], {}, layers)


def failing(error, when=lambda params: True):
    """An optimizer that raises `error` if `when` holds for the parameters."""

    def update(updates, state, params):
        if when(params):
            raise error
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_an_optimizers_own_error_is_raised_as_it_is(model):
    """What ordinary kernels meet too has nothing to do with one vector."""
    with pytest.raises(KeyError, match="a misspelt name"):
        refuse_unless_coordinate_wise(failing(KeyError("a misspelt name")), *model)


def test_an_error_that_only_the_vector_meets_is_quoted(model):
    tx = failing(ValueError("no\nConv_0"), lambda params: "kernel" not in params.get("Conv_0", {}))
    with pytest.raises(ConfigError, match=r"ValueError: no Conv_0 .* are one vector; use") as error:
        refuse_unless_coordinate_wise(tx, *model)
    assert isinstance(error.value.__cause__, ValueError)


def test_constants_in_the_kernels_shapes_are_no_error_of_the_optimizers_own(model):
    """Decay towards earlier weights: fails on small kernels, and could not know the vector."""
    rest, layers = model
    kernels = {path: {"kernel": jnp.ones(layer.shape)} for path, layer in layers.items()}
    earlier = {path: {**rest.get(path, {}), **kernels.get(path, {})} for path in rest | kernels}
    pull = optax.stateless(lambda g, w: jax.tree.map(lambda g, w, w0: g + w - w0, g, w, earlier))
    with pytest.raises(ConfigError, match="the optimizer fails with"):
        refuse_unless_coordinate_wise(pull, rest, layers)


def test_a_layer_of_one_weight_takes_no_check_off():
    """Memory of L-BFGS, (10, 100, 100) for a kernel of 100 x 100, beside a kernel of one."""
    masks = {"one": jnp.ones((1, 1), bool), "other": jnp.ones((100, 100), bool)}
    params = {path: {"kernel": jnp.zeros(mask.shape)} for path, mask in masks.items()}
    state = {"memory": {"other": {"kernel": jnp.zeros((10, 100, 100))}}, "count": jnp.zeros(())}
    with pytest.raises(ConfigError, match=r"'memory/other/kernel' .* belongs to no parameter"):
        recognise(state, params, masks)
