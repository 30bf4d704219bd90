"""The arena: one CSR that holds every connection of every sparse layer.

    values float32 (K,)   column int32 (K,)   pointer int32 (R + 1,)

K, the number of connections, never changes, so connections move between layers without a change
of shape: nothing is padded, nothing compiles twice. Inside a layer a row holds the connections of
one output from one block of inputs, and rows are sorted by (block, output): a block's activations
stay in the L2 cache while all its rows are read. `values` are params["arena"]["kernel"], so an
optimizer that works coordinate by coordinate needs to know nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dst.connections import select
from dst.connections.backends import cpp
from dst.connections.backends.dispatch import compiled
from dst.connections.base import Candidates, Execution, Part, Rule, no_candidates, row_of, table
from dst.connections.moments import refuse_unless_coordinate_wise
from dst.connections.ranges import over_range, rows_of
from dst.errors import ConfigError
from dst.layers.base import Layer
from dst.network import Network

Array = jax.Array

VALUES = "arena"  # params["arena"]["kernel"]
BLOCK = 512  # inputs: 512 rows of 128 float32 of h and of dL/dh are half a MiB
PER_ROW = 4  # connections a row should have on average, else blocks are larger


class Arena(struct.PyTreeNode):
    """Which connections exist: the structure of the CSR, sorted by (row, column).

    Its entries are the K connections, in this order.
    """

    column: Array  # int32 (K,), the input within the layer
    pointer: Array  # int32 (R + 1,), where each row begins
    parts: tuple[Part, ...] = struct.field(pytree_node=False)

    every_possible: ClassVar[bool] = False
    reads_maps: ClassVar[bool] = True

    def pointer_of(self, part: Part) -> Array:
        """int32 (rows + 1,), where the layer's rows begin and end in the whole arena."""
        return self.pointer[part.first : part.end + 1]

    @property
    def rows(self) -> Array:
        """The row of every connection: int32 (K,)."""
        return rows_of(self.pointer, self.column.size)

    @property
    def exists(self) -> Array:
        """All entries do: bool (K,)."""
        return jnp.ones(self.column.size, bool)

    @property
    def total(self) -> Array:
        """K, which never changes: int32 ()."""
        return jnp.int32(self.column.size)

    @property
    def inactive(self) -> Array:
        """Possible connections that do not exist, as many as int32 can count: int32 ()."""
        possible = sum(part.layer.size for part in self.parts)
        return jnp.int32(min(possible - self.column.size, 2**31 - 1))

    def counts(self) -> Array:
        """Connections of each layer: int32 (L,)."""
        bounds = np.array([(part.first, part.end) for part in self.parts])
        return self.pointer[bounds[:, 1]] - self.pointer[bounds[:, 0]]

    def sparsity(self) -> float:
        """Share of inactive connections, from exact counts on the host."""
        return 1.0 - self.column.size / sum(part.layer.size for part in self.parts)

    def dead_units(self) -> dict[str, Array]:
        """Output units of each layer without an incoming connection: int32 scalars."""
        dead = {}
        for part in self.parts:
            lengths = jnp.diff(self.pointer_of(part)).reshape(part.blocks, part.n_out)
            dead[part.layer.path] = jnp.sum(lengths.sum(0) == 0, dtype=jnp.int32)
        return dead

    # ------------------------------------------------------------------------------- the entries
    def weights(self, params: Any) -> Array:
        """The vector of values: float (K,)."""
        return params[VALUES]["kernel"]

    def hashes(self, salt: Array) -> Array:
        """The entries' numbers for ties: uint32 (K,)."""
        return self.ties(salt)()

    def ties(self, salt: Array) -> Callable[[], Array]:
        return select.Ties(self, salt)

    def by_layer(self, rule: Rule, entries: Array, salt: Array) -> Array:
        """A rule applied to each layer's entries: (K,) -> bool (K,)."""
        index = jnp.arange(entries.size, dtype=jnp.int32)
        chosen = jnp.zeros(entries.size, bool)
        for l, part in enumerate(self.parts):
            own = (index >= self.pointer[part.first]) & (index < self.pointer[part.end])
            chosen |= rule(l, own, entries, self.ties(salt))
        return chosen

    def count_by_layer(self, chosen: Array) -> Array:
        """How many of each layer's entries are chosen: bool (K,) -> int32 (L,)."""
        before = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(chosen, dtype=jnp.int32))
        bounds = np.array([(part.first, part.end) for part in self.parts])
        begin, end = (before[self.pointer[bounds[:, n]]] for n in (0, 1))
        return end - begin

    def find(self, l: Array, column: Array, output: Array, like: Part | None = None) -> Array:
        """Whether layer l has a connection (column, output): int32 (m,) -> bool (m,)."""
        if like is None:
            row = row_of(self.parts, l, column, output)
        else:
            row = like.row(column, output) + table(self.parts, "first")[l]
        return select.exists(self, row, column)

    def without_existing(self, part: Part, row: Array, column: Array, score: Array) -> Array:
        """The scores of a block that begins at (row, column), -1 where a connection exists.

        Shapes: score (rows, columns), within the layer of `part`.
        """

        def mark(score, at, r, c):
            # What is left of the block would count from its end.
            inside = at[1] & (c >= column)
            at_row = jnp.where(inside, r - row, score.shape[0])
            return score.at[at_row, c - column].set(-1, mode="drop")

        begin, end = self.pointer[row], self.pointer[row + score.shape[0]]
        return over_range((self.rows, self.column), begin, end, mark, score)

    # ---------------------------------------------------------------------------------- exchange
    def exchange(
        self, dropped: Array, grown: Candidates, k: Array, salt: Array
    ) -> tuple[Arena, Source]:
        """Without the k `dropped` (bool (K,)) and with the k candidates that are not empty."""
        empty = no_candidates(grown.row.size, grown.score.dtype)
        arena, source = select.exchange(self, dropped, select.best(empty, grown, k, salt), k)
        return arena, Source(source)

    def moved(self, after: Arena) -> Source:
        """Where the connections of `after` stood here."""
        at, existed = select.locate(self, after.rows, after.column)
        return Source(jnp.where(existed, at, -1))

    # --------------------------------------------------------------------------- values and moments
    def put(self, params: Any, values: Mapping[str, Any]) -> Any:
        """`params` with these values, as `kernels` gives them."""
        return {**params, VALUES: {"kernel": values[VALUES]}}

    def kernels(self, params: Any) -> dict[str, Array]:
        """The vector of values, in `params` or in a tree like it, by its owner's name."""
        return {VALUES: params[VALUES]["kernel"]}

    def refuse_values(self, params: Any) -> None:
        """Raises ConfigError: `params` without a value for each connection, as Flax's kernels."""
        shape = getattr(params.get(VALUES, {}).get("kernel"), "shape", "missing")
        if shape != self.column.shape:
            raise ConfigError(
                f"state.params[{VALUES!r}]['kernel'] is {shape}, but must be {self.column.shape}: "
                "in execution 'sparse' it holds the value of every connection, in the place of the "
                "layers' kernels."
            )

    def on_host(self, params: Any) -> Iterator[tuple[Layer, np.ndarray, np.ndarray]]:
        """Of each layer the flat positions int64 (M,), rising, and values (M,)."""
        values = np.asarray(self.weights(params))
        for part in self.parts:
            here, position = positions(self, part)
            order = np.argsort(position)
            yield part.layer, position[order], values[here][order]

    def only_existing(self, params: Any) -> Any:
        """`params`: nothing else is there."""
        return params

    def reset_missing(self, opt_state: Any, fresh: Any, owners: Sequence[str | None]) -> Any:
        """`opt_state`: nothing else is there."""
        return opt_state


