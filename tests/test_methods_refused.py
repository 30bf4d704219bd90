"""States that may not train yet, and networks without a connection: one sentence, from the API."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst import main
from dst.methods import METHODS, Row, lottery
from dst.methods.distributions import active_count, count_of
from dst.training import checkpoint
from tests import tiny

EXECUTIONS = ("masked", "sparse")
FIRST = ["snip", "grasp", "grasp_abs", "synflow", "lottery"]


# ------------------------------------------------------------------- pruned before training, or not
@pytest.mark.parametrize("name", FIRST)
def test_a_state_that_was_not_pruned_does_not_train(name, tmp_path):
    """Nor is it rewired, nor is what a checkpoint of it gives."""
    parts = tiny.setup(name)
    call = "dst.lottery.ticket" if name == "lottery" else "dst.prune_at_init"
    sentence = (
        f"state has all connections, but method {name!r} prunes before training; call {call} first."
    )
    update = dst.make_update(parts.net, parts.tx, tiny.loss)
    rewire = dst.make_rewire(parts.net, parts.tx, dst.method("set", every=2, end=9), tiny.loss)
    for step in (update, rewire):
        with pytest.raises(dst.ConfigError) as caught:
            step(parts.state, parts.batch)
        assert str(caught.value) == sentence  # JAX adds notes to it
    # A checkpoint holds arrays alone: the mark is its reader's.
    manager = checkpoint.open_manager(tmp_path, 2)
    checkpoint.save(manager, parts.state, {"config": {}})
    restored, _ = checkpoint.restore(manager, parts.state, {})
    with pytest.raises(dst.ConfigError, match="all connections"):
        update(restored, parts.batch)


def test_what_is_pruned_already_needs_nothing():
    """At sparsity 0 there is nothing to prune; a ticket without masks is a first round."""
    assert tiny.setup("snip", 0.0).state.method == {}
    parts = tiny.setup("lottery")
    state = lottery.ticket(parts.net, parts.tx, parts.method, jax.random.key(0))
    assert state.method == {} and dst.sparsity_of(state.masks) == 0
    np.testing.assert_array_equal(
        state.params["Dense_0"]["kernel"], parts.state.params["Dense_0"]["kernel"]
    )
    update = dst.make_update(parts.net, parts.tx, tiny.loss, devices=jax.local_devices()[:1])
    assert bool(update(state, parts.batch)[1]["finite"])


# ------------------------------------------------------------------------------------ no connection
class Small(nn.Module):
    """8 x 24 and 24 x 10: 432 connections."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(24)(x)))


@functools.cache
def small(execution: str) -> dst.Network:
    return dst.network(Small(), jnp.zeros((1, 8)), execution=execution)


MASKED = [("masked", name) for name in ("random", "gse", "pruning", "snip", "lottery")]


@pytest.mark.parametrize(("execution", "name"), [*MASKED, ("sparse", "random"), ("sparse", "gse")])
def test_a_network_without_a_connection_is_refused(execution, name):
    """At the start, of a ramp's end, and of what will be pruned; 0.9988 keeps a single one."""
    start = lambda s: dst.init_state(  # noqa: E731
        small(execution), optax.sgd(0.1), dst.method(name, s, every=2, end=9), jax.random.key(0)
    )
    sentence = (
        r"^sparsity is 0\.999, which leaves none of the 432 possible connections; the highest that "
        r"keeps one is 0\.9988\.$"
    )
    with pytest.raises(dst.ConfigError, match=sentence):
        start(0.999)
    start(0.9988)


def test_pruning_to_nothing_is_refused():
    net, tx = small("masked"), optax.sgd(0.1)
    state = dst.init_state(net, tx, dst.method("snip", 0.5), jax.random.key(0))
    with pytest.raises(dst.ConfigError, match=r"^sparsity is 0\.9999, which leaves none"):
        dst.prune_at_init(net, tx, dst.method("snip", 0.9999), tiny.loss, state)
    with pytest.raises(dst.ConfigError, match=r"^sparsity is 0\.9999, which leaves none"):
        lottery.winning(net, state, 0.9999)


