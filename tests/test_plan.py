"""What is planned of a run's rewires: the paper's numbers, and when they are due."""

import numpy as np

import dst
from dst.methods.plan import plan
from dst.methods.schedules import largest_remainder
from tests.tiny import setup


def test_plan_holds_the_papers_numbers():
    """98 % of ResNet-56's 848,944: 46 events, |P| = floor(p_t K), |S| = 10 |P| split by |W_l|."""
    parts = setup(sparsity=0.98, every=1000, end=46_920)
    sizes = [layer.size for layer in parts.net.layers.values()]
    _, active, P, S, _ = plan(parts.net, parts.method)
    K = sum(sizes) - round(0.98 * sum(sizes))
    t = np.arange(1000, 46_920, 1000)
    exact = 0.1 * (1 + np.cos(np.pi * t / 46_920)) * K
    np.testing.assert_array_equal(P[:-1], np.floor(exact))
    assert len(P) == 47 and P[-1] == 0 and (active == K).all()
    np.testing.assert_array_equal(S.sum(1), np.minimum(10 * P, sum(sizes)))
    np.testing.assert_array_equal(S[0], largest_remainder(10 * int(P[0]), sizes, sizes))


def test_due_is_every_period_until_the_end():
    """Never at step 0, never at or after the end, never for a static network."""
    method = dst.method("gse", every=1000, end=46_800)
    assert [t for t in range(0, 60_000, 500) if dst.due(method, t)] == [*range(1000, 46_800, 1000)]
    assert not dst.due(dst.method("random", every=10, end=100), 10)
