"""The rewire step, Figure 1 of the paper: drop P, sample S, score S, grow G.

SET, RigL and guided stochastic exploration are this one step. They differ in where the candidates
come from (`everything`, or a sample S from f x g) and in how these are scored (`by_chance`, by the
dense gradient, by the gradient on S).

A, the active connections, are the masks; |A| = K never changes. Candidates are flat positions in
one vector over all layers, so that the weakest are dropped and the best grown globally.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst.config import ConfigError
from dst.explore import sparse_rewire_body
from dst.heuristics import HEURISTICS, ON_HOST
from dst.masks import active_count, dead_units
from dst.methods import Method
from dst.moments import recognise, reset_inactive
from dst.network import Network
from dst.plan import floors, plan
from dst.probes import gradient_on
from dst.sample import draw_subset
from dst.state import SparseState, kernels_of
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


# ------------------------------------------------------------------------------ the step, Figure 1
def rewire_body(net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss):
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    if not method.grows:
        raise ConfigError(f"method is {method.name!r}, whose connections never move.")
    if net.execution == "sparse":
        return sparse_rewire_body(net, tx, method, loss)
    P_t, S_t = plan(net, method)
    P_max, S_max = int(P_t[0]), S_t[0]
    choose = subset(net, method, loss) if method.heuristic else everything
    score = SCORES[method.score](net, loss)

    def body(state: SparseState, batch: Any, fg: Any):
        event = jnp.clip(state.step // method.every - 1, 0, len(P_t) - 1)
        asked = jnp.asarray(S_t)[event]
        # The gradient is taken before the drop; P and G are disjoint: S holds inactive ones only.
        S, valid = choose(state, batch, fg, asked, S_max)
        scores = score(state, batch, S)
        finite = all_finite((scores, kernels_of(state.params, state.masks)))
        best = jnp.where(join(valid), join(scores), -jnp.inf)
        # With fewer candidates than |P_t| fewer are dropped, never more than can grow.
        k = jnp.minimum(jnp.asarray(P_t)[event], jnp.isfinite(best).sum(dtype=jnp.int32))
        A, w = join(state.masks), join(kernels_of(state.params, state.masks))
        if method.floor:
            w, k = protect(floors(net, method), state, k)
        survivors, A = exchange(A, w, join(positions(net, S)), best, k, P_max)
        state = reconnect(tx, state, apart(net, A), apart(net, survivors))
        return state, report(state, k, asked if method.heuristic else None, valid, finite)

    return body


def protect(keep: np.ndarray, state: SparseState, k: Array) -> tuple[Array, Array]:
    """The weights, infinite for the keep[l] strongest of layer l, and k, at most the other ones.

    Shapes: keep (L,), weights (N,), k int32 (). Of equals the first in layer order is kept.
    """
    weights, others = {}, jnp.int32(0)
    for n, (path, w) in zip(keep, kernels_of(state.params, state.masks).items(), strict=True):
        mask = state.masks[path].ravel()
        _, strongest = lax.top_k(jnp.where(mask, jnp.abs(w.ravel()), -jnp.inf), int(n))
        weights[path] = w.ravel().at[strongest].set(jnp.inf)
        others += jnp.maximum(mask.sum(dtype=jnp.int32) - int(n), 0)
    return join(weights), jnp.minimum(k, others)


def exchange(A: Array, w: Array, S: Array, score: Array, k: Array, size: int):
    """Drop the k weakest of A, grow the k best of S: (A without P, A without P and with G).

    Shapes: A bool (N,), w (N,), S int32 (|S|,) positions in A, score (|S|,), k <= size int32 ().
    Both choices are global, by stable rank: of equals the first in layer order.
    """
    P = top(jnp.where(A, -jnp.abs(w), -jnp.inf), size, k, A.size)
    G = jnp.append(S, A.size)[top(score, size, k, S.size)]
    survivors = A.at[P].set(False, mode="drop")
    return survivors, survivors.at[G].set(True, mode="drop")


def top(score: Array, size: int, k: Array, nowhere: int) -> Array:
    """Positions of the k largest of `score` in static shape: `nowhere` from rank k on."""
    _, index = lax.top_k(score, min(size, score.size))
    return jnp.where(jnp.arange(index.size) < k, index, nowhere)


def reconnect(tx, state: SparseState, masks: ByLayer, survivors: ByLayer) -> SparseState:
    """New masks; weights and moments of dropped and grown connections start over at 0."""
    owners = recognise(state.opt_state, state.params, masks)
    params = mask_kernels(state.params, survivors)
    opt_state = reset_inactive(state.opt_state, tx.init(params), owners, survivors)
    return state.replace(params=params, opt_state=opt_state, masks=masks)


def report(state: SparseState, k: Array, asked: Array | None, valid: ByLayer, finite: Array):
    """What a rewire did, for the log: |P| = |G|, |S| asked and realised, each layer's counts.

    Where all inactive connections are candidates, `asked` is None and S is all of them.
    """
    realised = sum(v.sum(dtype=jnp.int32) for v in valid.values())
    return {
        "pruned": k,
        "grown": k,
        "subset_asked": realised if asked is None else asked.sum(),
        "subset_realised": realised,
        "active": {path: m.sum(dtype=jnp.int32) for path, m in state.masks.items()},
        "dead_units": {path: dead_units(m) for path, m in state.masks.items()},
        "finite": finite,
    }


# ---------------------------------------------------------------------- where candidates come from
def everything(state: SparseState, batch, fg, asked, S_max) -> tuple[ByLayer, ByLayer]:
    """Every inactive connection: all positions, valid where the mask is not."""
    S = {path: jnp.arange(mask.size, dtype=jnp.int32) for path, mask in state.masks.items()}
    return S, {path: ~mask.ravel() for path, mask in state.masks.items()}


def subset(net: Network, method: Method, loss: Loss) -> Callable:
    """S: |S_l| distinct inactive connections of each layer, drawn from f x g of the heuristic."""
    measure = HEURISTICS[method.heuristic](net, loss)
    K = active_count(net.possible, method.sparsity)

    # Layers of one shape are drawn by one vmapped sampler: ResNet-56 compiles 7 of them, not 57.
    alike: dict[tuple[int, ...], list[int]] = {}
    for l, layer in enumerate(net.layers.values()):
        alike.setdefault(layer.shape, []).append(l)

    def choose(state: SparseState, batch, fg, asked, S_max) -> tuple[ByLayer, ByLayer]:
        fg = fg if method.heuristic in ON_HOST else measure(state, batch)
        key, paths = stream(state, REWIRE_STREAM), list(net.layers)
        S, valid = {}, {}
        for group in alike.values():
            size = max(1, int(S_max[group].max()))
            exhaustible = size >= net.layers[paths[group[0]]].size - K
            draw = functools.partial(
                draw_subset, size=size, rounds=method.rounds, exhaustible=exhaustible
            )
            f, g, masks = (
                jnp.stack([column[paths[l]] for l in group])
                for column in (*_columns(fg), state.masks)
            )
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(group))
            drawn = jax.vmap(draw)(keys, f, g, masks, asked[jnp.asarray(group)])
            for i, l in enumerate(group):
                S[paths[l]], valid[paths[l]] = drawn[0][i], drawn[1][i]
        return {p: S[p] for p in paths}, {p: valid[p] for p in paths}

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


SCORES = {"chance": by_chance, "dense gradient": by_dense_gradient, "gradient": by_gradient}


# ------------------------------------------------------------------------ one vector of all layers
def join(by_layer: ByLayer) -> Array:
    """All layers' entries in one vector, in layer order."""
    return jnp.concatenate([leaf.ravel() for leaf in by_layer.values()])


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
