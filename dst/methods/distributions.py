"""How many connections each layer has at first: exact counts for uniform, ER and ERK sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dst.errors import ConfigError
from dst.methods.schedules import largest_remainder

Shapes = Mapping[str, tuple[int, ...]]

DISTRIBUTIONS = ("uniform", "er", "er_unfolded", "erk")


def active_count(possible: int, sparsity: float) -> int:
    """K = N - round(N s), the connections a network of N possible ones keeps at sparsity s."""
    return possible - round(possible * sparsity)


def layer_densities(shapes: Shapes, sparsity: float, distribution: str) -> dict[str, float]:
    """Density of each layer; their mean weighted by layer size is 1 - s.

    `uniform`: 1 - s everywhere. `er`: eps (n_in + n_out) / (n_in n_out) over channels (Mocanu et
    al., 2018). `er_unfolded`: the same with kx ky n_in for n_in (Heddes et al., 2024). `erk`: eps
    (sum of the kernel's dimensions) / (their product) (Evci et al., 2020).
    A layer that would exceed 1 is dense and eps is solved again for the others.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(
            f"distribution is {distribution!r}; allowed are {', '.join(DISTRIBUTIONS)}."
        )
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1.0 - sparsity)
    unfolded = {path: (math.prod(s[:-1]), s[-1]) for path, s in shapes.items()}
    channels = {path: s[-2:] for path, s in shapes.items()}
    of: dict[str, Mapping] = {"er": channels, "er_unfolded": unfolded, "erk": shapes}
    dims = of[distribution]
    raw = {path: sum(d) / math.prod(d) for path, d in dims.items()}
    full: set[str] = set()
    while True:
        budget = (1.0 - sparsity) * sum(size.values()) - sum(size[path] for path in full)
        free = [path for path in shapes if path not in full]
        weight = sum(raw[path] * size[path] for path in free)
        eps = budget / weight if free else 0.0
        largest = max((raw[path] for path in free), default=0.0)
        if eps * largest <= 1.0:
            return {path: 1.0 if path in full else eps * raw[path] for path in shapes}
        full |= {path for path in free if raw[path] == largest}


def layer_counts(shapes: Shapes, sparsity: float, distribution: str = "uniform") -> dict[str, int]:
    """Active connections of each layer: proportional to density x size, their sum exactly K."""
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    density = layer_densities(shapes, sparsity, distribution)
    weights = [density[path] * size[path] for path in shapes]
    total = active_count(sum(size.values()), sparsity)
    # Densities are real numbers; 2^40 keeps their proportions to 1e-12 in exact integers.
    scale = 2**40 / max(max(weights, default=0.0), 1e-300)
    counts = largest_remainder(total, [round(w * scale) for w in weights], list(size.values()))
    return {path: int(count) for path, count in zip(shapes, counts, strict=True)}
