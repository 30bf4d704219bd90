"""Which connections exist: exact counts a layer, G(n, M) masks, weights scaled to the fan-in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dst.config import ConfigError
from dst.schedules import largest_remainder

Shapes = Mapping[str, tuple[int, ...]]

DISTRIBUTIONS = ("uniform", "er", "erk")


def active_count(possible: int, sparsity: float) -> int:
    """K = N - round(N s), the connections a network of N possible ones keeps at sparsity s."""
    return possible - round(possible * sparsity)


def layer_densities(shapes: Shapes, sparsity: float, distribution: str) -> dict[str, float]:
    """Density of each layer; their mean weighted by layer size is 1 - s.

    `uniform`: 1 - s everywhere. `er`: eps (n_in + n_out) / (n_in n_out) over channels (Mocanu et
    al., 2018). `erk`: eps (sum of the kernel's dimensions) / (their product) (Evci et al., 2020).
    A layer that would exceed 1 is dense and eps is solved again for the others.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(
            f"distribution is {distribution!r}; allowed are {', '.join(DISTRIBUTIONS)}."
        )
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1.0 - sparsity)
    dims = {path: s if distribution == "erk" else s[-2:] for path, s in shapes.items()}
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


def random_mask(key: jax.Array, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Erdős-Rényi G(n, M): `count` of the positions of `shape`, every such set equally likely.

    Positions are drawn until enough distinct ones are set; above one half their complement is.
    Needs the mask and O(count) integers, nothing of the size of a weight matrix.
    """
    size = math.prod(shape)
    if not 0 <= count <= size:
        raise ConfigError(f"count is {count}; allowed is 0 to {size} for a kernel of {shape}.")
    inverted = 2 * count > size
    rng = _generator(key)
    mask = np.full(size, inverted)
    missing = size - count if inverted else count
    while missing:
        drawn = np.unique(rng.integers(size, size=missing))
        new = drawn[mask[drawn] == inverted]
        mask[new] = not inverted
        missing -= len(new)
    return mask.reshape(shape)


def fan_in_weights(key: jax.Array, mask: np.ndarray, gain: float = 2.0) -> np.ndarray:
    """Weights of variance gain / n_j, n_j the actual fan-in of output unit j (Evci et al., 2019).

    Shapes: mask (..., n_in, n_out) -> float32 of the same shape, 0 off the mask. Gain 2 is He's.
    """
    fan_in = mask.reshape(-1, mask.shape[-1]).sum(0)
    std = np.sqrt(gain / np.maximum(fan_in, 1), dtype=np.float32)
    normal = _generator(key).standard_normal(mask.shape, np.float32)
    return np.where(mask, normal * std, np.float32(0))


def _generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator, seeded by a JAX key: a shape of its own each layer compiles nothing."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def dead_units(mask: jax.Array) -> jax.Array:
    """Output units without an incoming connection: int32 scalar. Shapes: mask (..., n_out)."""
    return jnp.sum(~mask.reshape(-1, mask.shape[-1]).any(0), dtype=jnp.int32)
