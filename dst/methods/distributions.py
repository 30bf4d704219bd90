"""How many connections each layer has at first: exact counts for uniform, ER and ERK sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dst.errors import ConfigError, check_value, number, one_of
from dst.methods.base import Method
from dst.methods.schedules import largest_remainder
from dst.network import Network
from dst.vocabulary import Names

Own = Sequence[tuple[str, float | None]]
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


def layer_counts(
    shapes: Shapes, sparsity: float, distribution: str = "uniform", sparsity_of: Own = ()
) -> dict[str, int]:
    """Active connections of each layer: proportional to density x size, their sum exactly K.

    Layers that have a sparsity of their own have exactly its count; it is the others that share
    what is left. Raises: as `own_sparsity`, and more or fewer connections left than they can have.
    """
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    total = active_count(sum(size.values()), sparsity)
    own = {path: active_count(size[path], s or 0) for path, s in own_sparsity(size, sparsity_of)}
    if not own:
        return _shared(shapes, total, sparsity, distribution)
    others = {path: shape for path, shape in shapes.items() if path not in own}
    left, most = total - sum(own.values()), sum(size[path] for path in others)
    if not 0 <= left <= most:
        raise ConfigError(
            f"sparsity_of gives {sum(own.values())} connections to layers of its own, which leaves "
            f"{left} of the {total} at sparsity {sparsity} to the {len(others)} other layers; "
            f"they can have 0 to {most}."
        )
    share = _shared(others, left, 1 - left / most, distribution) if left else {}
    return {path: own[path] if path in own else share.get(path, 0) for path in shapes}


def own_sparsity(paths: Collection[str], sparsity_of: Own) -> Iterator[tuple[str, float | None]]:
    """The layers that a glob matches, each with the first one's sparsity.

    Raises: a glob that matches no layer.
    """
    for glob, _ in sparsity_of:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise ConfigError(
                f"sparsity_of has {glob!r}, which is no layer's path; the layers are "
                f"{', '.join(map(repr, paths))}."
            )
    for path in paths:
        found = [s for glob, s in sparsity_of if fnmatchcase(path, glob)]
        if found:
            yield path, found[0]


def _shared(shapes: Shapes, total: int, sparsity: float, distribution: str) -> dict[str, int]:
    """`total` connections of layers, in proportion to density x size."""
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    density = layer_densities(shapes, sparsity, distribution)
    weights = [density[path] * size[path] for path in shapes]
    # Densities are real numbers; 2^40 keeps their proportions to 1e-12 in exact integers.
    scale = 2**40 / max(max(weights, default=0.0), 1e-300)
    counts = largest_remainder(total, [round(w * scale) for w in weights], list(size.values()))
    return {path: int(count) for path, count in zip(shapes, counts, strict=True)}


def first_counts(net: Network, method: Method) -> dict[str, int]:
    """Connections of each layer at step 0; their sum is K."""
    # As RigL has it: all sides of a window, but of attention its matrix.
    shapes = {p: layer.dims if layer.matrix else layer.shape for p, layer in net.layers.items()}
    return layer_counts(shapes, method.first_sparsity, method.distribution, method.sparsity_of)


def held_layers(net: Network, method: Method) -> frozenset[int]:
    """Layers l that have all their connections for good: those with None in `sparsity_of`."""
    own = dict(own_sparsity(net.layers, method.sparsity_of))
    return frozenset(l for l, path in enumerate(net.layers) if own.get(path, 0) is None)
