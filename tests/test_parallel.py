"""Data parallelism on four virtual devices: replicas bitwise equal, close to one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.update import AXIS, split_batch
from tests.tiny import batch, loss, setup


def shards_equal(tree):
    """Every device's copy of every leaf is bitwise that of the first."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4, jax.tree_util.keystr(path)
        for copy in copies[1:]:
            assert copy.tobytes() == copies[0].tobytes(), jax.tree_util.keystr(path)


def run(name, devices, norm, steps=5, **options):
    """(state, report) after some updates with a rewire among them."""
    parts = setup(name, norm=norm, **options)
    update = dst.make_update(parts.net, parts.tx, loss, devices=devices)
    rewire = dst.make_rewire(parts.net, parts.tx, parts.method, loss, devices=devices)
    state, report = parts.state, None
    for step in range(steps):
        if step == 2:
            state, report = rewire(state, batch(step))
        state, _ = update(state, batch(step))
    return state, report


def test_replicas_are_bitwise_equal():
    """What pmap is told to be replicated it does not check; this does, statistics included.

    Here with what is measured outside the rewire; all methods are in tests/test_every_method.py.
    """
    assert jax.local_device_count() == 4
    state, report = run("gse", jax.local_devices(), norm=True, heuristic="synflow")
    shards_equal(state)
    shards_equal(report)


@pytest.mark.parametrize("name", ["rigl", "gse"])
def test_four_devices_take_the_step_of_one(name):
    """The same global batch gives the same connections and close weights (no batch norm)."""
    one, _ = run(name, jax.local_devices()[:1], norm=False)
    four, _ = run(name, jax.local_devices(), norm=False)
    for path, mask in one.masks.items():
        np.testing.assert_array_equal(mask, four.masks[path])
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_shard_map_takes_the_steps_of_pmap(monkeypatch):
    """To the bit, a rewire among them, and replicated alike."""
    options = {"norm": True, "steps": 4, "execution": "sparse"}
    state, report = run("gse", jax.local_devices(), **options)
    monkeypatch.setenv("DST_MAP", "shard_map")
    other, other_report = run("gse", jax.local_devices(), **options)
    shards_equal(other)
    bits = lambda tree: jax.tree.map(lambda a: np.asarray(a).tobytes(), tree)  # noqa: E731
    keys = lambda s: s.replace(key=jax.random.key_data(s.key))  # noqa: E731
    assert bits(keys(state)) == bits(keys(other)) and bits(report) == bits(other_report)
    monkeypatch.setenv("DST_MAP", "xmap")
    with pytest.raises(dst.ConfigError, match="DST_MAP must be 'pmap' or 'shard_map', not 'xmap'"):
        run("gse", jax.local_devices(), **options)


def test_a_batch_that_does_not_split_is_refused():
    """One sentence with the number of devices."""
    with pytest.raises(dst.ConfigError, match="batch_size is 6; allowed are multiples of the 4"):
        split_batch(batch(0, 6))


class Counting(nn.Module):
    """A Dense layer that counts: its calls, the positive inputs, whether any was above 1."""

    @nn.compact
    def __call__(self, x):
        for name, start, value in (
            ("calls", jnp.int32(0), lambda n: n + 1),
            ("positive", jnp.int32(0), lambda n: n + (x > 0).sum(dtype=jnp.int32)),
            ("above", jnp.bool_(False), lambda seen: seen | (x > 1).any()),
        ):
            own = self.variable("counters", name, lambda start=start: start)
            if not self.is_initializing():
                own.value = value(own.value)
        return nn.Dense(3)(x)


def counting_run(devices, loss, steps=2):
    """(state, metrics) of a few updates on 8 rows, the first device's of which are special."""
    net, tx = dst.network(Counting(), jnp.ones((1, 4))), optax.sgd(0.1)
    state = dst.init_state(net, tx, dst.method("random", 0.5), jax.random.key(0))
    update = dst.make_update(net, tx, loss, devices=devices)
    x = np.linspace(2, -1, 32, dtype=np.float32).reshape(8, 4)
    for _ in range(steps):
        state, metrics = update(state, (x, np.arange(8, dtype=np.float32)))
    return state, metrics


def test_integers_are_not_those_of_the_first_device():
    """A metric that counts or tells is averaged as the others are; a model's counters agree."""

    def counts(apply, batch):
        x, weights = batch
        metrics = {"rows": jnp.int32(len(x)), "heavy": (weights > 4).sum(), "any": weights[0] > 3}
        return apply(x).mean(), metrics

    (_, one), (state, four) = (
        counting_run(devices, counts) for devices in (jax.local_devices()[:1], jax.local_devices())
    )
    assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in four.items()}
    assert (float(one["rows"]), float(one["heavy"]), float(one["any"])) == (8, 3, 0)
    assert (float(four["rows"]), float(four["heavy"]), float(four["any"])) == (2, 3 / 4, 1 / 2)
    shards_equal(state)
    counters = state.batch_stats["counters"]
    assert counters["calls"] == 2 and counters["calls"].dtype == jnp.int32
    # Positive: 8, 8, 5 and 0 of a device's, twice; the mean is rounded down each time.
    positive = [int((part > 0).sum()) for part in np.split(np.linspace(2, -1, 32), 4)]
    assert len(set(positive)) > 1 and counters["positive"] == 2 * (sum(positive) // 4)
    assert bool(counters["above"])


def test_a_weighted_mean_over_devices():
    """In loss, metric and gradient that of one device; divided by a device's own sum it is not."""

    def weighted(mean):
        def loss(apply, batch):
            x, weights = batch
            value = mean((apply(x) ** 2).sum(1), weights)
            return value, {"weighted": value}

        return loss

    def by_hand(values, weights):
        return (weights * values).sum() / jax.lax.pmean(weights.sum(), AXIS)

    one, two = jax.local_devices()[:1], jax.local_devices()[:2]
    ends = [(dst.weighted_mean, one), (dst.weighted_mean, two), (by_hand, two)]
    (one, said), (two, also), (_, hand) = [counting_run(d, weighted(mean)) for mean, d in ends]
    assert hand["weighted"] == also["weighted"]
    np.testing.assert_allclose(said["weighted"], also["weighted"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    own = weighted(lambda values, weights: (weights * values).sum() / weights.sum())
    _, apart = counting_run(jax.local_devices()[:2], own)
    assert abs(float(said["weighted"]) - float(apart["weighted"])) > 0.01
    values, weights = np.arange(3.0), np.array([True, False, True])
    assert dst.weighted_mean(values, weights) == 1  # outside a step, of what is given
