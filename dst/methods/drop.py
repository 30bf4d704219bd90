"""Which connections a rewire may drop, and how many: the rules of `Method.drop`.

A rule is (net, method) -> may_drop, and may_drop(state, event, wanted) gives the eligible
connections over all layers, bool (N,), and how many of them are to go, int32 (). The weakest of
them go first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dst.connections.hashing import hashes_of_layer
from dst.connections.select import bits, lowest
from dst.methods.plan import floors
from dst.methods.schedules import cosine_drop_fraction
from dst.methods.table import Method
from dst.network import Network
from dst.state import SparseState, join, kernels_of
from dst.update import TIE_STREAM, stream

Array = jax.Array
MayDrop = Callable[[SparseState, Array, Array], tuple[Array, Array]]


def weakest(w: Array, eligible: Array, k: Array, ties: Callable[[], Array] | None = None) -> Array:
    """The k smallest |w| of the eligible: (N,), bool (N,) -> bool (N,); of equals as `lowest`."""
    return lowest(bits(jnp.abs(w)), eligible, k, ties)


def by_magnitude(net: Network, method: Method) -> MayDrop:
    """The weakest of the network, but of no layer the `floor` strongest (SET, RigL, the paper)."""
    keep = floors(net, method)

    def may_drop(state: SparseState, event: Array, wanted: Array) -> tuple[Array, Array]:
        if not keep.any():
            return join(state.masks), wanted
        return unprotected(keep, state.params, state.masks, stream(state, TIE_STREAM)), wanted

    return may_drop


def unprotected(keep: np.ndarray, params: Any, masks: Mapping[str, Array], key: Array) -> Array:
    """All connections but the keep[l] strongest of layer l: int (L,) -> bool (N,)."""
    loose = {}
    for l, (path, w) in enumerate(kernels_of(params, masks).items()):
        A, w = masks[path].ravel(), w.reshape(-1, w.shape[-1])
        ties = lambda l=l, w=w: hashes_of_layer(key, l, *w.shape).ravel()  # noqa: E731
        loose[path] = A & ~lowest(~bits(jnp.abs(w.ravel())), A, jnp.int32(keep[l]), ties)
    return join(loose)


def by_layer(net: Network, method: Method) -> MayDrop:
    """The weakest p_t of every layer (SNFS; Dettmers and Zettlemoyer, 2019)."""
    steps = [*range(method.every, method.end, method.every), method.end]
    p_t = np.array(
        [
            cosine_drop_fraction(t, method.end, method.drop_fraction, method.last_fraction)
            for t in steps
        ],
        np.float32,
    )

    def may_drop(state: SparseState, event: Array, wanted: Array) -> tuple[Array, Array]:
        # 2^-22: a product that misses an integer by float32's rounding is that integer.
        p = jnp.asarray(p_t)[event] * np.float32(1 + 2**-22)
        weak = {}
        for path, w in kernels_of(state.params, state.masks).items():
            A = state.masks[path]
            k = jnp.floor(p * A.sum(dtype=jnp.int32)).astype(jnp.int32)
            weak[path] = weakest(w.ravel(), A.ravel(), k)
        return _counted(weak)

    return may_drop


def below_threshold(net: Network, method: Method) -> MayDrop:
    """|w| < H, a threshold for all layers that adapts itself (DSR; Mostafa and Wang, 2019)."""

    def may_drop(state: SparseState, event: Array, wanted: Array) -> tuple[Array, Array]:
        H, kernels = state.method["threshold"], kernels_of(state.params, state.masks)
        return _counted({p: A & (jnp.abs(kernels[p]) < H) for p, A in state.masks.items()})

    return may_drop


def by_sign(net: Network, method: Method) -> MayDrop:
    """Those whose weight has left the connection's own sign (DeepR; Bellec et al., 2018)."""

    def may_drop(state: SparseState, event: Array, wanted: Array) -> tuple[Array, Array]:
        positive, kernels = state.method["positive"], kernels_of(state.params, state.masks)
        crossed = {p: jnp.where(positive[p], kernels[p] < 0, kernels[p] > 0) for p in state.masks}
        return _counted({p: A & crossed[p] for p, A in state.masks.items()})

    return may_drop


DROPS: dict[str, Callable[[Network, Method], MayDrop]] = {
    "magnitude": by_magnitude,
    "layer magnitude": by_layer,
    "threshold": below_threshold,
    "sign": by_sign,
}


def _counted(by_path: dict[str, Array]) -> tuple[Array, Array]:
    eligible = join(by_path)
    return eligible, eligible.sum(dtype=jnp.int32)