class Source(NamedTuple):
    """Where each connection stood before, int32 (K,), -1 if it is new: the `Moves` of an arena."""

    source: Array

    def carry(self, leaf: Array, owner: str, start: Array) -> Array:
        """The leaf (K,), each entry where its connection is now, `start` for new ones."""
        source, in_place = self.source, compiled(leaf)
        stays = cpp.move(leaf, source) if in_place else leaf[jnp.maximum(source, 0)]
        return jnp.where(source < 0, start, stays)


def lay_out(net: Network, counts: Mapping[str, int]) -> tuple[Part, ...]:
    """Each layer's block size and first row, given how many connections it starts with.

    Raises: more connections or rows than int32 can count.
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


def connect(
    net: Network, counts: Mapping[str, int], layers: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[Arena, dict[str, Array]]:
    """Arena and values from each layer's flat positions int64 (M,) and values float32 (M,)."""
    arena, values = fill(lay_out(net, counts), layers)
    return arena, {VALUES: jnp.asarray(values)}


def refuse(net: Network, tx: optax.GradientTransformation, params: Any) -> None:
    """Raises ConfigError: parameters where the arena's are, an optimizer that looks at shapes."""
    if VALUES in params:
        raise ConfigError(
            f"the model has parameters named {VALUES!r}, which is where dst keeps its own."
        )
    refuse_unless_coordinate_wise(tx, params, net.layers)


SPARSE = Execution(connect, refuse, Arena, fuses=True)
