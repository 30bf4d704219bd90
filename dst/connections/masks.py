"""Masks over dense arrays: the connections of masked execution, as in the paper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dst.connections.base import Candidates, Execution, Part, Rule
from dst.connections.hashing import hashed
from dst.errors import ConfigError
from dst.layers.base import Layer
from dst.network import Network

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
class Masks(Mapping[str, Array]):
    """Which connections exist: {layer path: bool, the kernel's shape}; the values are in `params`.

    Immutable, a pytree. Its entries are all possible connections, N of them, layer after layer.
    """

    every_possible: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False

    def __init__(self, layers: Iterable[Layer], by_path: Mapping[str, Any]):
        self.layers = tuple(layers)
        self._by_path = {layer.path: by_path[layer.path] for layer in self.layers}

    def __getitem__(self, path: str) -> Array:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def __repr__(self) -> str:
        return f"Masks({self._by_path!r})"

    def tree_flatten_with_keys(self) -> tuple[Iterable, tuple[Layer, ...]]:
        """As a dict has them, so that a mask is called by its layer's path."""
        return [(jax.tree_util.DictKey(path), mask) for path, mask in self.items()], self.layers

    @classmethod
    def tree_unflatten(cls, layers: tuple[Layer, ...], masks: Iterable[Any]) -> Masks:
        """The inverse; leaves may be anything."""
        return cls(layers, dict(zip((layer.path for layer in layers), masks, strict=True)))

    def but(self, by_path: Mapping[str, Any]) -> Masks:
        """These masks with others of some layers.

        Raises ConfigError: a layer that is not here, a mask of another shape or that is not bool.
        """
        if unknown := by_path.keys() - self.keys():
            raise ConfigError(
                f"masks has no layer {min(unknown)!r}; it has {', '.join(map(repr, self))}."
            )
        for path, mask in by_path.items():
            if mask.shape != self[path].shape or mask.dtype != bool:
                raise ConfigError(
                    f"the mask of layer {path!r} must be bool of shape {self[path].shape}, not "
                    f"{mask.dtype} of shape {mask.shape}."
                )
        return Masks(self.layers, {**self, **by_path})

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The layers' rows, each layer one block."""
        return parts_of(self.layers)

    @property
    def exists(self) -> Array:
        """All masks in one vector: bool (N,)."""
        return join(self)

    @property
    def total(self) -> Array:
        """Connections of the network: int32 ()."""
        return self.exists.sum(dtype=jnp.int32)

    @property
    def inactive(self) -> Array:
        """Possible connections that do not exist: int32 ()."""
        return sum(layer.size for layer in self.layers) - self.total

    def counts(self) -> Array:
        """Connections of each layer: int32 (L,)."""
        return jnp.stack([mask.sum(dtype=jnp.int32) for mask in self.values()])

    def sparsity(self) -> float:
        """Share of inactive connections, from exact counts on the host."""
        active = sum(int(np.count_nonzero(mask)) for mask in self.values())
        return 1.0 - active / sum(mask.size for mask in self.values())

    def dead_units(self) -> dict[str, Array]:
        """Output units of each layer without an incoming connection: int32 scalars."""
        by_output = {l.path: self[l.path].reshape(-1, l.n_out) for l in self.layers}
        return {path: jnp.sum(~mask.any(0), dtype=jnp.int32) for path, mask in by_output.items()}

    # ------------------------------------------------------------------------------- the entries
    def weights(self, params: Any) -> Array:
        """All kernels in one vector: float (N,)."""
        return join(self.kernels(params))

    def split_by_layer(self, entries: Array) -> dict[str, Array]:
        """The inverse of `join`: (N,) -> {layer path: the kernel's shape}."""
        ends = np.cumsum([layer.size for layer in self.layers])[:-1]
        parts = zip(self.layers, jnp.split(entries, ends), strict=True)
        return {layer.path: part.reshape(layer.shape) for layer, part in parts}

    def hashes(self, salt: Array) -> Array:
        """The entries' numbers for ties: uint32 (N,)."""
        return jnp.concatenate([self._hashes(part, salt) for part in self.parts])

    def ties(self, salt: Array) -> Callable[[], Array]:
        return functools.partial(self.hashes, salt)

    def _hashes(self, part: Part, salt: Array) -> Array:
        column = jnp.arange(part.n_in, dtype=jnp.uint32)
        return hashed(salt[None, part.first : part.end], column[:, None]).ravel()

    def every(self, score: Array) -> Candidates:
        """All that is inactive with its score: (N,) -> candidates in the order of the entries."""
        rows: list[Array] = []
        columns: list[Array] = []
        for part in self.parts:
            row = part.first + jnp.arange(part.n_out, dtype=jnp.int32)
            column = jnp.arange(part.n_in, dtype=jnp.int32)
            grid = jnp.broadcast_arrays(row[None], column[:, None])
            rows, columns = [*rows, grid[0].ravel()], [*columns, grid[1].ravel()]
        score = jnp.where(self.exists, -1, score)
        return Candidates(jnp.concatenate(rows), jnp.concatenate(columns), score)

    def by_layer(self, rule: Rule, entries: Array, salt: Array) -> Array:
        """A rule applied to each layer's entries: (N,) -> bool (N,)."""
        of = self.split_by_layer(entries)
        chosen = [
            rule(
                l,
                self[part.layer.path].ravel(),
                of[part.layer.path].ravel(),
                functools.partial(self._hashes, part, salt),
            )
            for l, part in enumerate(self.parts)
        ]
        return jnp.concatenate(chosen)

    def count_by_layer(self, chosen: Array) -> Array:
        """How many of each layer's entries are chosen: bool (N,) -> int32 (L,)."""
        of = self.split_by_layer(chosen)
        return jnp.stack([part.sum(dtype=jnp.int32) for part in of.values()])

    def find(self, l: Array, column: Array, output: Array, like: Part | None = None) -> Array:
        """Whether layer l has a connection (column, output): int32 (m,) -> bool (m,)."""
        n_out = jnp.asarray(self._outputs)[l] if like is None else like.n_out
        return self.exists[jnp.asarray(self._starts)[l] + column * n_out + output]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The first entry of each layer: int32 (L,)."""
        return np.cumsum([0, *(layer.size for layer in self.layers[:-1])]).astype(np.int32)

    @functools.cached_property
    def _outputs(self) -> np.ndarray:
        return np.array([layer.n_out for layer in self.layers], np.int32)

    def entry(self, row: Array, column: Array) -> Array:
        """Which entry (row, column) is: int32 (m,)."""
        pairs = list(zip(self._starts, self._outputs, strict=True))
        first = np.concatenate([start + np.arange(n_out) for start, n_out in pairs])
        step = np.concatenate([np.full(n_out, n_out) for _, n_out in pairs])
        return jnp.asarray(first, jnp.int32)[row] + column * jnp.asarray(step, jnp.int32)[row]

    def without_existing(self, part: Part, row: Array, column: Array, score: Array) -> Array:
        """The scores of a block that begins at (row, column), -1 where a connection exists.

        Shapes: score (rows, columns), within the layer of `part`.
        """
        mask = self[part.layer.path].reshape(part.n_in, part.n_out)
        block = jax.lax.dynamic_slice(mask, (column, row - part.first), score.shape[::-1])
        return jnp.where(block.T, -1, score)

    # ---------------------------------------------------------------------------------- exchange
    def exchange(
        self, dropped: Array, grown: Candidates, k: Array, salt: Array
    ) -> tuple[Masks, Kept]:
        """Without `dropped` (bool (N,)) and with the candidates in `grown` that are not empty."""
        survivors = self.exists & ~dropped
        at = jnp.where(grown.valid, self.entry(grown.row, grown.column), survivors.size)
        new = survivors.at[at].set(True, mode="drop")
        return self.but(self.split_by_layer(new)), Kept(self.split_by_layer(survivors))

    def moved(self, after: Masks) -> Kept:
        """What stayed between these and the masks `after`."""
        return Kept({path: mask & after[path] for path, mask in self.items()})

    # --------------------------------------------------------------------------- values and moments
    def put(self, params: Any, kernels: Mapping[str, Any]) -> Any:
        """`params` with these kernels."""
        return with_kernels(params, kernels)

    def kernels(self, params: Any) -> dict[str, Array]:
        """{layer path: kernel} of `params`, or of a tree like it."""
        return kernels_of(params, self)

    def refuse_values(self, params: Any) -> None:
        """Whatever is not on the masks is left out."""

    def on_host(self, params: Any) -> Iterator[tuple[Layer, np.ndarray, np.ndarray]]:
        """Of each layer the flat positions int64 (M,), rising, and values (M,)."""
        for layer, kernel in zip(self.layers, self.kernels(params).values(), strict=True):
            position = np.flatnonzero(np.asarray(self[layer.path]))
            yield layer, position, np.asarray(kernel).reshape(-1)[position]

    def only_existing(self, params: Any) -> Any:
        """`params` with exact zeros off the masks; a NaN stays one, so that it is noticed."""
        kernels = {p: jnp.where(self[p], k, 0) for p, k in self.kernels(params).items()}
        return with_kernels(params, kernels)

    def reset_missing(self, opt_state: Any, fresh: Any, owners: Sequence[str | None]) -> Any:
        """`opt_state` with `fresh` (the value of `tx.init`) off the masks."""
        return reset(Kept(self), opt_state, fresh, owners)


class Kept(NamedTuple):
    """What stays where it is: the `Moves` of masks."""

    masks: Mapping[str, Array]

    def carry(self, leaf: Array, owner: str, start: Array) -> Array:
        """The leaf with `start` for what did not stay."""
        return jnp.where(self.masks[owner], leaf, start)


def parts_of(layers: Iterable[Layer]) -> tuple[Part, ...]:
    """The layers' rows one after the other, each layer one block."""
    parts: list[Part] = []
    for layer in layers:
        first = parts[-1].end if parts else 0
        parts.append(Part(layer, layer.columns, first))
    return tuple(parts)


def reset(moves: Any, opt_state: Any, fresh: Any, owners: Sequence[str | None]) -> Any:
    """`opt_state` with what follows connections carried along, `fresh` where they are new."""
    leaves, treedef = jax.tree.flatten(opt_state)
    starts = jax.tree.leaves(fresh)
    carried = [
        leaf if owner is None else moves.carry(leaf, owner, start)
        for leaf, start, owner in zip(leaves, starts, owners, strict=True)
    ]
    return jax.tree.unflatten(treedef, carried)


def kernels_of(params: Any, masks: Mapping[str, Any]) -> dict[str, Array]:
    """{layer path: kernel} of the sparse layers, in the order of `masks`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: flat[f"{path}/kernel"] for path in masks}


def with_kernels(params: Any, kernels: Mapping[str, Array]) -> Any:
    """`params` with these kernels in the place of their own."""
    flat = traverse_util.flatten_dict(params, sep="/")
    flat |= {f"{path}/kernel": kernel for path, kernel in kernels.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def join(by_layer: Mapping[str, Array]) -> Array:
    """All layers' entries in one vector, in layer order."""
    return jnp.concatenate([leaf.ravel() for leaf in by_layer.values()])


def connect(
    net: Network, counts: Mapping[str, int], layers: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[Masks, dict[str, Array]]:
    """Masks and kernels from each layer's flat positions int64 (M,) and values float32 (M,)."""
    masks, kernels = {}, {}
    for layer, (position, weights) in zip(net.layers.values(), layers, strict=True):
        mask, kernel = np.zeros(layer.size, bool), np.zeros(layer.size, np.float32)
        mask[position], kernel[position] = True, weights
        masks[layer.path] = jnp.asarray(mask.reshape(layer.shape))
        kernels[layer.path] = jnp.asarray(kernel.reshape(layer.shape))
    return Masks(net.layers.values(), masks), kernels


def refuse(net: Network, tx: Any, params: Any) -> None:
    """Raises ConfigError: more possible connections than int32 can count."""
    if net.possible >= 2**31:
        raise ConfigError(
            f"the model has {net.possible} possible connections; masked execution allows 2^31 - 1, "
            "execution='sparse' any number."
        )


MASKED = Execution(connect, refuse, Masks, fuses=False)
