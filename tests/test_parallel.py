"""Data parallelism on four virtual devices: replicas bitwise equal, close to one device."""

import jax
import numpy as np
import pytest

import dst
from dst.update import split_batch
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


@pytest.mark.parametrize(
    ("name", "options"),
    [("set", {}), ("rigl", {}), ("gse", {"heuristic": "grabo"}), ("gse", {"heuristic": "synflow"})],
)
def test_replicas_are_bitwise_equal(name, options):
    """What pmap is told to be replicated it does not check; this does, statistics included."""
    assert jax.local_device_count() == 4
    state, report = run(name, jax.local_devices(), norm=True, **options)
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


def test_a_batch_that_does_not_split_is_refused():
    """One sentence with the number of devices."""
    with pytest.raises(dst.ConfigError, match="batch_size is 6; allowed are multiples of the 4"):
        split_batch(batch(0, 6))
