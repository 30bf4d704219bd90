"""Lottery tickets: O10's counts, nested masks, a rewind to the same bits."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.masks import with_kernels
from dst.methods.distributions import active_count
from dst.methods.lottery import levels, ticket, winning
from tests.tiny import active, batch, kernels, loss, setup

PAPER = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98)


def test_levels_end_at_the_sparsity():
    assert levels(0.98) == PAPER
    assert levels(0.9) == PAPER[:4]
    assert levels(0.97) == (*PAPER[:5], 0.97)
    assert levels(0.99) == (*PAPER, 0.99)
    assert levels(0.0) == (0.0,)


def test_o10_counts_of_resnet_56():
    counts = [active_count(848_944, level) for level in levels(0.98)]
    assert counts == [848_944, 424_472, 212_236, 84_894, 42_447, 16_979]


class Two(nn.Module):
    """10 x 10 and 10 x 10 weights."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="b")(nn.Dense(10, name="a")(x))


def test_o10_the_largest_of_200_weights_nested():
    """|w| = .01 .. 2.00 in any order and with any sign, over both layers."""
    net, tx = dst.network(Two(), jnp.ones((1, 10))), optax.sgd(0.1, 0.9)
    method = dst.method("lottery", 0.98)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    rng = np.random.default_rng(0)
    size = rng.permutation(np.arange(1, 201)).reshape(2, 10, 10)
    w = np.float32(size / 100) * rng.choice([-1, 1], size.shape).astype(np.float32)
    state = state.replace(params=with_kernels(state.params, {"a": w[0], "b": w[1]}))
    for level, count in zip(levels(0.98), (200, 100, 50, 20, 10, 4), strict=True):
        masks = winning(net, state, level)
        assert sum(int(m.sum()) for m in masks.values()) == count
        for mask, before, s in zip(masks.values(), state.masks.values(), size, strict=True):
            assert (before | ~mask).all()
            np.testing.assert_array_equal(mask, s > 200 - count)
        # What was inactive does not come back, however large.
        revived = {path: np.where(masks[path], w[i], 9) for i, path in enumerate("ab")}
        state = state.replace(
            masks=state.masks.but(masks), params=with_kernels(state.params, revived)
        )


def test_a_ticket_is_the_first_state_on_the_masks():
    """After training: theta_0 x masks bit for bit; all else as at the very start."""
    parts = setup("lottery", 0.95)
    key = jax.random.key(0)
    first = ticket(parts.net, parts.tx, parts.method, key)
    assert all(mask.all() for mask in first.masks.values())
    update = dst.make_update(parts.net, parts.tx, loss, devices=jax.local_devices()[:1])
    trained = first
    for step in range(3):
        trained, _ = update(trained, batch(step))
    masks = winning(parts.net, trained, 0.5)
    state = ticket(parts.net, parts.tx, parts.method, key, masks)
    assert sum(active(state).values()) == active_count(parts.net.possible, 0.5)
    start, now = kernels(first.params, first), kernels(state.params, state)
    for path, mask in masks.items():
        np.testing.assert_array_equal(state.masks[path], mask)
        assert now[path].tobytes() == np.where(mask, start[path], np.float32(0)).tobytes()
        trace = state.opt_state[1][0].trace[path]["kernel"]
        assert trace.shape == mask.shape and (np.asarray(trace) == 0).all()
    expected = first.replace(masks=state.masks, params=with_kernels(first.params, now))
    chex.assert_trees_all_equal(state, expected)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained.batch_stats, first.batch_stats)
    assert all(jax.tree.leaves(moved))
    chain = winning(parts.net, state, 0.75)
    assert all((masks[path] | ~chain[path]).all() for path in chain)


def test_what_cannot_be_ranked_is_told():
    parts = setup("lottery", 0.95)
    sparser = ticket(parts.net, parts.tx, parts.method, jax.random.key(0), winning(
        parts.net, parts.state, 0.9
    ))  # fmt: skip
    with pytest.raises(dst.ConfigError, match=r"^sparsity is 0.5, .* sparser than the one before"):
        winning(parts.net, sparser, 0.5)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, parts.state.params)
    with pytest.raises(dst.ConfigError, match=r"^the weight of layer '.*' must be finite"):
        winning(parts.net, parts.state.replace(params=broken), 0.5)
    truly = setup("random", 0.5, execution="sparse")
    with pytest.raises(dst.ConfigError, match=r"^execution is 'sparse'"):
        winning(truly.net, truly.state, 0.9)


def test_a_sparsity_in_percent_is_no_sparsity():
    """98 would leave fewer than none."""
    parts = setup("lottery")
    with pytest.raises(dst.ConfigError, match=r"^sparsity must be a number in \[0, 1\), not 98\.$"):
        winning(parts.net, parts.state, 98)
