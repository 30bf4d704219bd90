"""Schedules against methods.md's O7, the split over layers against its laws and a slow oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.methods.schedules import (
    cosine_drop_fraction,
    events,
    largest_remainder,
    learning_rate,
    portion,
    rounded_up,
)

END = 46_920  # 120 epochs of 391 steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2),
        (1000, 0.1997759260),
        (10_000, 0.1784092557),
        (23_460, 0.1),
        (40_000, 0.0105434411),
        (46_000, 0.0001896671),
        (END, 0.0),
        (END + 1, 0.0),
        (2 * END, 0.0),  # a cosine alone would be back at 0.2
    ],
)
def test_cosine(step, expected):
    assert cosine_drop_fraction(step, END, 0.2) == pytest.approx(expected, abs=5e-11)


def test_events_begin_at_the_period_and_stay_below_the_end():
    assert list(events(1000, END)) == list(range(1000, 46_001, 1000))
    assert list(events(10, 30)) == [10, 20]
    assert list(events(10, 10)) == []


def drop_counts(active, initial, every, end):
    """|P_t| = floor(p_t |A|) of every event."""
    steps = events(every, end)
    return np.array([portion(cosine_drop_fraction(t, end, initial), active) for t in steps])


def test_drop_counts_of_resnet56_at_98_percent():
    counts = drop_counts(16_979, 0.2, 1000, END)
    assert counts.dtype == np.int64 and len(counts) == 46
    assert (counts[0], counts[-1]) == (3391, 3)  # 0.19977592... and 0.00018966... of 16,979
    assert (np.diff(counts) <= 0).all()


@given(
    st.integers(0, 10**9),
    st.fractions(0, 1, max_denominator=1000),
    st.sampled_from([(10, 20, [Fraction(1, 2)]), (7, 21, [Fraction(3, 4), Fraction(1, 4)])]),
)
@settings(deadline=None)
def test_drop_counts_are_exact_where_the_cosine_is_rational(active, initial, schedule):
    every, end, fractions = schedule
    expected = [math.floor(p * initial * active) for p in fractions]
    assert drop_counts(active, float(initial), every, end).tolist() == expected


@pytest.mark.parametrize(("active", "initial", "expected"), [(35, 0.4, 7), (100, 0.58, 29)])
def test_drop_counts_survive_float_noise(active, initial, expected):
    assert drop_counts(active, initial, 10, 20).tolist() == [expected]


@given(st.integers(0, 2**31), st.fractions(1, 20, max_denominator=100))
@settings(deadline=None)
def test_a_ratio_is_rounded_up_exactly(count, ratio):
    """c as a user writes it, of at most two decimals; 1.1 x 50 is 55, not 56."""
    ratio = Fraction(round(ratio * 100), 100)
    assert rounded_up(float(ratio), count) == math.ceil(ratio * count)


def hamilton(total: int, weights: list[int], caps: list[int]) -> list[int]:
    """The split in fractions, one full layer at a time: the slow oracle."""
    total, fixed = min(total, sum(caps)), {}
    while True:
        free = [i for i in range(len(caps)) if i not in fixed]
        left, whole = total - sum(fixed.values()), sum(weights[i] for i in free)
        if not whole:
            if left and any(caps[i] and weights[i] != caps[i] for i in free):
                weights = caps
                continue
            return [fixed.get(i, 0) for i in range(len(caps))]
        quota = {i: Fraction(left * weights[i], whole) for i in free}
        over = [i for i in free if quota[i] >= caps[i]]
        if not over:
            break
        fixed[over[0]] = caps[over[0]]
    counts = {**fixed, **{i: math.floor(q) for i, q in quota.items()}}
    for i in sorted(free, key=lambda i: (math.floor(quota[i]) - quota[i], i)):
        if sum(counts.values()) < total:
            counts[i] += 1
    return [counts[i] for i in range(len(caps))]


layers = st.lists(
    st.tuples(st.one_of(st.integers(0, 9), st.integers(0, 2**40)), st.integers(0, 40)), max_size=6
)


@given(st.integers(0, 150), layers)
@settings(deadline=None, max_examples=400)
def test_largest_remainder_is_hamiltons_method_with_caps(total, pairs):
    weights, caps = [w for w, _ in pairs], [c for _, c in pairs]
    counts = largest_remainder(total, weights, caps)
    assert counts.dtype == np.int64
    assert counts.tolist() == hamilton(total, weights, caps)
    assert counts.sum() == min(total, sum(caps))
    assert (counts >= 0).all() and (counts <= caps).all()
    for i, (w_i, c_i) in enumerate(pairs):
        for j, (w_j, c_j) in enumerate(pairs):
            if w_i > w_j and c_i >= c_j:
                assert counts[i] >= counts[j]


@given(st.integers(0, 2**40), st.lists(st.integers(1, 2**40), min_size=1, max_size=60))
@settings(deadline=None)
def test_largest_remainder_is_within_one_of_proportional(total, weights):
    counts = largest_remainder(total, weights, [total + 1] * len(weights))
    assert counts.sum() == total
    for count, weight in zip(counts.tolist(), weights, strict=True):
        assert abs(count - Fraction(total * weight, sum(weights))) < 1


@pytest.mark.parametrize(
    ("total", "weights", "caps", "expected"),
    [
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),  # ties in layer order
        (10, [8, 1, 1], [4, 9, 9], [4, 3, 3]),  # what is too much goes to the others
        (5, [2**40 + 1, 2**40, 2**40], [9, 9, 9], [2, 2, 1]),
        (3, [2**60 + 1, 2**60 + 2], [9, 9], [1, 2]),  # float64 would see a tie
        (4, [1, 0, 0], [2, 4, 4], [2, 1, 1]),  # no weight is left: by room
        (7, [], [], []),
        (0, [1, 2], [3, 4], [0, 0]),
    ],
)
def test_largest_remainder_by_hand(total, weights, caps, expected):
    assert largest_remainder(total, weights, caps).tolist() == expected


def test_largest_remainder_takes_nothing_but_natural_numbers():
    with pytest.raises(TypeError):
        largest_remainder(3, [0.5, 0.5], [3, 3])
    with pytest.raises(ValueError, match=">= 0"):
        largest_remainder(3, [-1, 2], [3, 3])


def test_learning_rate_drops_at_the_first_step_of_an_epoch():
    rate = learning_rate(0.1, (80, 120), 0.1, 390)
    steps = [0, 80 * 390 - 1, 80 * 390, 120 * 390 - 1, 120 * 390, 10**6]
    np.testing.assert_allclose([rate(s) for s in steps], [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], 1e-6)
    assert learning_rate(0.1, (), 0.1, 390)(10**6) == np.float32(0.1)


def test_two_drops_at_one_step_are_both_taken():
    rate = learning_rate(0.1, (0.5, 0.52), 0.1, 11)
    assert [round(float(rate(step)), 6) for step in (5, 6)] == [0.1, 0.001]
