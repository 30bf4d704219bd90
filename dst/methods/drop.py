"""Which connections a rewire may drop, and how many: `DROPS`, the rules of `Method.drop`.

A rule is (net, method) -> may_drop, and may_drop(view, event, wanted) gives the eligible entries,
bool (n,), and how many of them are to go, int32 (). The weakest of them go first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst.connections.base import Connections, bits, signed_bits
from dst.connections.masks import join
from dst.connections.select import highest, lowest
from dst.methods.base import Method
from dst.methods.distributions import held_layers
from dst.methods.memory import Own
from dst.methods.plan import drop_fractions, floors
from dst.network import Network
from dst.vocabulary import Names

Array = jax.Array


class View(NamedTuple):
    """What a rule sees of the network, in either execution; entries as `A` has them."""

    A: Connections
    w: Array  # float (n,), the entries' weights
    strength: Array  # float (n,), what the weakest have least of
    order: Array  # unsigned (n,), in the order of strength
    salt: Array  # of ties, see `Connections.by_layer`
    memory: Own  # what the method remembers


def looked_at(A: Connections, w: Array, salt: Array, memory: Own, strength: Any = None) -> View:
    """The view, with |w| or with the strength of a `Drop`."""
    magnitude = jnp.abs(w)
    view = View(A, w, magnitude, bits(magnitude), salt, memory)
    if strength is None:
        return view
    own = strength(view)
    return view._replace(strength=own, order=signed_bits(own))


MayDrop = Callable[[View, Array, Array], tuple[Array, Array]]


class Drop(NamedTuple):
    """A rule, and what it declares."""

    rule: Callable[[Network, Method], MayDrop]
    # As many go as were planned; else only the rule knows, and sparse execution refuses it.
    planned: bool = True
    floors: bool = False  # whether it keeps each layer's `floor`
    asks: bool = True  # whether how many go follows from the drop fraction
    memory: tuple[str, ...] = ()  # names of `MEMORIES`
    # What the weakest have least of: (n,) of a view whose own strength is |w|. None: that.
    strength: Callable[[View], Array] | None = None


def dropping(net: Network, method: Method) -> MayDrop:
    """The method's rule, of all layers but those that `sparsity_of` holds."""
    drop, held = DROPS[method.drop], held_layers(net, method)
    may_drop = drop.rule(net, method)

    def unless_held(view: View, event: Array, wanted: Array) -> tuple[Array, Array]:
        eligible, count = may_drop(view, event, wanted)
        free = lambda l, A, *_: jnp.zeros_like(A) if l in held else A  # noqa: E731
        eligible &= view.A.by_layer(free, view.order, view.salt)
        return (eligible, count) if drop.planned else _counted(eligible)

    return unless_held if held else may_drop


def by_magnitude(net: Network, method: Method) -> MayDrop:
    """The weakest of the network, but of no layer the `floor` strongest (SET, RigL, the paper)."""
    keep = floors(net, method)

    def may_drop(view: View, event: Array, wanted: Array) -> tuple[Array, Array]:
        if not keep.any():
            return view.A.exists, wanted
        return unprotected(keep, view), wanted

    return may_drop


def unprotected(keep: np.ndarray, view: View) -> Array:
    """All connections but the keep[l] strongest of layer l: int (L,) -> bool (n,)."""

    def loose(l: int, A: Array, order: Array, ties: Callable[[], Array]) -> Array:
        return A & ~highest(order, A, jnp.int32(keep[l]), ties)

    return view.A.by_layer(loose, view.order, view.salt)


def by_layer(net: Network, method: Method) -> MayDrop:
    """The weakest p_t of every layer (SNFS; Dettmers and Zettlemoyer, 2019)."""
    p_t = np.array(drop_fractions(method), np.float32)

    def may_drop(view: View, event: Array, wanted: Array) -> tuple[Array, Array]:
        # 2^-22: a product that misses an integer by float32's rounding is that integer.
        p = jnp.asarray(p_t)[event] * np.float32(1 + 2**-22)

        def weak(l: int, A: Array, order: Array, ties: Callable[[], Array]) -> Array:
            k = jnp.floor(p * A.sum(dtype=jnp.int32)).astype(jnp.int32)
            return lowest(order, A, k)

        return _counted(view.A.by_layer(weak, view.order, view.salt))

    return may_drop


def below_threshold(net: Network, method: Method) -> MayDrop:
    """|w| < H, a threshold for all layers that adapts itself (DSR; Mostafa and Wang, 2019)."""

    def may_drop(view: View, event: Array, wanted: Array) -> tuple[Array, Array]:
        return _counted(view.A.exists & (jnp.abs(view.w) < view.memory["threshold"]))

    return may_drop


def by_sign(net: Network, method: Method) -> MayDrop:
    """Those whose weight has left the connection's own sign (DeepR; Bellec et al., 2018)."""

    def may_drop(view: View, event: Array, wanted: Array) -> tuple[Array, Array]:
        positive = join(view.memory["positive"])
        return _counted(view.A.exists & jnp.where(positive, view.w < 0, view.w > 0))

    return may_drop


def _counted(eligible: Array) -> tuple[Array, Array]:
    return eligible, eligible.sum(dtype=jnp.int32)


DROPS = Names(
    "drop rule",
    Drop,
    {
        "magnitude": Drop(by_magnitude, floors=True),
        "layer magnitude": Drop(by_layer, planned=False),
        "threshold": Drop(below_threshold, planned=False, memory=("threshold",)),
        "sign": Drop(by_sign, planned=False, asks=False, memory=("positive",)),
    },
)
