"""Which connections exist: exact counts a layer, G(n, M) masks, weights scaled to the fan-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def random_positions(key: jax.Array, size: int, count: int) -> np.ndarray:
    """Erdős-Rényi G(n, M): `count` of `size` positions, every such set equally likely.

    Shapes: int64 (count,), sorted. Memory: O(count), whatever `size` is (up to 2^63).
    Errors: a count that is negative or above `size`.
    """
    if not 0 <= count <= size:
        raise ConfigError(f"count is {count}; allowed is 0 to {size}, all possible connections.")
    rng = _generator(key)
    if 2 * count <= size:
        return _distinct(rng, size, count)
    inside = np.ones(size, bool)  # of at most 2 count; few are left to draw until all differ
    inside[_distinct(rng, size, size - count)] = False
    return np.flatnonzero(inside)


def _distinct(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Positions drawn, those drawn before replaced, until `count` differ: int64, sorted."""
    found, different = np.empty(count, np.int64), 0
    while different < count:
        found[different:] = rng.integers(size, size=count - different)
        found.sort()
        first = np.append(True, found[1:] != found[:-1])
        different = int(np.count_nonzero(first))
        found[:different] = found[first]
    return found


def fan_in_weights(key: jax.Array, output: np.ndarray, n_out: int, gain: float = 2.0) -> np.ndarray:
    """Weights of variance gain / n_j, n_j the actual fan-in of output unit j (Evci et al., 2019).

    Shapes: output (M,), the unit of each connection -> float32 (M,); only these M are drawn. Gain 2
    is He's.
    """
    fan_in = np.bincount(output, minlength=n_out)
    std = np.sqrt(gain / np.maximum(fan_in, 1), dtype=np.float32)
    weights = _generator(key).standard_normal(len(output), np.float32)
    weights *= std[output]
    return weights


def strongest(
    score: Mapping[str, Any], masks: Mapping[str, Any], k: int, what: str
) -> dict[str, np.ndarray]:
    """Masks of the k largest scores of active connections: global, by stable rank.

    Signed scores of the kernels' shapes; of equals the first in layer order is kept, and never one
    that is inactive. Errors: a score that is not finite, told as `what`.
    """
    for path, mask in masks.items():
        if not np.isfinite(np.asarray(score[path])[np.asarray(mask)]).all():
            raise ConfigError(
                f"{what} of layer {path!r} must be finite, but some is NaN or infinite."
            )
    active = np.concatenate([np.asarray(mask).ravel() for mask in masks.values()])
    flat = np.concatenate([np.asarray(score[path]).ravel() for path in masks])
    order = np.argsort(np.where(active, -flat, np.inf), kind="stable")
    chosen = np.zeros(active.size, bool)
    chosen[order[: min(k, np.count_nonzero(active))]] = True
    parts = np.split(chosen, np.cumsum([mask.size for mask in masks.values()])[:-1])
    return {path: c.reshape(masks[path].shape) for path, c in zip(masks, parts, strict=True)}


def thinned(
    first: Mapping[str, int],
) -> Callable[[Mapping[str, int]], list[tuple[str, int, int]]]:
    """A function of the counts: (layer, its count, its first) of those below a tenth of the first.

    It remembers what it has told: each layer is told once.
    """
    told: set[str] = set()

    def tell(active: Mapping[str, int]) -> list[tuple[str, int, int]]:
        low = [(p, n, first[p]) for p, n in active.items() if 10 * n < first[p]]
        new = [layer for layer in low if layer[0] not in told]
        told.update(path for path, _, _ in new)
        return new

    return tell


def _generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator, seeded by a JAX key: a shape of its own each layer compiles nothing."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def dead_units(mask: jax.Array) -> jax.Array:
    """Output units without an incoming connection: int32 scalar. Shapes: mask (..., n_out)."""
    return jnp.sum(~mask.reshape(-1, mask.shape[-1]).any(0), dtype=jnp.int32)
