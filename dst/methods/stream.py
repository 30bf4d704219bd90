"""RigL's choice without RigL's memory: the dense gradient a block at a time, only the best kept.

A block of dL/dw is one product of matrices: some inputs (of one kernel position in a convolution)
times some outputs. The blocks of all layers are visited in one loop, and of each the candidates
better than the best |P| so far are kept. Memory is O(activations + |P| + a block).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.arena import Arena, Part, rows_of
from dst.connections.hashing import hashes_at
from dst.connections.products import over_range
from dst.connections.select import NOWHERE, Found, best, bits, lowest
from dst.layers.base import Layer
from dst.network import Network
from dst.observe import observe
from dst.state import SparseState
from dst.update import TIE_STREAM, Loss, average, run_loss, stream

Array = jax.Array
Units = Mapping[str, tuple[Array, Array]]  # h and delta of every layer, from `observe`

BLOCK = 2**20  # connections scored at a time


def gradient_block(
    layer: Layer, h: Array, delta: Array, corner: Sequence[Array], size: tuple[int, int]
) -> Array:
    """dL/dw of a block, as `Layer.gradient_block`, averaged over the devices.

    Corner (kx, ky, i, o) int32, size (inputs, outputs); h and delta from `observe`. Shapes:
    (inputs, outputs), at least float32.
    """
    return average(layer.gradient_block(h, delta, corner, size))


# ----------------------------------------------------------------------------------------- blocks
def corners(layer: Layer, size: tuple[int, int], run: int) -> np.ndarray:
    """Where the blocks of a layer begin, in the order of its kernel: (kx, ky, i, o) int32 (n, 4).

    No block but the last of a run of `run` inputs has fewer inputs than `size` says.
    """
    kx, ky = layer.places
    inputs = [
        i
        for begin in range(0, layer.n_in, run)
        for i in range(begin, min(begin + run, layer.n_in), size[0])
    ]
    grid = np.meshgrid(range(kx), range(ky), inputs, range(0, layer.n_out, size[1]), indexing="ij")
    return np.stack([axis.ravel() for axis in grid], 1).astype(np.int32)


def fit(layer: Layer, corner: Sequence[Array], size: tuple[int, int]) -> tuple[list[Array], Array]:
    """The corner moved back until the block is inside the layer, and what of it is then due.

    Shapes: four int32, bool (inputs, outputs).
    """
    *place, i, o = corner
    at = [jnp.minimum(i, layer.n_in - size[0]), jnp.minimum(o, layer.n_out - size[1])]
    due = [a + jnp.arange(n) >= b for a, n, b in zip(at, size, (i, o), strict=True)]
    return [*place, *at], due[0][:, None] & due[1][None]


def first_column(layer: Layer, corner: Sequence[Array]) -> Array:
    """The column (kx, ky, i) flattened of a block's corner: int32 ()."""
    kx, ky, i, _ = corner
    return (kx * layer.places[1] + ky) * layer.n_in + i


def over_blocks(starts: list[np.ndarray], blocks: list[Callable], merge: Callable, carry: Any):
    """Folds `merge(carry, blocks[l](corner))` over the corners starts[l] of every layer l.

    One loop for all layers, so that one block exists at a time and the merge is compiled once.
    """
    layer = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
    table = jnp.asarray(np.column_stack([layer, np.concatenate(starts)]), jnp.int32)

    def one(n, carry):
        l, *corner = table[n]
        return merge(carry, lax.switch(l, blocks, corner))

    return lax.fori_loop(0, len(table), one, carry)


def padded(a: Array, size: int, value: float) -> Array:
    """All of `a` and then `value`: (size,)."""
    return jnp.pad(a.ravel(), (0, size - a.size), constant_values=value)


# ------------------------------------------------------------------------------- masked execution
def streamed_choice(net: Network, loss: Loss, P_max: int) -> Callable:
    """RigL's candidates: choose(state, batch) -> the P_max inactive ones of the largest |dL/dw|.

    Positions int32 (P_max,) in the joined vector of all layers, scores (P_max,), -inf where there
    is none, and whether all of dL/dw was finite. Of equals the lower `hashes_at`.
    """

    def choose(state: SparseState, batch: Any) -> tuple[Array, Array, Array]:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        seen = observe(net.layers, value)
        return strongest(net, seen, state.masks, P_max, stream(state, TIE_STREAM))

    return choose


