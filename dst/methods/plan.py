"""What is known of a run's rewires beforehand: when, how many are dropped, grown and sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst.arguments import check_is
from dst.methods.base import Method
from dst.methods.distributions import active_count, first_counts, held_layers
from dst.methods.schedules import (
    cosine_drop_fraction,
    cubic_sparsity,
    events,
    largest_remainder,
    portion,
    rounded_up,
)
from dst.network import Network


class Plan(NamedTuple):
    """Exact integers of each event; the last one is at `end`, where nothing grows any more."""

    steps: np.ndarray  # (E,), before whose update the network is rewired
    active: np.ndarray  # (E,), connections of the network afterwards
    grown: np.ndarray  # (E,), |G_t|; |P_t| is that and what the network loses
    subset: np.ndarray  # (E, L), |S_{l,t}|, or the most that it can be
    each: np.ndarray | None = None  # (E, L), |G_{l,t}| where every layer keeps its count

    def event(self, step: jax.Array) -> jax.Array:
        """The event of a step, or the last one before it: int32 (), traced."""
        index = jnp.searchsorted(jnp.asarray(self.steps), step, side="right") - 1
        return jnp.maximum(index, 0)


def plan(net: Network, method: Method) -> Plan:
    """|G_t| = floor(p_t |A_t|), |S_t| = ceil(c |G_t|) split over layers in proportion to |W_l|.

    |A_t| is K, or N - round(N s_t) on Zhu and Gupta's cubic ramp, K at `end` to the connection.
    Layers that `sparsity_of` holds are not counted: nothing of them is dropped or sampled. With
    `keep_counts` |G_{l,t}| = floor(p_t |A_l|) and |S_{l,t}| = ceil(c |G_{l,t}|), |A_l| at first.
    """
    N, s = net.possible, method.sparsity
    held = held_layers(net, method)
    layers = list(net.layers.values())
    sizes = [0 if l in held else layer.size for l, layer in enumerate(layers)]
    still = sum(layers[l].size for l in held)
    steps = event_steps(method)
    first = method.first_sparsity
    density = [cubic_sparsity(t, method.end, first, s) if method.ramps else s for t in steps]
    active = [active_count(N, s_t) for s_t in density]
    inactive = N - np.array([active_count(N, first), *active[:-1]])
    grown = np.zeros(len(steps), np.int64)
    each = within_layers(net, method) if method.keep_counts and method.score else None
    if each is not None:
        grown = each.sum(1)
    elif method.score:
        wanted = [
            portion(p, A - still) for p, A in zip(drop_fractions(method), active, strict=True)
        ]
        grown = np.minimum(wanted, inactive)
    if method.subset_of == "active":
        K = most_active(net, method, active)
        most = [rounded_up(method.subset_ratio, min(size, K)) for size in sizes]
        subset = np.tile(np.minimum(most, sizes), (len(steps), 1))
    elif each is not None:
        ratio = method.subset_ratio
        subset = np.minimum([[rounded_up(ratio, int(n)) for n in row] for row in each], sizes)
    else:
        totals = [rounded_up(method.subset_ratio, int(n)) for n in grown]
        subset = np.stack([largest_remainder(total, sizes, sizes) for total in totals])
    planned = Plan(*(np.asarray(a, np.int32) for a in (steps, active, grown, subset)))
    return planned if each is None else planned._replace(each=each.astype(np.int32))


def within_layers(net: Network, method: Method) -> np.ndarray:
    """|G_{l,t}| of every event if layers keep their first counts: int64 (E, L)."""
    counts = first_counts(net, method)
    most = [net.layers[path].size - count for path, count in counts.items()]
    fractions = drop_fractions(method)
    grown = [[portion(p, count) for count in counts.values()] for p in fractions]
    return np.minimum(grown, most).astype(np.int64)


def most_active(net: Network, method: Method, active: Iterable[int]) -> int:
    """The most connections that the network ever has: at first, or after an event."""
    return max(active_count(net.possible, method.first_sparsity), *map(int, active))


def event_steps(method: Method) -> list[int]:
    """Before whose updates the network is rewired, and `end`: (E,)."""
    return [*events(method.every, method.end), method.end]


def drop_fractions(method: Method) -> list[float]:
    """p_t of each event: (E,)."""
    ends = method.end, method.drop_fraction, method.last_fraction
    return [cosine_drop_fraction(t, *ends) for t in event_steps(method)]


def asked(method: Method, subset: jax.Array, active: jax.Array) -> jax.Array:
    """|S_l| of each layer: the plan's, or c |A_l|, rounded up. Shapes: int32 (L,), (L,) -> (L,)."""
    if method.subset_of == "dropped":
        return subset
    # 2^-22: a product that misses an integer by float32's rounding is that integer.
    product = method.subset_ratio * active.astype(jnp.float32) * np.float32(1 - 2**-22)
    wanted = jnp.ceil(product).astype(jnp.int32)
    return jnp.minimum(wanted, subset)


def floors(net: Network, method: Method) -> np.ndarray:
    """Connections that the drop leaves each layer, int64 (L,): floor(floor x its first count)."""
    first = first_counts(net, method).values()
    return np.array([portion(method.floor, count) for count in first], np.int64)


def due(method: Method, step: int) -> bool:
    """Whether `method` rewires before this step's update: at every, 2 every, ... below the end.

    A ramp has its last rewire at the end itself.
    """
    check_is("method", method, Method, "dst.method(name, sparsity=...)")
    at_end = method.ramps and step == method.end
    return method.moves and (at_end or step in events(method.every, method.end))


def until_due(method: Method, step: int) -> int:
    """Steps to the next one that may be due, at least 1."""
    next_one = step - step % method.every + method.every
    return min(next_one, method.end if step < method.end else next_one) - step
