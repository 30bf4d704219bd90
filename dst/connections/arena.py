"""The arena: one CSR that holds every connection of every sparse layer.

    values float32 (K,)   column int32 (K,)   pointer int32 (R + 1,)

K, the number of connections, never changes, so connections move between layers without a change
of shape: nothing is padded, nothing compiles twice. Inside a layer a row holds the connections of
one output from one block of inputs, and rows are sorted by (block, output): a block's activations
stay in the L2 cache while all its rows are read. `values` are params["arena"]["kernel"], so an
optimizer that works coordinate by coordinate needs to know nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dst.config import ConfigError
from dst.layers.base import Layer
from dst.network import Network

Array = jax.Array

VALUES = "arena"  # params["arena"]["kernel"]
BLOCK = 512  # inputs: 512 rows of 128 float32 of h and of dL/dh are half a MiB
PER_ROW = 4  # connections a row should have on average, else blocks are larger


class Part(NamedTuple):
    """One layer's place in the arena; static, while its connections come and go."""

    layer: Layer
    block: int  # inputs per block
    first: int  # its first row

    @property
    def n_in(self) -> int:
        """Columns: inputs, of a convolution (kx, ky, n_in) flattened."""
        return self.layer.columns

    @property
    def n_out(self) -> int:
        return self.layer.n_out

    @property
    def blocks(self) -> int:
        return -(-self.n_in // self.block)

    @property
    def rows(self) -> int:
        return self.blocks * self.n_out

    @property
    def end(self) -> int:
        """The row after its last."""
        return self.first + self.rows

    def row(self, column: Any, output: Any) -> Any:
        """The row, within the layer, of a connection."""
        return column // self.block * self.n_out + output


class Arena(struct.PyTreeNode):
    """Which connections exist: the structure of the CSR, sorted by (row, column)."""

    column: Array  # int32 (K,), the input within the layer
    pointer: Array  # int32 (R + 1,), where each row begins
    parts: tuple[Part, ...] = struct.field(pytree_node=False)

    def pointer_of(self, part: Part) -> Array:
        """int32 (rows + 1,), where the layer's rows begin and end in the whole arena."""
        return self.pointer[part.first : part.end + 1]

    def counts(self) -> Array:
        """Connections of each layer: int32 (L,)."""
        bounds = np.array([(part.first, part.end) for part in self.parts])
        return self.pointer[bounds[:, 1]] - self.pointer[bounds[:, 0]]

    def dead_units(self, part: Part) -> Array:
        """Output units without an incoming connection: int32 scalar."""
        fan_in = jnp.diff(self.pointer_of(part)).reshape(part.blocks, part.n_out).sum(0)
        return jnp.sum(fan_in == 0, dtype=jnp.int32)


Connections = dict[str, Array] | Arena  # of masked execution: masks by layer path; or of sparse


def lay_out(net: Network, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Each layer's block size and first row, given how many connections it starts with.

    Errors: more connections or rows than int32 can count.
    """
    parts: list[Part] = []
    first = 0
    for path, layer in net.layers.items():
        n_in = layer.columns
        block = min(BLOCK, n_in) if layer.matrix else n_in
        while block < n_in and block * counts[path] < PER_ROW * layer.size:
            block = min(2 * block, n_in)
        parts.append(Part(layer, block, first))
        first = parts[-1].end
    for what, number in (("connections", sum(counts.values())), ("output rows", first)):
        if number >= 2**31:
            raise ConfigError(
                f"the sparse network would have {number} {what}; allowed are 2^31 - 1 (a higher "
                "sparsity or fewer units)."
            )
    return tuple(parts)


def fill(parts: tuple[Part, ...], layers: Any) -> tuple[Arena, np.ndarray]:
    """The arena of each layer's flat kernel positions int64 (M,) and values (M,), and its values.

    `layers` yields (positions, values) in the order of `parts`; needs O(K) host memory.
    """
    columns, values, lengths = [], [], []
    for part, (positions, weights) in zip(parts, layers, strict=True):
        row, column = place(part, positions)
        order = np.lexsort((column, row))
        columns.append(column[order].astype(np.int32))
        values.append(weights[order])
        lengths.append(np.bincount(row, minlength=part.rows))
    pointer = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int32)
    arena = Arena(jnp.asarray(np.concatenate(columns)), jnp.asarray(pointer), parts)
    return arena, np.concatenate(values)


def place(part: Part, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row within the layer and column of flat kernel positions: int64 (M,) -> (M,), (M,)."""
    column, output = np.divmod(positions, part.n_out)
    return part.row(column, output), column


def positions(arena: Arena, part: Part) -> tuple[slice, np.ndarray]:
    """Where the layer's connections are in the arena, and their flat kernel positions int64 (M,).

    On the host, in the arena's order.
    """
    pointer = np.asarray(arena.pointer_of(part)).astype(np.int64)
    here = slice(int(pointer[0]), int(pointer[-1]))
    output = np.repeat(np.arange(part.rows) % part.n_out, np.diff(pointer))
    return here, np.asarray(arena.column[here]).astype(np.int64) * part.n_out + output


def rows_of(pointer: Array, connections: int) -> Array:
    """The row of every connection: int32 (R + 1,) -> int32 (K,)."""
    begun = jnp.zeros(connections + 1, jnp.int32).at[pointer[1:-1]].add(1)
    return jnp.cumsum(begun[:-1])