def strongest(
    net: Network, units: Units, masks: Mapping[str, Array], size: int, key: Array
) -> tuple[Array, Array, Array]:
    """The `size` inactive connections of the largest |dL/dw|, as `streamed_choice` has them."""
    layers = net.layers
    # Whole rows of the kernel if they fit: the blocks are then in the order of its positions.
    outputs = [min(layer.n_out, BLOCK) for layer in layers.values()]
    shapes = [
        (min(layer.n_in, BLOCK // n), n) for n, layer in zip(outputs, layers.values(), strict=True)
    ]
    room = max(map(math.prod, shapes))
    start = np.cumsum([0, *(layer.size for layer in layers.values())])

    def scorer(layer: Layer, first: int, shape: tuple[int, int]) -> Callable:
        def block(corner):
            at, due = fit(layer, corner, shape)
            G = gradient_block(layer, *units[layer.path], at, shape)
            mask = masks[layer.path].reshape(*layer.places, *layer.shape[-2:])
            mask = lax.dynamic_slice(mask, at, (1, 1, *shape))
            score = jnp.where(due & ~mask.reshape(shape), jnp.abs(G), -jnp.inf)
            column = first_column(layer, at) + jnp.arange(shape[0], dtype=jnp.int32)
            output = at[-1] + jnp.arange(shape[1], dtype=jnp.int32)
            position = first + column[:, None] * layer.n_out + output[None]
            return padded(position, room, 0), padded(score, room, -jnp.inf), jnp.isfinite(G).all()

        return block

    def merge(carry, new):
        position, score = (jnp.concatenate(pair) for pair in zip(carry[:2], new[:2], strict=True))
        ties = lambda: hashes_at(net, key, position)  # noqa: E731
        chosen = lowest(~bits(jnp.maximum(score, 0)), score >= 0, jnp.int32(size), ties)
        to = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, size)
        best = (
            none.at[to].set(a, mode="drop")
            for none, a in zip(empty, (position, score), strict=True)
        )
        return *best, carry[2] & new[2]

    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(units))
    empty = jnp.zeros(size, jnp.int32), jnp.full(size, -jnp.inf, dtype)
    given = list(zip(layers.values(), map(int, start), shapes, strict=False))
    starts = [corners(layer, shape, layer.n_in) for layer, _, shape in given]
    return over_blocks(starts, [scorer(*each) for each in given], merge, (*empty, jnp.bool_(True)))


# ------------------------------------------------------------------------------- sparse execution
def strongest_missing(
    arena: Arena, units: Units, empty: Found, P: Array, salt: Array
) -> tuple[Found, Array]:
    """The P connections of the largest |dL/dw| among those that do not exist, `empty`'s size.

    Also whether all of dL/dw was finite: bool (). Of equals as `select.best`.
    """
    # As many inputs as a row can have: a block reads the connections of its rows.
    runs = [min(part.block, part.layer.n_in) for part in arena.parts]
    inputs = [min(run, BLOCK) for run in runs]
    shapes = [(n, min(p.n_out, BLOCK // n)) for n, p in zip(inputs, arena.parts, strict=True)]
    room = max(map(math.prod, shapes))
    rows = rows_of(arena.pointer, arena.column.size)

    def scorer(part: Part, shape: tuple[int, int]) -> Callable:
        layer = part.layer

        def block(corner):
            at, due = fit(layer, corner, shape)
            G = gradient_block(layer, *units[layer.path], at, shape)
            # Sorted by (row, column): of each output its inputs from one block of the arena.
            segment = first_column(layer, corner) // part.block
            column = first_column(layer, at) + jnp.arange(shape[0], dtype=jnp.int32)
            row = part.first + segment * layer.n_out + at[-1]
            valid = (due & (column[:, None] // part.block == segment)).T
            score = jnp.where(valid, jnp.abs(G.T), -1).astype(empty.score.dtype)
            score = without_existing(arena, rows, row, column[0], score)
            row = row + jnp.arange(shape[1], dtype=jnp.int32)
            row, column = jnp.broadcast_arrays(row[:, None], column[None])
            new = Found(*map(padded, (row, column, score), (room,) * 3, (NOWHERE, 0, -1)))
            return new, jnp.isfinite(G).all()

        return block

    def merge(carry, new):
        return best(carry[0], new[0], P, salt), carry[1] & new[1]

    given = zip(arena.parts, shapes, runs, strict=True)
    starts = [corners(part.layer, shape, run) for part, shape, run in given]
    blocks = [scorer(*each) for each in zip(arena.parts, shapes, strict=True)]
    return over_blocks(starts, blocks, merge, (empty, jnp.bool_(True)))


def without_existing(arena: Arena, rows: Array, row: Array, column: Array, score: Array) -> Array:
    """The scores of a block that begins at (row, column), -1 where a connection exists.

    Shapes: `rows` int32 (K,) of all connections, score (rows, columns).
    """

    def mark(score, at, r, c):
        # What is left of the block would count from its end.
        inside = at[1] & (c >= column)
        return score.at[jnp.where(inside, r - row, score.shape[0]), c - column].set(-1, mode="drop")

    begin, end = arena.pointer[row], arena.pointer[row + score.shape[0]]
    return over_range((rows, arena.column), begin, end, mark, score)
