"""Small random arenas, and the same layers as dense NumPy masks, which are the oracle."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from dst.connections.arena import Arena, Part, fill
from dst.layers import Conv, Dense

# Two or more blocks, a block with a remainder, one row, one column, and a convolution.
SHAPES = ((9, 5), (1, 4), (7, 1), (2, 2, 3, 4), (6, 6))
BLOCK = 4


class Case(NamedTuple):
    """An arena of float64 values, and each layer's dense (n_in, n_out) mask and kernel."""

    arena: Arena
    values: np.ndarray
    masks: list[np.ndarray]
    kernels: list[np.ndarray]


def parts_of(shapes=SHAPES, block=BLOCK) -> tuple[Part, ...]:
    """Layers of these kernel shapes one after the other; a convolution has one block."""
    parts: list[Part] = []
    for l, shape in enumerate(shapes):
        layer = (Conv if len(shape) == 4 else Dense)(f"layer{l}", shape)
        n_in = layer.size // layer.n_out
        size = n_in if len(shape) == 4 else min(block, n_in)
        parts.append(Part(layer, size, parts[-1].end if parts else 0))
    return tuple(parts)


def possible(parts: tuple[Part, ...]) -> int:
    """All connections there could be."""
    return sum(part.layer.size for part in parts)


def random_case(rng, connections, parts=None, empty=()) -> Case:
    """`connections` at random in all layers but the `empty` ones, with normal float64 values."""
    parts = parts_of() if parts is None else parts
    free = np.concatenate([np.full(p.layer.size, l not in empty) for l, p in enumerate(parts)])
    exists = np.zeros(free.size, bool)
    exists[rng.permutation(np.flatnonzero(free))[:connections]] = True
    apart = np.split(exists, np.cumsum([part.layer.size for part in parts])[:-1])
    kernels = [mask * rng.normal(size=mask.size) for mask in apart]
    given = []
    for mask, kernel in zip(apart, kernels, strict=True):
        order = rng.permutation(np.flatnonzero(mask))
        given.append((order, kernel[order]))
    arena, values = fill(parts, iter(given))
    dense = lambda flat: [a.reshape(-1, p.n_out) for a, p in zip(flat, parts, strict=True)]  # noqa: E731
    return Case(arena, values, dense(apart), dense(kernels))


def listed(arena: Arena) -> list[tuple[int, int]]:
    """(row, column) of every connection, in the arena's order."""
    pointer = np.asarray(arena.pointer)
    row = np.repeat(np.arange(pointer.size - 1), np.diff(pointer))
    return list(zip(row.tolist(), np.asarray(arena.column).tolist(), strict=True))


def ordered(parts: tuple[Part, ...], masks: list[np.ndarray]) -> list[tuple[int, int]]:
    """The same from dense masks, by the definition of a row."""
    return sorted(
        (part.first + int(i) // part.block * part.n_out + int(o), int(i))
        for part, mask in zip(parts, masks, strict=True)
        for i, o in zip(*np.nonzero(mask), strict=True)
    )


def slices(parts: tuple[Part, ...], masks: list[np.ndarray]) -> list[slice]:
    """Where each layer's connections are in the arena."""
    ends = np.cumsum([0, *(int(mask.sum()) for mask in masks)])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def hashed(salt, column):
    """The number that breaks ties, by the definition: lowbias32 of salt xor lowbias32(column)."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    return mix(int(salt) ^ mix(int(column)))
