"""What changes over a run, known to the host beforehand, and the exact split over layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import optax


def cosine_drop_fraction(step: int, end: int, initial: float, last: float = 0.0) -> float:
    """p_t = last + (initial - last)/2 (1 + cos(pi t / end)) for t < end, else 0 (section 4.1)."""
    if step >= end:
        return 0.0
    return last + (initial - last) / 2 * (1 + math.cos(math.pi * step / end))


def cubic_sparsity(step: int, end: int, initial: float, final: float) -> float:
    """s_t = s_f + (s_i - s_f) (1 - t / end)^3, t at most `end` (Zhu and Gupta, 2017)."""
    return final + (initial - final) * (1 - min(step / end, 1.0)) ** 3


def events(every: int, end: int) -> range:
    """The steps before whose update the network is rewired: every, 2 every, ... below end."""
    return range(every, end, every)


def portion(fraction: float, active: int) -> int:
    """floor(p |A|); a product that misses an integer by float64's rounding is that integer."""
    noise = 8 * np.finfo(np.float64).eps * active  # 0.29 * 100 is 29
    return min(math.floor(fraction * active + noise), active)


def rounded_up(ratio: float, count: int) -> int:
    """ceil(c n), whatever float64's rounding adds to an integer."""
    noise = 8 * np.finfo(np.float64).eps * ratio * count  # 1.1 * 50 is 55
    return math.ceil(ratio * count - noise)


def largest_remainder(total: int, weights: Sequence[int], caps: Sequence[int]) -> np.ndarray:
    """Splits `total` in proportion to `weights`, none above its cap: int64 (L,), Hamilton's way.

    The sum is exactly min(total, sum(caps)). What a full layer cannot take goes to the others in
    proportion; equal remainders are served in layer order. Weights are integers, so all is exact.
    """
    left = min(operator.index(total), sum(map(int, caps)))
    caps = [operator.index(c) for c in caps]
    weights = [operator.index(w) for w in weights]
    if left < 0 or any(n < 0 for n in (*weights, *caps)):
        raise ValueError("largest_remainder splits a total >= 0 by weights >= 0 and caps >= 0.")
    counts = [0] * len(caps)
    free = [i for i in range(len(caps)) if caps[i] > 0]
    while left and free:
        if not any(weights[i] for i in free):  # only layers without weight have room
            weights = caps
        whole = sum(weights[i] for i in free)
        full = [i for i in free if left * weights[i] >= caps[i] * whole]
        for i in full:
            counts[i] = caps[i]
        if full:
            left -= sum(caps[i] for i in full)
            free = [i for i in free if i not in full]
            continue
        quotas = {i: divmod(left * weights[i], whole) for i in free}
        for i, (quotient, _) in quotas.items():
            counts[i] = quotient
        left -= sum(quotient for quotient, _ in quotas.values())
        for i in sorted(free, key=lambda i: -quotas[i][1])[:left]:  # a stable sort
            counts[i] += 1
        break
    return np.array(counts, np.int64)


def learning_rate(
    base: float, drop_epochs: Sequence[float], factor: float, steps_per_epoch: int
) -> optax.Schedule:
    """`base`, times `factor` from the first step of each of `drop_epochs`, maybe fractions, on."""
    drops: dict[int, float] = {}
    for epoch in drop_epochs:  # two of them may be one step
        step = round(epoch * steps_per_epoch)
        drops[step] = drops.get(step, 1.0) * factor
    return optax.piecewise_constant_schedule(base, drops)
