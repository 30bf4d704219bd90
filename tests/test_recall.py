"""How well a density tells large gradients: slow oracles and laws."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dst.methods.grow import by_dense_gradient
from dst.methods.heuristics import HEURISTICS, marginals_of
from dst.methods.plan import plan
from dst.methods.subset import drawing
from dst.update import parallel, split_batch
from experiments import quality, recall
from tests import tiny

ONE = jax.local_devices()[:1]


# ------------------------------------------------------------------------------------- correlations
def slow_spearman(a, b):
    """Pearson's correlation of how many are smaller, half of the equal ones included."""
    rank = lambda v: np.array([(v < x).sum() + (v == x).sum() / 2 for x in v])  # noqa: E731
    x, y = (r - r.mean() for r in (rank(a), rank(b)))
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 6))
def test_spearman_ranks_ties_at_their_mean(seed, n, values):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(values, size=n) / 7, rng.integers(values + 1, size=n) / 7
    found = recall.spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(slow_spearman(a, b), abs=1e-12)
        assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def marginals(net, seed):
    """Random f and g, some of which are 0."""
    rng = np.random.default_rng(seed)
    draw = lambda n: np.maximum(rng.normal(size=n), 0).astype(np.float32)  # noqa: E731
    return {path: (draw(layer.n_in), draw(layer.n_out)) for path, layer in net.layers.items()}


def test_density_is_the_share_of_draws_times_the_size_of_the_layer():
    net = tiny.setup().net
    for path, (f, g) in marginals(net, 0).items():
        layer = net.layers[path]
        p = np.zeros(layer.shape)
        for at in np.ndindex(*layer.shape):
            places = np.prod(layer.shape[:-2])
            p[at] = f[at[-2]] / f.sum(dtype=float) * g[at[-1]] / g.sum(dtype=float) / places
        np.testing.assert_allclose(recall.density(layer, f, g), layer.size * p.ravel(), rtol=1e-6)


def test_uniform_orders_nothing_and_nothing_possible_is_0():
    parts = tiny.setup()
    fg = marginals_of(parts.net, tiny.loss, HEURISTICS["uniform"])(parts.state, None)
    G = {path: np.arange(layer.size) for path, layer in parts.net.layers.items()}
    free = {path: ~np.asarray(mask).ravel() for path, mask in parts.state.masks.items()}
    assert recall.correlations(parts.net, G, free, fg) == (None, None)
    layer = parts.net.layers["Dense_0"]
    assert not recall.density(layer, np.zeros(layer.n_in), np.ones(layer.n_out)).any()


def test_a_heuristic_that_is_the_gradient_has_correlation_1():
    """Over the network and within layers; where all is active there is no layer to speak of."""
    net = tiny.setup().net
    fg = marginals(net, 1)
    G = {path: recall.density(layer, *fg[path]) for path, layer in net.layers.items()}
    free = {path: np.random.default_rng(0).random(g.size) < 0.7 for path, g in G.items()}
    free["Dense_1"][:] = False
    assert recall.correlations(net, G, free, fg) == pytest.approx((1, 1))
    opposite = {path: -g for path, g in G.items()}
    assert recall.correlations(net, opposite, free, fg) == pytest.approx((-1, -1))
    # One layer rescaled: within the layers nothing changes, over the network it does.
    other = {**G, "Dense_0": 100 + G["Dense_0"]}
    network, layers = recall.correlations(net, other, free, fg)
    assert layers == pytest.approx(1) and network < 0.99


