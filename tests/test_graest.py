"""GraEst: sketches whose product is the gradient in expectation, exactly, over all signs."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
from dst.methods import heuristics
from dst.methods.plan import plan
from dst.update import AXIS
from tests import tiny
from tests.executions import structure
from tests.test_blockwise import gradient, integers
from tests.test_heuristics import randoms, state_of, weighted
from tests.test_probes import Layers, setting


@pytest.mark.parametrize("path", ["rows", "same", "unequal_strides", "dilated_strided"])
def test_over_all_signs_the_sketch_is_unbiased(path):
    """The mean of the outer product over all 2^rows sign vectors is G; with two vectors it is 0."""
    layer = setting(Layers())[0].layers[path]
    rng = np.random.default_rng(0)
    h, delta = (a[0] for a in integers(rng, layer, devices=1, batch=8 if path == "rows" else 1))
    rows = delta.shape[1:]
    signs = np.float32([*itertools.product((-1, 1), repeat=int(np.prod(rows)))])
    sums = jax.jit(jax.vmap(lambda r: layer.signed_sums(h, delta, r.reshape(rows))))
    f, g = (np.asarray(a, np.float64) for a in sums(signs))
    G = gradient(layer, h, delta)
    assert f.shape[1:] == (layer.columns,) and np.abs(G).max() > 1
    mean = np.einsum("sa,sb->ab", f, g) / len(signs)
    np.testing.assert_array_equal(mean.reshape(layer.shape), G)
    apart = np.outer(f.mean(0), g.mean(0))  # signs of h and of delta drawn apart
    np.testing.assert_array_equal(apart, 0)


class Ones(nn.Module):
    """Layers that all see ones, one of them twice."""

    @nn.compact
    def __call__(self, x):
        rows = x.reshape(x.shape[0], -1)
        twice = nn.Dense(2, name="twice")
        one, other = nn.Dense(2, name="one")(rows), nn.Dense(3, name="other")(rows)
        conv = nn.Conv(2, (2, 1), padding="VALID", name="conv")(x)
        flat = [one, other, twice(rows), twice(rows), conv.reshape(x.shape[0], -1)]
        return jnp.concatenate(flat, 1)


def test_inputs_and_errors_share_their_signs_and_nothing_else_does():
    """Where h and delta are ones f = g = |sum of signs|, whose values tell how many are apart.

    Two devices of one image: 2 rows, of `twice` 4, and 2 x 2 output positions of the convolution.
    """
    x = jnp.ones((2, 1, 3, 1, 2))
    net = dst.network(Ones(), x[0])
    batch = {"x": x, "delta": jnp.ones((2, 1, 2 + 3 + 2 + 2 + 4))}
    state = state_of(randoms(Ones(), x[0]))
    measure = heuristics.marginals_of(net, weighted, heuristics.HEURISTICS["graest"])

    def of_keys(keys, batch):
        return jax.vmap(lambda key: measure(state.replace(key=key), batch))(keys)

    keys, two = jax.random.split(jax.random.key(0), 64), jax.local_devices()[:2]
    sketch = jax.pmap(of_keys, AXIS, in_axes=(None, 0), out_axes=1, devices=two)(keys, batch)
    value = {}
    for path, (f, g) in sketch.items():
        value[path] = np.asarray(f)[:, 0, 0]
        for a in (f, g):  # on both devices, of all units
            np.testing.assert_array_equal(
                a, np.broadcast_to(value[path].reshape(-1, 1, 1), a.shape)
            )
    assert sketch["conv"][0].shape == (64, 2, 4)
    assert set(value["one"]) == set(value["other"]) == {0, 2}
    assert set(value["twice"]) == set(value["conv"]) == {0, 2, 4}
    assert (value["one"] != value["other"]).any() and (value["twice"] != value["conv"]).any()


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_four_devices_rewire_alike(execution):
    """Exact counts, and the same connections on every device though each has its own signs."""
    s = tiny.setup("gse", norm=False, execution=execution, heuristic="graest")
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss)
    state, report = rewire(s.state, s.batch)
    planned = plan(s.net, s.method)
    P, asked = planned.grown[0], planned.subset[0]
    assert int(report["pruned"]) == int(report["grown"]) == P > 0 and bool(report["finite"])
    assert 0.9 * asked.sum() <= int(report["subset_realised"]) <= asked.sum()
    before, after = structure(s.state), structure(state)
    assert sum((mask & ~before[path]).sum() for path, mask in after.items()) == P
    assert sum(mask.sum() for mask in after.values()) == sum(m.sum() for m in before.values())
    for leaf in jax.tree.leaves((state.masks, state.params)):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 4 and len(copies) == 1
