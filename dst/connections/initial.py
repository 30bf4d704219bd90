"""The first network: G(n, M) connections, weights scaled to the fan-in (section 4.1)."""

from __future__ import annotations

import jax
import numpy as np

from dst.errors import ConfigError


def random_positions(key: jax.Array, size: int, count: int) -> np.ndarray:
    """Erdős-Rényi G(n, M): `count` of `size` positions, every such set equally likely.

    Shapes: int64 (count,), sorted. Memory: O(count), whatever `size` is (up to 2^63).
    Raises: a count that is negative or above `size`.
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


def fan_in_weights(key: jax.Array, output: np.ndarray, n_out: int, gain: float = 1.0) -> np.ndarray:
    """Weights of variance gain / n_j, n_j the actual fan-in of output unit j (Evci et al., 2019).

    Shapes: output (M,), the unit of each connection -> float32 (M,); only these M are drawn. Gain 2
    is He's.
    """
    fan_in = np.bincount(output, minlength=n_out)
    std = np.sqrt(gain / np.maximum(fan_in, 1), dtype=np.float32)
    weights = _generator(key).standard_normal(len(output), np.float32)
    weights *= std[output]
    return weights


def scaled_to_fan_in(kernel: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The connections' weights of a dense kernel, times sqrt(columns / n_j): float32 (M,).

    n_j is the actual fan-in of output unit j, so that a unit's variance is as in the dense layer.
    Shapes: kernel (..., n_in, n_out), position int64 (M,) in the flat kernel.
    """
    n_out = kernel.shape[-1]
    fan_in = np.bincount(position % n_out, minlength=n_out)
    factor = np.sqrt(kernel.size // n_out / np.maximum(fan_in, 1)).astype(np.float32)
    return kernel.reshape(-1)[position] * factor[position % n_out]


def _generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator, seeded by a JAX key: a shape of its own each layer compiles nothing."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
