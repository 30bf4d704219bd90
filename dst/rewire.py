"""The rewire step, Figure 1 of the paper: drop P, sample S, score S, grow G.

Every method that moves connections during training is this one step. They differ in which
connections may be dropped (the weakest, those below a threshold, those whose sign changed), where
candidates come from (`everything`, or a sample S from f x g), how these are scored (by chance, by
momentum, by the dense gradient, by the gradient on S), and whether growth is ranked over the whole
network or shared out to layers.

A, the active connections, are the masks. Candidates are flat positions in one vector over all
layers, so that the weakest are dropped and the best grown globally.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst.connections.hashing import hashes_at
from dst.connections.masks import dead_units
from dst.connections.moments import recognise, reset_inactive
from dst.connections.select import bits, lowest
from dst.errors import ConfigError
from dst.methods.candidates import Candidates, candidates
from dst.methods.combinations import check, check_execution
from dst.methods.drop import DROPS, weakest
from dst.methods.explore import sparse_rewire_body
from dst.methods.heuristics import HEURISTICS, ON_HOST
from dst.methods.memory import after_rewire, refuse_waiting, told
from dst.methods.plan import plan
from dst.methods.share import share_out
from dst.methods.table import Method
from dst.network import Network
from dst.state import SparseState, active_counts, join, kernels_of
from dst.update import (
    TIE_STREAM,
    Loss,
    all_finite,
    mask_kernels,
    parallel,
    placer,
    split_batch,
    stream,
)

Array = jax.Array
ByLayer = dict[str, Array]


# ------------------------------------------------------------------------------ the step, Figure 1
def rewire_body(net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss):
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    if not method.moves:
        raise ConfigError(f"method is {method.name!r}, whose connections never move.")
    check(method)
    check_execution(method, net.execution)
    if net.execution == "sparse":
        return sparse_rewire_body(net, tx, method, loss)
    planned = plan(net, method)
    may_drop = DROPS[method.drop](net, method)
    sample = candidates(net, method, loss)
    most = int(planned.grown.max()) if method.drop == "magnitude" else net.possible

    def body(state: SparseState, batch: Any, fg: Any):
        refuse_waiting(state.method)
        event = planned.event(state.step)
        target, G_t = (jnp.asarray(n)[event] for n in (planned.active, planned.grown))
        # The gradient is taken before the drop; P and G are disjoint: S holds inactive ones only.
        S = sample(state, batch, fg, event)
        A, w = join(state.masks), join(kernels_of(state.params, state.masks))
        surplus = A.sum(dtype=jnp.int32) - target
        eligible, wanted = may_drop(state, event, surplus + G_t)
        room = jnp.minimum(wanted, eligible.sum(dtype=jnp.int32))
        # With fewer candidates than |P| fewer are dropped, never more than can grow.
        grow = jnp.minimum(room - surplus, jnp.isfinite(S.score).sum(dtype=jnp.int32))
        grow = jnp.clip(grow, 0, most) if method.score else jnp.int32(0)
        dropped = jnp.maximum(jnp.minimum(surplus + grow, room), 0)
        key = stream(state, TIE_STREAM)
        everywhere = jnp.arange(net.possible, dtype=jnp.int32)
        ties = lambda: hashes_at(net, key, everywhere)  # noqa: E731
        survivors = A & ~weakest(w, eligible, dropped, ties)
        weights = layer_weights(method, state, survivors)
        A = survivors
        if weights is not None:
            A |= shared_out(net, S, grow, weights)
        elif most and method.score:
            A |= grown(net, S, grow, most, key)
        finite = S.finite & all_finite(kernels_of(state.params, state.masks))
        own = after_rewire(state.method, apart(net, A), wanted, G_t)
        state = reconnect(tx, state, apart(net, A), apart(net, survivors)).replace(method=own)
        return state, report(state, dropped, grow, S, finite)

    return body


def grown(net: Network, S: Candidates, k: Array, most: int, key: Array) -> Array:
    """G, the k <= `most` best of S: bool (N,). Of equals those of the lower hashes."""
    values, _ = lax.top_k(S.score, min(most, S.score.size))
    cut = values[jnp.maximum(k - 1, 0)]
    better, equal = S.score > cut, (S.score == cut) & jnp.isfinite(S.score)
    left = k - better.sum(dtype=jnp.int32)
    ties = lambda: lowest(hashes_at(net, key, S.position), equal, left)  # noqa: E731
    some = lax.cond(equal.sum(dtype=jnp.int32) > left, ties, lambda: equal)
    at = jnp.where((better | some) & (k > 0), S.position, net.possible)
    return jnp.zeros(net.possible, bool).at[at].set(True, mode="drop")


def shared_out(net: Network, S: Candidates, k: Array, weights: Array) -> Array:
    """G, k of S, which is everything, in proportion to the layers' `weights` (L,): bool (N,)."""
    sizes = [layer.size for layer in net.layers.values()]
    scores = jnp.split(S.score, np.cumsum(sizes)[:-1])
    room = jnp.stack([jnp.isfinite(score).sum(dtype=jnp.int32) for score in scores])
    counts = share_out(k, weights, room)
    G = [
        lowest(~bits(jnp.maximum(score, 0)), jnp.isfinite(score), count)
        for score, count in zip(scores, counts, strict=True)
    ]
    return jnp.concatenate(G)


