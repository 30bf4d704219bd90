"""What both kinds of connections are: `Masks` and `Arena` answer the same questions.

A connection is (row, column): the column is the input within its layer, of a convolution (kx, ky,
i) flattened; a row is one output of one layer, and where a layer is cut into blocks of inputs, one
output and one block. All of them, in the order of rows and columns, are the entries: of masks every
possible connection, whether it exists or not; of an arena those that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst.connections.hashing import salts
from dst.layers.base import Layer
from dst.network import Network

Array = jax.Array

NOWHERE = 2**31 - 1  # the row of an empty candidate


class Part(NamedTuple):
    """One layer's place among the rows; static, while its connections come and go."""

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


class Candidates(NamedTuple):
    """Connections that may grow, by (row, column); those with a score below 0 are empty."""

    row: Array  # int32 (n,), among those of all layers
    column: Array  # int32 (n,)
    score: Array  # float (n,), >= 0

    @property
    def valid(self) -> Array:
        """Which are not empty: bool (n,)."""
        return self.score >= 0


def no_candidates(size: int, dtype: Any = jnp.float32) -> Candidates:
    """None yet, room for `size`."""
    return Candidates(
        jnp.full(size, NOWHERE, jnp.int32), jnp.zeros(size, jnp.int32), jnp.full(size, -1, dtype)
    )


class Moves(Protocol):
    """What a rewire, or two states around it, did to the connections."""

    def carry(self, leaf: Array, owner: str, start: Array) -> Array:
        """A leaf that follows `owner`'s connections, with `start` for those that did not stay."""
        ...


# (l, what exists, entries, ties) of layer l -> bool, as many as there are entries
Rule = Callable[[int, Array, Array, Callable[[], Array]], Array]


class Connections(Protocol):
    """Which connections exist: a pytree, `Masks` or `Arena`."""

    # Whether there is memory for every possible connection.
    every_possible: ClassVar[bool]
    # Whether maps lie in memory as the C++ kernels read them.
    reads_maps: ClassVar[bool]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Where each layer's rows are."""
        ...

    @property
    def exists(self) -> Array:
        """Which entries exist: bool (n,)."""
        ...

    @property
    def total(self) -> Array:
        """Connections of the network: int32 ()."""
        ...

    @property
    def inactive(self) -> Array:
        """Possible connections that do not exist: int32 ()."""
        ...

    def counts(self) -> Array:
        """Connections of each layer: int32 (L,)."""
        ...

    def sparsity(self) -> float:
        """Share of inactive connections, from exact counts on the host."""
        ...

    def dead_units(self) -> dict[str, Array]:
        """Output units of each layer without an incoming connection: int32 scalars."""
        ...

    def weights(self, params: Any) -> Array:
        """The entries' weights: float (n,)."""
        ...

    def hashes(self, salt: Array) -> Array:
        """The entries' numbers for ties, `salt` from `row_salts`: uint32 (n,)."""
        ...

    def ties(self, salt: Array) -> Callable[[], Array]:
        """`hashes`, when they are asked for."""
        ...

    def by_layer(self, rule: Rule, entries: Array, salt: Array) -> Array:
        """A rule applied to each layer's entries: (n,) -> bool (n,); ties() are their `hashes`."""
        ...

    def count_by_layer(self, chosen: Array) -> Array:
        """How many of each layer's entries are chosen: bool (n,) -> int32 (L,)."""
        ...

    def find(self, l: Array, column: Array, output: Array, like: Part | None = None) -> Array:
        """Whether layer l has a connection (column, output): int32 (m,) -> bool (m,).

        `like` is a part of l's shape, where it is known: what is static divides faster.
        """
        ...

    def without_existing(self, part: Part, row: Array, column: Array, score: Array) -> Array:
        """The scores of a block that begins at (row, column), -1 where a connection exists.

        Shapes: score (rows, columns), within the layer of `part`.
        """
        ...

    def exchange(
        self, dropped: Array, grown: Candidates, k: Array, salt: Array
    ) -> tuple[Connections, Moves]:
        """Without `dropped` (bool (n,)) and with the k candidates in `grown` that are not empty."""
        ...

    def moved(self, after: Any) -> Moves:
        """What happened between these connections and those `after` a rewire."""
        ...

    def put(self, params: Any, values: Mapping[str, Any]) -> Any:
        """`params` with these values of the connections, as `kernels` gives them."""
        ...

    def refuse_values(self, params: Any) -> None:
        """Raises ConfigError: `params` without a value for each connection."""
        ...

    def on_host(self, params: Any) -> Iterator[tuple[Layer, np.ndarray, np.ndarray]]:
        """Of each layer the flat positions int64 (M,), rising, and values (M,)."""
        ...

    def kernels(self, params: Any) -> dict[str, Array]:
        """What `params`, or a tree like it, holds of the connections, by their owner's name."""
        ...

    def only_existing(self, params: Any) -> Any:
        """`params` with exact zeros where nothing exists; a NaN stays one, to be noticed."""
        ...

    def reset_missing(self, opt_state: Any, fresh: Any, owners: Sequence[str | None]) -> Any:
        """`opt_state` with `fresh` (the value of `tx.init`) where nothing exists."""
        ...


def row_salts(parts: Sequence[Part], key: Array) -> Array:
    """The salt of each row's output: uint32 (R,)."""
    each = (jnp.tile(salts(key, l, part.n_out), part.blocks) for l, part in enumerate(parts))
    return jnp.concatenate([*each])


def table(parts: Sequence[Part], field: str) -> Array:
    """A number of each part, such as its first row: int32 (L,)."""
    return jnp.array([getattr(part, field) for part in parts], jnp.int32)


def row_of(parts: Sequence[Part], l: Array, column: Array, output: Array) -> Array:
    """The row, among all, of connections of layer l, which may be traced: int32 (m,)."""
    first, block, n_out = (table(parts, field)[l] for field in ("first", "block", "n_out"))
    return first + column // block * n_out + output


def bits(magnitude: Array) -> Array:
    """Unsigned integers in the order of floats >= 0; takes no time."""
    return lax.bitcast_convert_type(magnitude, f"uint{magnitude.dtype.itemsize * 8}")


def signed_bits(a: Array) -> Array:
    """Unsigned integers in the order of floats of either sign."""
    unsigned = bits(a)
    sign = jnp.ones((), unsigned.dtype) << (a.dtype.itemsize * 8 - 1)
    return jnp.where(unsigned < sign, unsigned | sign, ~unsigned)


class Execution(NamedTuple):
    """A kind of connections, as `dst.network(execution=...)` names it."""

    # (net, connections of each layer, (flat positions, values) of each) -> connections and values
    connect: Callable[..., tuple[Connections, dict[str, Array]]]
    # (net, tx, params without the connections) -> None; raises ConfigError for what cannot run
    refuse: Callable[[Network, optax.GradientTransformation, Any], None]
    kind: type[Connections]
    fuses: bool  # whether `fuse` is read
