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

from dst.connections.base import NOWHERE, Candidates, Connections, Part
from dst.layers.base import Layer
from dst.loss import Loss, run_loss
from dst.methods.base import Method
from dst.methods.candidates import Sample, Source, quota
from dst.methods.plan import Plan
from dst.methods.quota import Quota
from dst.network import Network
from dst.observe import observe
from dst.state import SparseState
from dst.update import average

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
    """Folds `merge(carry, blocks[l](corner), l)` over the corners starts[l] of every layer l.

    One loop for all layers, so that one block exists at a time and the merge is compiled once.
    """
    layer = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
    table = jnp.asarray(np.column_stack([layer, np.concatenate(starts)]), jnp.int32)

    def one(n, carry):
        l, *corner = table[n]
        return merge(carry, lax.switch(l, blocks, corner), l)

    return lax.fori_loop(0, len(table), one, carry)


def padded(a: Array, size: int, value: float) -> Array:
    """All of `a` and then `value`: (size,)."""
    return jnp.pad(a.ravel(), (0, size - a.size), constant_values=value)


# ---------------------------------------------------------------------------------- the choice
def streamed(net: Network, method: Method, planned: Plan, loss: Loss) -> Source:
    """RigL's choice, of all inactive: h and delta of every layer are held, the gradient is not."""

    def sample(state: SparseState, batch: Any, fg: Any, event: Array, salt: Array) -> Sample:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        A, units = state.masks, observe(net.layers, value)
        held = quota(net, method, planned, event, salt)
        found, finite = strongest_missing(A, units, held, A.weights(state.params).dtype)
        return Sample(found, A.inactive, A.inactive, finite)

    return sample


def strongest_missing(
    A: Connections, units: Units, held: Quota, dtype: Any = jnp.float32
) -> tuple[Candidates, Array]:
    """The connections of the largest |dL/dw| among those that do not exist, as many as are held.

    Also whether all of dL/dw was finite: bool (). Of equals as `select.best`.
    """
    # As many inputs as a row can have: a block reads the connections of its rows.
    runs = [min(part.block, part.layer.n_in) for part in A.parts]
    inputs = [min(run, BLOCK) for run in runs]
    shapes = [(n, min(p.n_out, BLOCK // n)) for n, p in zip(inputs, A.parts, strict=True)]
    largest = max(map(math.prod, shapes))

    def scorer(part: Part, shape: tuple[int, int]) -> Callable:
        layer = part.layer

        def block(corner):
            at, due = fit(layer, corner, shape)
            G = gradient_block(layer, *units[layer.path], at, shape)
            # Sorted by (row, column): of each output its inputs from one block.
            segment = first_column(layer, corner) // part.block
            column = first_column(layer, at) + jnp.arange(shape[0], dtype=jnp.int32)
            row = part.first + segment * layer.n_out + at[-1]
            valid = (due & (column[:, None] // part.block == segment)).T
            score = jnp.where(valid, jnp.abs(G.T), -1).astype(dtype)
            score = A.without_existing(part, row, column[0], score)
            row = row + jnp.arange(shape[1], dtype=jnp.int32)
            row, column = jnp.broadcast_arrays(row[:, None], column[None])
            new = Candidates(*map(padded, (row, column, score), (largest,) * 3, (NOWHERE, 0, -1)))
            return new, jnp.isfinite(G).all()

        return block

    def merge(carry, new, l):
        return held.best(carry[0], new[0], l), carry[1] & new[1]

    given = zip(A.parts, shapes, runs, strict=True)
    starts = [corners(part.layer, shape, run) for part, shape, run in given]
    blocks = [scorer(*each) for each in zip(A.parts, shapes, strict=True)]
    return over_blocks(starts, blocks, merge, (held.empty(dtype), jnp.bool_(True)))