@pytest.mark.parametrize("N", [1, 2, 5, 50, 99, 432, 500, 10**6])
def test_the_highest_sparsity_is_the_highest(N):
    """To one digit more than N has."""
    layer = dataclasses.replace(small("masked").layers["Dense_0"], shape=(1, N))
    net = small("masked")._replace(layers={"Dense_0": layer})
    with pytest.raises(dst.ConfigError) as caught:
        count_of(net, 1 - 1e-12)
    highest = float(str(caught.value).removesuffix(".").split()[-1])
    assert active_count(N, highest) == 1
    assert active_count(N, highest + 10.0 ** -(len(str(N)) + 1)) == 0


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_command_line_refuses_a_network_without_a_connection(execution, tmp_path, capsys):
    flags = ["--config.hidden=8,", "--config.sparsity=0.9999", f"--config.execution={execution}"]
    config = f"--config={Path(__file__).parents[1] / 'configs' / 'digits_mlp.py'}"
    assert main.main(["dst", config, f"--workdir={tmp_path}", *flags]) == 2
    assert capsys.readouterr().err.endswith(
        "dst: sparsity is 0.9999, which leaves none of the 592 possible connections; the highest "
        "that keeps one is 0.9991.\n"
    )


# ---------------------------------------------------------------------- methods that were not asked
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (dst.Method("mine", 0.9, drop="nope", score="chance"), "drop must be "),
        (dst.Method("mine", 1.5), "sparsity must be a number in"),
        (dst.method("gse", 0.9)._replace(every=0), "every must be an integer >= 1"),
        (dst.method("gse", 0.9)._replace(subset_ratio=0.5), "subset_ratio must be a number >= 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_made_by_hand_keeps_the_rules_too(method, sentence):
    parts = tiny.setup("set")
    for call in (
        lambda: dst.init_state(parts.net, parts.tx, method, jax.random.key(0)),
        lambda: dst.make_rewire(parts.net, parts.tx, method._replace(drop="nope"), tiny.loss),
    ):
        with pytest.raises(dst.ConfigError, match="must be"):
            call()
    with pytest.raises(dst.ConfigError, match=f"^{sentence}"):
        dst.init_state(parts.net, parts.tx, method, jax.random.key(0))


def test_an_execution_that_is_none_is_told_wherever_it_is_first_asked_for(tmp_path):
    parts = tiny.setup("set")
    dst.export(parts.net, parts.state, tmp_path / "net.npz")
    net = parts.net._replace(execution="spare")
    sentence = "^execution must be 'masked' or 'sparse', not 'spare'"
    for call in (
        lambda: dst.init_state(net, parts.tx, parts.method, jax.random.key(0)),
        lambda: dst.make_rewire(net, parts.tx, parts.method, tiny.loss),
        lambda: dst.predictor(net, tmp_path / "net.npz"),
    ):
        with pytest.raises(dst.ConfigError, match=sentence):
            call()


def test_a_floor_above_what_a_ramp_ends_with_is_refused():
    """Every layer would keep 5 % where 2 % are to stay, and the sparsity never be reached."""
    with pytest.raises(dst.ConfigError, match=r"^floor must be at most 0\.02 .* 0\.98, not"):
        dst.method("pruning", 0.98, floor=0.05)
    dst.method("pruning", 0.98, floor=0.02)


def test_the_command_line_calls_a_field_as_it_does(capsys):
    argv = ["dst", "--config=configs/digits_mlp.py", "--config.method=pruning"]
    assert main.main([*argv, "--config.layer_floor=0.05"]) == 2
    assert "layer_floor must be at most 0.02" in capsys.readouterr().err


def test_a_users_row_with_a_mistake_is_told_from_the_command_line(capsys):
    METHODS.register("mistaken", Row("Mine", fields={"drop": "magnitude", "score": "typo"}))
    try:
        argv = ["dst", "--config=configs/digits_mlp.py", "--config.method=mistaken"]
        assert main.main(argv) == 2
        assert "score must be " in capsys.readouterr().err
        with pytest.raises(dst.ConfigError, match="has no field 'sparsity'; a row may have"):
            METHODS.register("mistaken", Row("Mine", fields={"sparsity": 0.9}))
    finally:
        METHODS.remove("mistaken")