def test_of_one_image_grabo_is_the_gradient_of_a_dense_layer():
    """Eq. 7 is then Eq. 5, places in a convolution's window apart."""
    parts = tiny.setup(images=1, norm=False)

    def body(state, batch):
        G = state.masks.split_by_layer(by_dense_gradient(parts.net, tiny.loss)(state, batch))
        fg = marginals_of(parts.net, tiny.loss, HEURISTICS["grabo"])(state, batch)
        return {path: g.ravel() for path, g in G.items()}, fg

    run = parallel(body, (None, 0), ONE)
    G, fg = jax.device_get(run(parts.state, split_batch(parts.batch, ONE)))
    rank = {
        path: recall.spearman(recall.density(layer, *fg[path]), G[path])
        for path, layer in parts.net.layers.items()
    }
    assert rank["Dense_0"] == pytest.approx(1, abs=1e-4)
    assert rank["Dense_1"] == pytest.approx(1, abs=1e-4)
    assert 0.1 < rank["Conv_0"] < 0.99


# --------------------------------------------------------------------------- recall, gradient mass
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_recall_and_mass_equal_a_slow_count(data):
    n = data.draw(st.integers(2, 20))
    bits = st.lists(st.booleans(), min_size=n, max_size=n)
    G = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), np.float32)
    free = np.array(data.draw(bits))
    free[0] = True
    k = data.draw(st.integers(1, int(free.sum())))
    S = np.flatnonzero(np.array(data.draw(bits)) & free)
    best = recall.largest_gradients(G, free, k)
    order = sorted(np.flatnonzero(free), key=lambda i: (-G[i], i))
    assert best.tolist() == order[:k]
    found, mass = recall.caught(G, best, S)
    assert found == len(set(order[:k]) & set(S.tolist())) / k
    total = sum(G[i] for i in order[:k])
    if total == 0:
        assert mass is None
        return
    assert mass == pytest.approx(sum(sorted(G[S], reverse=True)[:k]) / total)
    # Laws: at most RigL's; what was caught counts; more candidates never lose any.
    both = np.intersect1d(best, S)
    assert G[both].sum() / total - 1e-9 <= mass <= 1
    assert mass == 1 or found < 1
    more, more_mass = recall.caught(G, best, np.union1d(S, best[:1]))
    assert more >= found and more_mass >= mass


def test_mass_may_be_less_than_recall():
    G, free = np.array([100, 1, 0.5]), np.ones(3, bool)
    found, mass = recall.caught(G, recall.largest_gradients(G, free, 2), np.array([1]))
    assert (found, mass) == (0.5, pytest.approx(1 / 101))


def drawn(parts, ratio, fg, keys):
    """S of each key, of the plan's first event."""
    draw = jax.jit(drawing(parts.net, parts.method._replace(subset_ratio=ratio)))
    return [quality.subset(parts.net, draw, key, parts.state, fg, 0) for key in keys]


def random_gradients(parts):
    """|G| of all connections, which are inactive, and the |P| largest of these."""
    free = ~np.concatenate([np.asarray(mask).ravel() for mask in parts.state.masks.values()])
    G = np.random.default_rng(4).exponential(size=free.size)
    return G, free, recall.largest_gradients(G, free, int(plan(parts.net, parts.method).grown[0]))


def test_everything_holds_everything():
    """Whatever the heuristic, S that large has the recall and the mass of RigL."""
    parts = tiny.setup()
    G, free, best = random_gradients(parts)
    (S,) = drawn(parts, 1e3, marginals(parts.net, 2), [jax.random.key(0)])
    np.testing.assert_array_equal(np.sort(S), np.flatnonzero(free))
    assert recall.caught(G, best, S) == (1, 1)


def test_uniform_catches_what_chance_does():
    """On average |S_l| / |inactive_l| of each layer, thus about |S| / |inactive|."""
    parts = tiny.setup()
    G, free, best = random_gradients(parts)
    fg = marginals_of(parts.net, tiny.loss, HEURISTICS["uniform"])(parts.state, None)
    keys = [jax.random.fold_in(jax.random.key(0), n) for n in range(100)]
    S = drawn(parts, 4.0, fg, keys)
    found = np.mean([recall.caught(G, best, s)[0] for s in S])
    p, k = len(S[0]) / free.sum(), len(best)
    assert len(S[0]) == 4 * k
    assert abs(found - p) < 5 * np.sqrt(p * (1 - p) / (k * len(S)))
