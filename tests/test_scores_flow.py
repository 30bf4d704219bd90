"""SynFlow before training: known flows, laws of conservation, and ResNet-56 beyond float32."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dst
from dst.connections.masks import kernels_of, with_kernels
from dst.methods import before as scores
from dst.methods.before import densities, flow_scores
from dst.models import ResNet
from dst.start import prune_at_init
from tests.tiny import active


class Chain(nn.Module):
    """Dense layers a, b, c, ... with ReLU between them, without biases."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for name, size in zip("abcdefghi", self.sizes, strict=False):
            x = x if name == "a" else nn.relu(x)
            x = nn.Dense(size, use_bias=False, name=name)(x)
        return x


def chain(*kernels, sparsity=0.5, iterations=100):
    """(net, tx, method, state) of a chain with these kernels, all connections active."""
    sizes = [np.shape(kernel)[1] for kernel in kernels]
    net = dst.network(Chain(tuple(sizes)), jnp.ones((1, np.shape(kernels[0])[0])))
    tx, method = optax.sgd(0.1, 0.9), dst.method("synflow", sparsity, iterations=iterations)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    kernels = {path: jnp.float32(k) for path, k in zip("abcdefghi", kernels, strict=False)}
    return net, tx, method, state.replace(params=with_kernels(state.params, kernels))


def flow(net, state):
    """R and the scores of a state."""
    with jax.enable_x64(True):
        parts = jax.device_get((state.params, state.masks, state.batch_stats))
        R, by_layer = jax.jit(functools.partial(flow_scores, net))(*parts)
        return float(R), {path: np.asarray(score) for path, score in by_layer.items()}


@pytest.fixture
def rounds(monkeypatch):
    """Each round of SynFlow as it comes: (scores, masks before, K, masks after)."""
    seen, choose = [], scores.strongest

    def record(score, masks, k, what):
        seen.append((score, masks, k, choose(score, masks, k, what)))
        return seen[-1][-1]

    monkeypatch.setattr(scores, "strongest", record)
    return seen


def pruned(run):
    net, tx, method, state = run
    return prune_at_init(net, tx, method, None, state)


def kept(state):
    return {p: {tuple(i.tolist()) for i in np.argwhere(m)} for p, m in state.masks.items()}


# ---------------------------------------------------------------------------------------- oracles
def test_o3_scores_of_a_chain():
    """Whatever the signs; each layer sums to R."""
    net, _, _, state = chain([[1, -2], [-3, 4]], [[5], [-6]])
    R, score = flow(net, state)
    assert R == 56
    np.testing.assert_allclose(score["a"], [[5, 12], [15, 24]], rtol=1e-12)
    np.testing.assert_allclose(score["b"], [[20], [36]], rtol=1e-12)


COLLAPSING = (
    [[3, 4, 9], [5, 8, 2]],
    [[3, 1, 9], [3, 9, 7], [2, 7, 7]],
    [[2, 6], [5, 8], [7, 7]],
)


def test_o3_three_rounds_keep_a_path(rounds):
    """13, 8 and 5 of 21 connections; the flow before each round, and at the end."""
    run = chain(*COLLAPSING, sparsity=0.75, iterations=3)
    state = pruned(run)
    assert [k for _, _, k, _ in rounds] == [13, 8, 5]
    for layer in "abc":
        flows = [score[layer].sum() for score, *_ in rounds]
        np.testing.assert_allclose(flows, [6427, 4911, 2242], rtol=1e-12)
    assert kept(state) == {"a": {(0, 2), (1, 1)}, "b": {(2, 2)}, "c": {(2, 0), (2, 1)}}
    assert flow(run[0], state)[0] == pytest.approx(882, rel=1e-12)


def test_o3_one_shot_empties_a_layer_which_survives():
    """No flow, but nothing is NaN: neither the scores of what is left nor a step of training."""
    run = chain(*COLLAPSING, sparsity=0.75, iterations=1)
    net, tx, method, _ = run
    state = pruned(run)
    assert active(state)["b"] == 0 and sum(active(state).values()) == 5
    R, score = flow(net, state)
    assert R < 1e-200 and all((s == 0).all() for s in score.values())
    again = prune_at_init(net, tx, method._replace(sparsity=0.85), None, state)
    assert sum(active(again).values()) == 3
    squared = lambda apply, x: (jnp.sum((apply(x) - 1) ** 2), {})  # noqa: E731
    update = dst.make_update(net, tx, squared, devices=jax.local_devices()[:1])
    new, metrics = update(state, jnp.ones((4, 2)))
    assert bool(metrics["finite"])
    assert all(np.isfinite(k).all() for k in kernels_of(new.params, new.masks).values())


