"""What a method remembers between steps, beside masks and weights: `SparseState.method`.

A dict of what the method needs, empty for most: SNFS's momentum of every possible connection and
its decay, DSR's threshold, DeepR's signs, ITOP's connections that ever existed; and the mark of a
state that has all connections, but may not train with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dst.connections.hashing import hashes_of_layer
from dst.errors import ConfigError
from dst.methods.table import Method

Array = jax.Array
Own = Mapping[str, Any]

THRESHOLD, TOLERANCE = 1e-3, 0.1  # H at the start and delta of DSR (Mostafa and Wang, 2019)


class Waiting(struct.PyTreeNode):
    """The mark of a state to be pruned before it trains: structure only, no array."""

    method: str = struct.field(pytree_node=False)


def first_memory(method: Method, masks: Any, kernels: Mapping[str, Array], key: Array) -> dict:
    """What the method knows before the first step."""
    own: dict[str, Any] = {}
    if method.score == "momentum":
        own["momentum"] = jax.tree.map(jnp.zeros_like, dict(kernels))
        own["decay"] = jnp.float32(method.momentum)
    if method.drop == "threshold":
        own["threshold"] = jnp.float32(THRESHOLD)
    if method.drop == "sign":
        # Of an active connection that of its first weight, of the others drawn once for all.
        own["positive"] = {
            path: jnp.where(mask, kernels[path] > 0, _signs(key, l, mask.shape))
            for l, (path, mask) in enumerate(masks.items())
        }
    if method.explored:
        own["explored"] = jax.tree.map(jnp.copy, dict(masks))
    if method.waits:
        own["waiting"] = Waiting(method.name)
    return own


def _signs(key: Array, l: int, shape: tuple[int, ...]) -> Array:
    """A sign for every possible connection of layer l, + where True, by its hash."""
    hashes = hashes_of_layer(key, l, math.prod(shape[:-1]), shape[-1])
    return (hashes >> 31).astype(bool).reshape(shape)


def begun(state: Any) -> Any:
    """`state` without the mark, as pruning or a Lottery ticket leaves it."""
    return state.replace(method={k: v for k, v in state.method.items() if k != "waiting"})


def refuse_waiting(own: Own) -> None:
    """Errors: a state that was to be pruned first."""
    if "waiting" in own:
        name = own["waiting"].method
        call = "dst.lottery.ticket" if name == "lottery" else "dst.prune_at_init"
        raise ConfigError(
            f"state has all connections, but method {name!r} prunes before training; call {call} "
            "first."
        )


def follow(own: Own, gradients: Mapping[str, Array]) -> Own:
    """After a step: momentum v <- mu v + g of every possible connection, not of the active only."""
    if "momentum" not in own:
        return own
    momentum = {path: own["decay"] * v + gradients[path] for path, v in own["momentum"].items()}
    return {**own, "momentum": momentum}


def after_rewire(own: Own, masks: Mapping[str, Array], dropped: Array, target: Array) -> Own:
    """After a rewire: what was ever active, and DSR's threshold, for `dropped` to meet `target`."""
    own = dict(own)
    if "explored" in own:
        own["explored"] = {path: own["explored"][path] | mask for path, mask in masks.items()}
    if "threshold" in own:
        few = dropped < (1 - TOLERANCE) * target
        many = dropped > (1 + TOLERANCE) * target
        own["threshold"] *= jnp.where(few, 2.0, jnp.where(many, 0.5, 1.0))
    return own


def told(own: Own) -> dict[str, Array]:
    """What of it a rewire reports."""
    report = {}
    if "explored" in own:
        masks = own["explored"].values()
        ever = sum(mask.sum(dtype=jnp.int32) for mask in masks)
        report["explored"] = ever / np.float32(sum(mask.size for mask in masks))
    if "threshold" in own:
        report["threshold"] = own["threshold"]
    return report
