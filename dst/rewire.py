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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst.config import ConfigError
from dst.drop import DROPS, weakest
from dst.explore import sparse_rewire_body
from dst.heuristics import HEURISTICS, ON_HOST
from dst.masks import dead_units
from dst.methods import Method
from dst.moments import recognise, reset_inactive
from dst.network import Network
from dst.plan import asked, plan
from dst.probes import gradient_on
from dst.remember import after_rewire, told
from dst.sample import draw_subset
from dst.select import bits, lowest
from dst.share import share_out
from dst.state import SparseState, active_counts, join, kernels_of
from dst.stream import streamed_choice
from dst.update import (
    AXIS,
    REWIRE_STREAM,
    Loss,
    all_finite,
    mask_kernels,
    parallel,
    run_loss,
    split_batch,
    stream,
)

Array = jax.Array
ByLayer = dict[str, Array]


class Candidates(NamedTuple):
    """S, and how good each is: flat positions over all layers; -inf for what cannot grow."""

    position: Array  # int32 (|S|,)
    score: Array  # float (|S|,)
    asked: Array  # int32 (), |S| that was asked for
    realised: Array  # int32 (), |S|
    finite: Array  # bool (), whether all scores were


# ------------------------------------------------------------------------------ the step, Figure 1
def rewire_body(net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss):
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    if not method.moves:
        raise ConfigError(f"method is {method.name!r}, whose connections never move.")
    if net.execution == "sparse":
        return sparse_rewire_body(net, tx, method, loss)
    planned = plan(net, method)
    may_drop = DROPS[method.drop](net, method)
    sample = candidates(net, method, loss)
    most = int(planned.grown.max()) if method.drop == "magnitude" else net.possible

    def body(state: SparseState, batch: Any, fg: Any):
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
        dropped = jnp.minimum(surplus + grow, room)
        survivors = A & ~weakest(w, eligible, dropped)
        weights = layer_weights(method, state, survivors)
        A = survivors | grown(net, S, grow, most, weights)
        finite = S.finite & all_finite(kernels_of(state.params, state.masks))
        own = after_rewire(state.method, apart(net, A), wanted, G_t)
        state = reconnect(tx, state, apart(net, A), apart(net, survivors)).replace(method=own)
        return state, report(state, dropped, grow, S, finite)

    return body


def grown(net: Network, S: Candidates, k: Array, most: int, weights: Array | None) -> Array:
    """G, the k <= `most` best of S: bool (N,). Of equals the first in layer order.

    Globally, or with `weights` (L,) shared out to the layers in proportion, where S is everything.
    """
    if weights is None:
        best = top(S.score, most, k, S.position.size)
        at = jnp.append(S.position, net.possible)[best]
        return jnp.zeros(net.possible, bool).at[at].set(True, mode="drop")
    sizes = [layer.size for layer in net.layers.values()]
    scores = jnp.split(S.score, np.cumsum(sizes)[:-1])
    room = jnp.stack([jnp.isfinite(score).sum(dtype=jnp.int32) for score in scores])
    counts = share_out(k, weights, room)
    G = [
        lowest(~bits(jnp.maximum(score, 0)), jnp.isfinite(score), count)
        for score, count in zip(scores, counts, strict=True)
    ]
    return jnp.concatenate(G)


def top(score: Array, size: int, k: Array, nowhere: int) -> Array:
    """Positions of the k largest of `score` in static shape: `nowhere` from rank k on."""
    _, index = lax.top_k(score, min(size, score.size))
    return jnp.where(jnp.arange(index.size) < k, index, nowhere)


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


# ---------------------------------------------------------------------- where candidates come from
def candidates(net: Network, method: Method, loss: Loss) -> Callable[..., Candidates]:
    """S and its scores, of the method: (state, batch, f x g, event) -> Candidates."""
    if not method.score:
        return nothing
    if method.growth_memory == "streamed":
        return streamed(net, loss, int(plan(net, method).grown.max()))
    choose = subset(net, method, loss) if method.heuristic else everything
    score = SCORES[method.score](net, loss)

    def sample(state: SparseState, batch: Any, fg: Any, event: Array) -> Candidates:
        S, valid, wanted = choose(state, batch, fg, event)
        scores = score(state, batch, S)
        best, realised = jnp.where(join(valid), join(scores), -jnp.inf), join(valid).sum()
        return Candidates(join(positions(net, S)), best, wanted, realised, all_finite(scores))

    return sample


def nothing(state: SparseState, batch: Any, fg: Any, event: Array) -> Candidates:
    """No candidate: pruning only drops."""
    none, zero = jnp.full(1, -jnp.inf), jnp.int32(0)
    return Candidates(jnp.zeros(1, jnp.int32), none, zero, zero, jnp.bool_(True))


def streamed(net: Network, loss: Loss, most: int) -> Callable[..., Candidates]:
    """RigL's choice with one block of the dense gradient at a time: the best `most` of all."""
    choose = streamed_choice(net, loss, most)

    def sample(state: SparseState, batch: Any, fg: Any, event: Array) -> Candidates:
        position, score, finite = choose(state, batch)
        inactive = net.possible - join(state.masks).sum(dtype=jnp.int32)
        return Candidates(position, score, inactive, inactive, finite)

    return sample