def layer_weights(method: Method, state: SparseState, survivors: Array) -> Array | None:
    """By what growth is shared out to the layers: float32 (L,); None: ranked over all of them.

    SNFS: mean |momentum| of the active connections. DSR: how many have survived.
    """
    if not method.share:
        return None
    if method.share == "survivors":
        ends = np.cumsum([mask.size for mask in state.masks.values()])[:-1]
        return jnp.stack([part.sum(dtype=jnp.float32) for part in jnp.split(survivors, ends)])
    v = state.method["momentum"]
    means = [
        jnp.where(mask, jnp.abs(v[path]), 0).sum() / jnp.maximum(mask.sum(), 1)
        for path, mask in state.masks.items()
    ]
    return jnp.stack(means)


def reconnect(tx, state: SparseState, masks: ByLayer, survivors: ByLayer) -> SparseState:
    """New masks; weights and moments of dropped and grown connections start over at 0."""
    owners = recognise(state.opt_state, state.params, masks)
    params = mask_kernels(state.params, survivors)
    opt_state = reset_inactive(state.opt_state, tx.init(params), owners, survivors)
    return state.replace(params=params, opt_state=opt_state, masks=masks)


def report(state: SparseState, dropped: Array, grow: Array, S: Candidates, finite: Array):
    """What a rewire did, for the log: |P|, |G|, |S| asked and realised, each layer's counts."""
    return {
        "pruned": dropped,
        "grown": grow,
        "subset_asked": S.asked,
        "subset_realised": S.realised,
        "active": active_counts(state.masks),
        "dead_units": {path: dead_units(m) for path, m in state.masks.items()},
        **told(state.method),
        "finite": finite,
    }


def apart(net: Network, flat: Array) -> ByLayer:
    """The inverse of `join` for arrays in the kernels' shapes."""
    ends = np.cumsum([layer.size for layer in net.layers.values()])
    parts = jnp.split(flat, ends[:-1])
    return {
        path: part.reshape(layer.shape)
        for (path, layer), part in zip(net.layers.items(), parts, strict=True)
    }


def make_rewire(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    loss: Loss,
    *,
    devices: list | None = None,
    donate: bool = False,
) -> Callable[[SparseState, Any], tuple[SparseState, dict[str, Any]]]:
    """The jitted rewire step: (state, batch) -> (state, report); compiled once for a whole run.

    With `donate` the new state takes the memory of the old one, which is then gone.
    """
    body = rewire_body(net, tx, method, loss)
    step = parallel(body, (None, 0, None), devices, (0,) if donate else ())
    measure = host_heuristic(net, method, loss)
    place = placer(devices)

    def rewire(state: SparseState, batch: Any):
        state = place(state)
        return step(state, split_batch(batch, devices), measure(state, batch))

    return rewire


def host_heuristic(net: Network, method: Method, loss: Loss) -> Callable[[SparseState, Any], Any]:
    """The heuristic's part that runs before the jitted step (SynFlow, in float64), else nothing."""
    if method.heuristic in ON_HOST:
        return HEURISTICS[method.heuristic](net, loss)
    return lambda state, batch: {}
