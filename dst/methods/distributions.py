"""How many connections each layer has at first: exact counts for uniform, ER and ERK sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dst.errors import ConfigError, check_value, number, one_of
from dst.methods.base import Method
from dst.methods.schedules import largest_remainder
from dst.network import Network
from dst.vocabulary import Names

Shapes = Mapping[str, tuple[int, ...]]
SPARSITY = number(lambda v: 0 <= v < 1, "in [0, 1)")


class Distribution(NamedTuple):
    """Densities of layers up to a factor eps, of all kernels' shapes: {path: above 0}."""

    raw: Callable[[Shapes], dict[str, float]]


def uniform(shapes: Shapes) -> dict[str, float]:
    """1 - s everywhere."""
    return dict.fromkeys(shapes, 1.0)


def _per_unit(dims: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    return {path: sum(d) / math.prod(d) for path, d in dims.items()}


def er(shapes: Shapes) -> dict[str, float]:
    """eps (n_in + n_out) / (n_in n_out) over channels (Mocanu et al., 2018)."""
    return _per_unit({path: s[-2:] for path, s in shapes.items()})


def er_unfolded(shapes: Shapes) -> dict[str, float]:
    """ER with kx ky n_in for n_in (Heddes et al., 2024)."""
    return _per_unit({path: (math.prod(s[:-1]), s[-1]) for path, s in shapes.items()})


def erk(shapes: Shapes) -> dict[str, float]:
    """eps (sum of the kernel's dimensions) / (their product) (Evci et al., 2020)."""
    return _per_unit(dict(shapes))


DISTRIBUTIONS = Names(
    "distribution",
    Distribution,
    dict(
        uniform=Distribution(uniform),
        er=Distribution(er),
        er_unfolded=Distribution(er_unfolded),
        erk=Distribution(erk),
    ),
)


def active_count(possible: int, sparsity: float) -> int:
    """K = N - round(N s), the connections a network of N possible ones keeps at sparsity s."""
    return possible - round(possible * sparsity)


def count_of(net: Network, sparsity: float) -> int:
    """K = N - round(N s). Raises ConfigError: not in [0, 1), or no connection is left."""
    check_value("sparsity", sparsity, SPARSITY)
    N = net.possible
    K = active_count(N, sparsity)
    if not K:
        raise ConfigError(
            f"sparsity is {sparsity}, which leaves none of the {N} possible connections; the "
            f"highest that keeps one is {_highest(N)}."
        )
    return K


def _highest(N: int) -> float:
    """The highest sparsity of so many digits as N has, and one more, that keeps a connection."""
    unit = 10 ** (len(str(N)) + 1)
    most = unit - unit // (2 * N)
    return next(s for s in (n / unit for n in range(most, 0, -1)) if active_count(N, s))


def layer_densities(shapes: Shapes, sparsity: float, distribution: str) -> dict[str, float]:
    """Density of each layer; their mean weighted by layer size is 1 - s.

    A layer that would exceed 1 is dense and eps is solved again for the others.
    """
    check_value("distribution", distribution, one_of(DISTRIBUTIONS))
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1.0 - sparsity)
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = DISTRIBUTIONS[distribution].raw(shapes)
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


def first_counts(net: Network, method: Method) -> dict[str, int]:
    """Connections of each layer at step 0; their sum is K."""
    # As RigL has it: all sides of a window, but of attention its matrix.
    shapes = {p: layer.dims if layer.matrix else layer.shape for p, layer in net.layers.items()}
    return layer_counts(shapes, method.first_sparsity, method.distribution)
