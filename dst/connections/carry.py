"""What a user keeps beside the state, such as an average of the parameters, along a rewire."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dst.arguments import check_is
from dst.connections.base import Connections
from dst.connections.masks import reset
from dst.connections.moments import recognise
from dst.errors import ConfigError
from dst.state import SparseState

Array = jax.Array


def carry(tree: Any, before: SparseState, after: SparseState) -> Any:
    """`tree` after the rewire from the state `before` it to that `after` it.

    `tree` is any pytree that holds arrays at the paths of `state.params`, such as an average of it
    or the state of `optax.ema`. What belongs to a connection stays with it, that of a dropped one
    is forgotten and that of a grown one is 0, so at most K entries are not; all else is as it was.
    In sparse execution, where a rewire moves connections within the vector of values, nothing else
    keeps them together. O(K) memory. `before` must still be there: make_rewire(..., donate=False).
    Raises: states of two networks, a tree that holds nothing of a connection, or other shapes.
    """
    for name, state in (("before", before), ("after", after)):
        check_is(name, state, SparseState, "dst.init_state, update and rewire")
    if _description(before.masks) != _description(after.masks):
        raise ConfigError("before and after must be the states of one network, around a rewire.")
    try:
        owners = recognise(tree, before.params, before.masks.kernels(before.params))
    except ConfigError:
        owners = []
    if not any(owners):
        raise ConfigError("tree must hold arrays at the paths of state.params and in their shapes.")
    leaves, structure = jax.tree.flatten(tree)
    leaves = _carried(leaves, before.masks, after.masks, tuple(owners))
    return jax.tree.unflatten(structure, leaves)


def _description(connections: Connections) -> Any:
    """What all states of a network share."""
    return connections.parts, [leaf.shape for leaf in jax.tree.leaves(connections)]


@functools.partial(jax.jit, static_argnums=3)
def _carried(
    leaves: list[Array], before: Connections, after: Connections, owners: tuple[str | None, ...]
) -> list[Array]:
    zeros = [jnp.zeros((), leaf.dtype) for leaf in leaves]
    return reset(before.moved(after), leaves, zeros, owners)
