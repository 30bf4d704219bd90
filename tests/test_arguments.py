"""What a newcomer gets wrong: one sentence each, before anything compiles."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dst
from tests.executions import ONE

TX, KEY = optax.sgd(0.1), jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 6)).astype(np.float32), np.arange(8) % 5


class Net(nn.Module):
    hidden: int = 7

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(5)(nn.relu(nn.Dense(self.hidden)(x)))


def entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def loss(apply, batch):
    return entropy(apply(batch[0]), batch[1]).mean(), {}


NET, METHOD = dst.network(Net(), X[:1]), dst.method("set", 0.5, every=2, end=8)
STATE = dst.init_state(NET, TX, METHOD, KEY)
SPARSE = dst.network(Net(), X[:1], execution="sparse")
SPARSE_STATE = dst.init_state(SPARSE, TX, METHOD, KEY)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(5)(nn.BatchNorm(not train)(nn.Dense(7)(x)))


NORMED = dst.network(Norm(), X[:1])
NORM = dst.init_state(NORMED, TX, METHOD, KEY)
OTHER = dst.network(Net(9), X[:1])


def network(*args, model=None, **kwargs):
    return lambda: dst.network(model or Net(), *(args or (X,)), **kwargs)


def begin(net=NET, tx=TX, method=METHOD, key=KEY):
    return lambda: dst.init_state(net, tx, method, key)


def step(loss=loss, state=STATE, batch=(X, Y), net=NET, tx=TX, devices=ONE):
    return lambda: dst.make_update(net, tx, loss, devices=devices)(state, batch)


def move(state=STATE, batch=(X, Y), net=NET, tx=TX, method=METHOD, loss=loss):
    return lambda: dst.make_rewire(net, tx, method, loss, devices=ONE)(state, batch)


def returning(value, metrics=None):
    """A loss that gives this, called with the logits and labels."""
    return lambda apply, b: (value(entropy(apply(b[0]), b[1])), metrics or {})


STEP = r"key, as jax\.random\.key\(0\), not"
ONE_NUMBER = r"^loss must return one number, the mean over the batch, not "
PAIR = r"^loss must return \(mean loss, \{metric: mean\}\), not "
MADE = r"^state must be what dst\.init_state\(net, tx, method, key\) gives, not "
ROWS = r"^batch must hold arrays \(B, \.\.\.\), not "
SIGNATURE = r"^loss must be a function of \(apply, batch\) or \(apply, batch, key\), not of "
MISTAKES = {
    "nnx": (network(model=nnx.Linear(6, 3, rngs=nnx.Rngs(0))), r"^model must be a flax.*flax\.nnx"),
    "class": (network(model=Net), r"^model must be a flax.*not the class Net; make one: Net\("),
    "list": (network([[1.0] * 6]), r"^example inputs must be arrays .* not 1\.0 in a list; "),
    "flag": (network(X, True), r"^example inputs must be .*, not True; .* as train=True\.$"),
    "no input": (lambda: dst.network(Net()), r"needs an example of the model's inputs"),
    "globs": (network(X, dense=3), r"^globs of layers must be strings such as .*, not 3\.$"),
    "execution": (network(X, execution="csr"), r"^execution must be .*'sparse', not 'csr'\.$"),
    "fuse": (network(X, fuse="no"), r"^fuse must be True or False, not 'no'\.$"),
    "model for net": (begin(net=Net()), r"^net must be what dst\.network\(model, x\) gives, not "),
    "not called": (begin(tx=optax.adam), r"^tx must be .* not the function adam; call it: adam\("),
    "key=0": (begin(key=0), rf"^key must be one {STEP} 0\.$"),
    "keys": (begin(key=jax.random.split(KEY, 3)), rf"{STEP} key<fry> of shape \(3,\)\.$"),
    "method": (begin(method="gse"), r"^method must be what dst\.method\(.*\) gives, not 'gse'\.$"),
    "method of a rewire": (move(method="gse"), r"^method must be what dst\.method\("),
    "no loss": (step(loss=None), r"^loss must be a function of \(apply, batch\), not None\.$"),
    "one argument": (step(lambda batch: 0.0), SIGNATURE + r"\(batch\)\.$"),
    "batch unpacked": (step(lambda apply, x, y: 0.0), SIGNATURE + r"\(apply, x, y\)\.$"),
    "scalar": (step(lambda a, b: loss(a, b)[0]), PAIR + r"float32 of shape \(\)\.$"),
    "no metrics": (step(lambda a, b: (loss(a, b)[0], None)), PAIR + r"\(float32 .*, None\)\.$"),
    "no mean": (step(returning(lambda v: v)), ONE_NUMBER + r"float32 of shape \(8,\)\.$"),
    "integer": (step(returning(lambda v: jnp.int32(3))), ONE_NUMBER + r"int32 of shape \(\)\.$"),
    "metric": (
        step(returning(jnp.mean, {"a": {"hits": jnp.ones(8)}})),
        r"^metric 'a/hits' must be one number, .*, not float32 of shape \(8,\)\.$",
    ),
    "metric as words": (step(returning(jnp.mean, {"name": "x"})), r"^metric 'name' .*, not 'x'\.$"),
    "metric of the step": (
        step(returning(jnp.mean, {"loss": 1.0})),
        r"^metric 'loss' must have another name: what a step returns has its own 'loss'\.$",
    ),
    "params": (
        step(lambda p, b: (entropy(Net().apply({"params": p}, b[0]), b[1]).mean(), {})),
        r"^loss fails with Apply.* its first argument is a function: apply\(\*inputs\) runs ",
    ),
    "own apply": (
        step(lambda a, b: (entropy(Net().apply({"params": STATE.params}, b[0]), b[1]).mean(), {})),
        r"^loss never calls apply, its first argument",
    ),
    "no batch axis": (step(batch=(X[0], Y[:1])), r"^batch must have a .*\(6,\) where .*6"),
    "one example": (step(batch=(X[0], Y[0])), ROWS + r"int64 of shape \(\)\.$"),
    "list in a batch": (step(batch=(X, [1, 2])), ROWS + r"1\.$"),
    "key in a batch": (step(batch=(X, Y, KEY)), ROWS + r"key<fry>.*loss\(apply, batch, key\) is"),
    "no batch": (step(batch=None), ROWS + r"None\.$"),
    "no rows": (step(batch=(X[:0], Y[:0])), ROWS + r"float32 of shape \(0, 6\)\.$"),
    "devices": (step(devices=2), r"^devices must be a list of devices, .*, not 2\.$"),
    "no state": (move(state=None), MADE + r"None\.$"),
    "swapped": (step(state=(X, Y), batch=STATE), MADE + r"a value of type tuple\.$"),
    "optimizer": (
        step(tx=optax.adam(1e-3)),
        r"^tx must be the optimizer that init_state was given; .*ScaleByAdam.* of 9 arrays, and ",
    ),
    "optimizer of a rewire": (move(tx=optax.adam(1e-3)), r"^tx must be the optimizer that init_"),
    "network": (
        step(net=OTHER),
        r"^state is of another network: layer 'Dense_0' is \(7, 5\) in it, and \(9, 5\) in net\.$",
    ),
    "execution of a state": (move(net=SPARSE), r"^state is of another network, not one of exec"),
    "method of another": (
        move(method=dst.method("snfs", 0.5)),
        r"^method must be that of init_state; 'snfs' needs .* \(momentum, decay\), which this ",
    ),
    "sparsity of another, sparse": (
        move(SPARSE_STATE, net=SPARSE, method=dst.method("set", 0.9)),
        r"^method must be that of init_state: its sparsity 0\.9 is 8 conn.*, the state has 39\.$",
    ),
    "predicted in training": (
        lambda: dst.predictor(dst.network(Norm(), X, train=True), NORM)(X),
        r'^the model fails to predict with Modify.*"batch_stats" is immutable; it was called with '
        r"train=True, and dst\.predictor\(net, source, train=False\), or .* overrides that\.$",
    ),
    "predicted with a flag": (
        lambda: dst.predictor(NORMED, NORM)(X, train=False),
        r"^a predictor takes inputs alone, not train=; give keyword arguments to dst\.predictor",
    ),
    "due": (lambda: dst.due("set", 3), r"^method must be what dst\.method\(.*\) gives, not 'set'"),
    "carried": (lambda: dst.carry({}, None, STATE), r"^before must be what .* gives, not None\.$"),
    "predicted": (lambda: dst.predictor(OTHER, STATE), r"^state is of another network: layer"),
    "pruned": (
        lambda: dst.prune_at_init(NET, TX, dst.method("snip", 0.5), None, STATE),
        r"^loss must be a function of \(apply, batch\), not None\.$",
    ),
    "one batch": (
        lambda: dst.prune_at_init(NET, TX, dst.method("snip", 0.5), loss, STATE, (X, Y)),
        r"^batches must be an iterable of batches, such as \[batch\], not a tuple of arrays\.$",
    ),
    "one batch, a dict": (
        lambda: dst.prune_at_init(NET, TX, dst.method("snip", 0.5), loss, STATE, {"x": X}),
        r"^batches must be .*, not a dict of arrays\.$",
    ),
    "config's": (lambda: dst.method("set", rewire_every=9), r"did you mean \"every\"\?; it has"),
    "field": (lambda: dst.method("set", evry=9), r"no field 'evry'; did you mean \"every\"\?; it"),
    "value_fn, sparse": (begin(SPARSE, optax.lbfgs()), r"^the optimizer fails with .*'value_fn'"),
    "value_fn": (begin(tx=optax.lbfgs()), r"^the optimizer fails with .*'value_fn'.* no func"),
    "weights": (lambda: dst.weighted_mean(X, X[:, :1]), r"^weights must be .*\(8, 6\), not \(8, 1"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake):
    call, sentence = MISTAKES[mistake]
    with pytest.raises(dst.ConfigError) as error:
        call()
    assert re.search(sentence, str(error.value)), str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("flag", [{}, {"train": True}])
def test_statistics_that_no_step_changes_are_told(flag, devices, caplog):
    """A model with a flag that the loss forgets; once, not in every step."""
    forgets = lambda apply, b: (entropy(apply(b[0], **flag), b[1]).mean(), {})  # noqa: E731
    update = dst.make_update(NORMED, TX, forgets, devices=jax.devices()[:devices])
    state, _ = update(NORM, (X, Y))
    update(state, (X, Y))
    assert [m.split(" as they are")[0] for m in caplog.messages] == [
        "The loss leaves all batch_stats"
    ] * (not flag)


def test_a_rewire_to_another_sparsity_is_told(caplog):
    state, _ = move()()
    assert not caplog.messages
    move(state, method=dst.method("set", 0.9))()
    assert caplog.messages == [
        "The rewire moves to what the method says: its sparsity 0.9 is 8 connections, the state "
        "has 39."
    ]


def test_numpys_numbers_are_numbers():
    """A method holds Python's, so that K is that of float64."""
    method = dst.method("gse", np.float64(0.9), every=np.int64(5), drop_fraction=np.float32(0.25))
    assert method == dst.method("gse", 0.9, every=5, drop_fraction=0.25)
    assert {type(v) for v in (method.sparsity, method.drop_fraction)} == {float}
    assert type(dst.method("gse", np.float32(0.5)).sparsity) is float


def test_what_a_loss_raises_itself_is_its_own():
    for bug in (lambda apply, b: 1 / 0, lambda apply, b: apply(b["image"])):
        with pytest.raises((ZeroDivisionError, TypeError)):
            step(bug)()


def test_looking_costs_nothing_after_the_first_step(monkeypatch):
    """States and losses are looked at while a step is traced, not in every step."""
    update = dst.make_update(NET, TX, loss, devices=ONE)
    state, _ = update(STATE, (X, Y))
    monkeypatch.setattr("dst.update.refuse_another", None)
    monkeypatch.setattr("dst.loss.check_returned", None)
    update(state, (X, Y))


def test_a_loss_is_anything_that_can_be_called():
    class Loss:
        def __call__(self, apply, batch, scale=2.0):
            value, metrics = loss(apply, batch)
            return scale * value, metrics

    value = lambda f: float(step(f, state=STATE)()[1]["loss"])  # noqa: E731
    found = [value(f) for f in (loss, Loss(), functools.partial(Loss(), scale=4.0), jax.jit)[:3]]
    np.testing.assert_allclose(found[1:], [2 * found[0], 4 * found[0]], rtol=1e-6)