def test_o7_densities():
    d = densities(0.98, 100)
    np.testing.assert_allclose(
        [d[k - 1] for k in (1, 50, 99, 100)],
        [0.96163508, 0.14142136, 0.02079791, 0.02],
        rtol=1e-6,
    )
    assert len(d) == 100


def test_the_last_round_keeps_k_to_the_unit():
    """N - round(N s) is 3 of 5 at 50 %, where round(N d_n) would be 2."""
    assert active(pruned(chain(np.ones((5, 1)), sparsity=0.5, iterations=4))) == {"a": 3}


# ------------------------------------------------------------------------------------ P2: the laws
def normal(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in itertools.pairwise(sizes)]


def test_flow_is_conserved():
    """Each layer sums to R, and into every hidden unit flows what flows out of it."""
    net, _, _, state = chain(*normal(5, 7, 6, 3))
    R, score = flow(net, state)
    for s in score.values():
        assert s.sum() == pytest.approx(R, rel=1e-12)
    for left, right in ("ab", "bc"):
        np.testing.assert_allclose(score[left].sum(0), score[right].sum(1), rtol=1e-12)


def test_the_scale_of_a_layer_and_signs_change_nothing():
    kernels = normal(5, 7, 6, 3)
    state = pruned(chain(*kernels, sparsity=0.6, iterations=5))
    scaled = [kernels[0], kernels[1] * 8, kernels[2]]
    flipped = [-kernels[0], kernels[1], -kernels[2]]
    for other in (scaled, flipped):
        assert kept(pruned(chain(*other, sparsity=0.6, iterations=5))) == kept(state)


def test_what_is_removed_has_no_flow_and_stays_removed(rounds):
    """Masks are nested, and every round sees the flow of those before it."""
    pruned(chain(*normal(5, 7, 6, 3), sparsity=0.8, iterations=6))
    assert len(rounds) == 6
    for score, before, k, after in rounds:
        assert sum(int(mask.sum()) for mask in after.values()) == k
        for path, mask in before.items():
            assert (score[path][~mask] == 0).all()
            assert (mask | ~after[path]).all()
    for (*_, after), (_, before, *_) in itertools.pairwise(rounds):
        assert before is after


def test_resnet_56_has_a_finite_flow_beyond_float32(rounds):
    """Near 1e70; the first convolution and the last layer carry all of it."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    net, tx = dst.network(ResNet(56, 10), image, train=False), optax.sgd(0.1)
    method = dst.method("synflow", 0.98, iterations=2)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    state = prune_at_init(net, tx, method, None, state)
    assert sum(active(state).values()) == 16_979
    for score, *_ in rounds:
        assert all(np.isfinite(s).all() for s in score.values())
        assert score["Conv_0"].sum() == pytest.approx(score["Dense_0"].sum(), rel=1e-9)
    assert rounds[0][0]["Dense_0"].sum() > float(np.finfo(np.float32).max)


# ----------------------------------------------------------------------------------------- refusals
class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(4)(x)))


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Embed(7, 4)(x))


@pytest.mark.parametrize(
    ("model", "x", "sentence"),
    [
        (Normed(), jnp.ones((2, 5)), r"method is 'synflow', .* not positively homogeneous"),
        (Words(), jnp.zeros((2, 5), jnp.int32), r"method is 'synflow', .* takes int32 inputs"),
    ],
)
def test_what_has_no_flow_is_refused(model, x, sentence):
    net, tx, method = dst.network(model, x), optax.sgd(0.1), dst.method("synflow", 0.5)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    with pytest.raises(dst.ConfigError, match=sentence + r".*use 'snip' or 'grasp'\.$"):
        prune_at_init(net, tx, method, None, state)


def test_a_flow_beyond_float64_is_refused():
    """Nine layers of 3e38 make 1e346."""
    run = chain(*[np.full((2, 2), 3e38)] * 9)
    with pytest.raises(dst.ConfigError, match="the flow is infinite"):
        pruned(run)
