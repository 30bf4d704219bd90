"""What a method remembers between steps, beside masks and weights: `SparseState.method`.

A dict of what the method needs, empty for most, by the names of `MEMORIES`; and the mark of a state
that has all connections, but may not train with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dst.connections.hashing import hashes_of_layer
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.vocabulary import Names

Array = jax.Array
Own = Mapping[str, Any]

THRESHOLD, TOLERANCE = 1e-3, 0.1  # H at the start and delta of DSR (Mostafa and Wang, 2019)


class Memory(NamedTuple):
    """Something that is remembered: how it begins, and what changes it."""

    first: Callable[..., Any]  # (method, A, kernels, key) -> before the first step
    step: Callable[[Own, Mapping[str, Array]], Any] | None = None  # (own, gradients), after a step
    # (own, A, how many the rule asked to drop, how many were to grow), after a rewire
    rewire: Callable[[Own, Any, Array, Array], Any] | None = None
    report: Callable[[Any], Array] | None = None  # what a rewire reports of it
    needs: str = ""  # why sparse execution cannot: "it remembers ..."; "" if it can
    words: float = 0.0  # a possible connection, of 4 bytes


class Waiting(struct.PyTreeNode):
    """The mark of a state to be pruned before it trains: structure only, no array."""

    method: str = struct.field(pytree_node=False)


# ------------------------------------------------------------------------------------- the memories
def _no_momentum(method: Method, A: Any, kernels: Mapping[str, Array], key: Array) -> Any:
    return jax.tree.map(jnp.zeros_like, dict(kernels))


def _momentum(own: Own, gradients: Mapping[str, Array]) -> Any:
    """v <- mu v + g of every possible connection, not of the active only (SNFS)."""
    return {path: own["decay"] * v + gradients[path] for path, v in own["momentum"].items()}


def _positive(method: Method, A: Any, kernels: Mapping[str, Array], key: Array) -> Any:
    """Of an active connection the sign of its first weight, of others drawn once for all."""
    return {
        path: jnp.where(mask, kernels[path] > 0, _signs(key, l, mask.shape))
        for l, (path, mask) in enumerate(A.items())
    }


def _signs(key: Array, l: int, shape: tuple[int, ...]) -> Array:
    """A sign for every possible connection of layer l, + where True, by its hash."""
    hashes = hashes_of_layer(key, l, math.prod(shape[:-1]), shape[-1])
    return (hashes >> 31).astype(bool).reshape(shape)


def _threshold(own: Own, A: Any, dropped: Array, target: Array) -> Array:
    """DSR's, halved or doubled for `dropped` to meet `target`."""
    few = dropped < (1 - TOLERANCE) * target
    many = dropped > (1 + TOLERANCE) * target
    return own["threshold"] * jnp.where(few, 2.0, jnp.where(many, 0.5, 1.0))


def _ever(own: Own, A: Any, dropped: Array, target: Array) -> Any:
    return {path: own["explored"][path] | mask for path, mask in A.items()}


def _share(explored: Any) -> Array:
    ever = sum(mask.sum(dtype=jnp.int32) for mask in explored.values())
    return ever / np.float32(sum(mask.size for mask in explored.values()))


MEMORIES = Names(
    "memory",
    Memory,
    dict(
        momentum=Memory(
            _no_momentum,
            step=_momentum,
            needs="it keeps the momentum of every possible connection",
            words=1.0,
        ),
        decay=Memory(lambda method, A, kernels, key: jnp.float32(method.momentum)),
        threshold=Memory(
            lambda method, A, kernels, key: jnp.float32(THRESHOLD),
            rewire=_threshold,
            report=lambda threshold: threshold,
        ),
        positive=Memory(
            _positive, needs="it remembers a sign of every possible connection", words=1 / 32
        ),
        explored=Memory(
            lambda method, A, kernels, key: jax.tree.map(jnp.copy, dict(A)),
            rewire=_ever,
            report=_share,
            needs="it remembers every connection that ever existed (explored)",
            words=1 / 32,
        ),
    ),
)


# --------------------------------------------------------------------------- what is done with them
def first_memory(names: tuple[str, ...], method: Method, A: Any, kernels: Any, key: Array) -> dict:
    """What the method knows before the first step, of the memories with these names."""
    own = {name: MEMORIES[name].first(method, A, kernels, key) for name in names}
    return own | ({"waiting": Waiting(method.name)} if method.waits else {})


def begun(state: Any) -> Any:
    """`state` without the mark, as pruning or a Lottery ticket leaves it."""
    return state.replace(method={k: v for k, v in state.method.items() if k != "waiting"})


def refuse_waiting(own: Own) -> None:
    """Raises ConfigError: a state that was to be pruned first."""
    if "waiting" in own:
        name = own["waiting"].method
        call = "dst.lottery.ticket" if name == "lottery" else "dst.prune_at_init"
        raise ConfigError(
            f"state has all connections, but method {name!r} prunes before training; call {call} "
            "first."
        )


def after_step(own: Own, gradients: Mapping[str, Array]) -> Own:
    """What is remembered after a step of these gradients of the connections' values."""
    return {**own, **{n: f(own, gradients) for n, f in _functions(own, "step")}}


def after_rewire(own: Own, A: Any, dropped: Array, target: Array) -> Own:
    """What is remembered after a rewire that left A; `dropped` of `target` were to go."""
    return {**own, **{n: f(own, A, dropped, target) for n, f in _functions(own, "rewire")}}


def memory_report(own: Own) -> dict[str, Array]:
    """What of it a rewire reports."""
    return {name: f(own[name]) for name, f in _functions(own, "report")}


def _functions(own: Own, when: str) -> list[tuple[str, Callable]]:
    rows = [(name, getattr(MEMORIES[name], when)) for name in own if name in MEMORIES]
    return [(name, f) for name, f in rows if f]