def everything(state: SparseState, batch, fg, event) -> tuple[ByLayer, ByLayer, Array]:
    """Every inactive connection: all positions, valid where the mask is not."""
    S = {path: jnp.arange(mask.size, dtype=jnp.int32) for path, mask in state.masks.items()}
    valid = {path: ~mask.ravel() for path, mask in state.masks.items()}
    return S, valid, join(valid).sum(dtype=jnp.int32)


def subset(net: Network, method: Method, loss: Loss) -> Callable:
    """S: |S_l| distinct inactive connections of each layer, drawn from f x g of the heuristic."""
    measure = HEURISTICS[method.heuristic](net, loss)
    planned = plan(net, method)
    S_max = planned.subset.max(0)

    # Layers of one shape are drawn by one vmapped sampler: ResNet-56 compiles 7 of them, not 57.
    alike: dict[tuple[int, ...], list[int]] = {}
    for l, layer in enumerate(net.layers.values()):
        alike.setdefault(layer.shape, []).append(l)

    def choose(state: SparseState, batch, fg, event) -> tuple[ByLayer, ByLayer, Array]:
        fg = fg if method.heuristic in ON_HOST else measure(state, batch)
        key, paths = stream(state, REWIRE_STREAM), list(net.layers)
        active = jnp.stack([*active_counts(state.masks).values()])
        wanted = asked(method, jnp.asarray(planned.subset)[event], active)
        S, valid = {}, {}
        for group in alike.values():
            size = max(1, int(S_max[group].max()))
            exhaustible = size >= net.layers[paths[group[0]]].size - int(planned.active.max())
            draw = functools.partial(
                draw_subset, size=size, rounds=method.rounds, exhaustible=exhaustible
            )
            f, g, masks = (
                jnp.stack([column[paths[l]] for l in group])
                for column in (*_columns(fg), state.masks)
            )
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(group))
            drawn = jax.vmap(draw)(keys, f, g, masks, wanted[jnp.asarray(group)])
            for i, l in enumerate(group):
                S[paths[l]], valid[paths[l]] = drawn[0][i], drawn[1][i]
        return {p: S[p] for p in paths}, {p: valid[p] for p in paths}, wanted.sum()

    return choose


def _columns(fg: dict[str, tuple[Array, Array]]) -> tuple[ByLayer, ByLayer]:
    return {p: f for p, (f, _) in fg.items()}, {p: g for p, (_, g) in fg.items()}


# ----------------------------------------------------------------------------- how they are scored
def by_chance(net: Network, loss: Loss) -> Callable[..., ByLayer]:
    """SET: a random order of all candidates."""

    def score(state: SparseState, batch: Any, S: ByLayer) -> ByLayer:
        key = stream(state, REWIRE_STREAM)
        return {
            path: jax.random.uniform(jax.random.fold_in(key, l), s.shape)
            for l, (path, s) in enumerate(S.items())
        }

    return score


def by_momentum(net: Network, loss: Loss) -> Callable[..., ByLayer]:
    """SNFS: |momentum| of every possible connection, which the update step keeps."""

    def score(state: SparseState, batch: Any, S: ByLayer) -> ByLayer:
        return {path: jnp.abs(state.method["momentum"][path].ravel()[s]) for path, s in S.items()}

    return score


def by_dense_gradient(net: Network, loss: Loss) -> Callable[..., ByLayer]:
    """RigL: |dL/dw| of every possible connection, a gradient of the size of the dense model."""

    def score(state: SparseState, batch: Any, S: ByLayer) -> ByLayer:
        value = lambda params: run_loss(net, loss, params, state, batch)[0]  # noqa: E731
        G = lax.pmean(kernels_of(jax.grad(value)(state.params), state.masks), AXIS)
        return {path: jnp.abs(G[path].ravel()[s]) for path, s in S.items()}

    return score


def by_gradient(net: Network, loss: Loss) -> Callable[..., ByLayer]:
    """Guided exploration: |dL/dw| of the connections in S, and of no others."""

    def score(state: SparseState, batch: Any, S: ByLayer) -> ByLayer:
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        G = lax.pmean(gradient_on(net.layers, value, S), AXIS)
        return {path: jnp.abs(G[path]) for path in S}

    return score


SCORES = {
    "chance": by_chance,
    "momentum": by_momentum,
    "dense gradient": by_dense_gradient,
    "gradient": by_gradient,
}


# ------------------------------------------------------------------------ one vector of all layers
def apart(net: Network, flat: Array) -> ByLayer:
    """The inverse of `join` for arrays in the kernels' shapes."""
    ends = np.cumsum([layer.size for layer in net.layers.values()])
    parts = jnp.split(flat, ends[:-1])
    return {
        path: part.reshape(layer.shape)
        for (path, layer), part in zip(net.layers.items(), parts, strict=True)
    }


def positions(net: Network, S: ByLayer) -> ByLayer:
    """Flat positions within a layer -> within the joined vector of all layers."""
    start = np.cumsum([0, *(layer.size for layer in net.layers.values())])
    return {path: S[path] + int(offset) for path, offset in zip(S, start[:-1], strict=True)}


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

    def rewire(state: SparseState, batch: Any):
        return step(state, split_batch(batch, devices), measure(state, batch))

    return rewire


def host_heuristic(net: Network, method: Method, loss: Loss) -> Callable[[SparseState, Any], Any]:
    """The heuristic's part that runs before the jitted step (SynFlow, in float64), else nothing."""
    if method.heuristic in ON_HOST:
        return HEURISTICS[method.heuristic](net, loss)
    return lambda state, batch: {}
