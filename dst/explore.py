"""The rewire step of sparse execution, Figure 1 of the paper: drop P, sample S, score S, grow G.

The choice is that of `dst.rewire`, but S is never held: candidates are drawn a chunk at a time,
those that exist or come twice are thrown away, the rest are scored, and only the best |P| so far
are kept. Memory is O(K + units + a chunk); no array has the size of a layer's dense kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst import kernels
from dst.arena import VALUES, Arena, Part
from dst.config import ConfigError
from dst.heuristics import HEURISTICS, OBSERVED, ON_HOST
from dst.methods import Method
from dst.moments import recognise
from dst.network import Network
from dst.plan import floors, plan
from dst.probes import gradient_at, observe
from dst.products import compiled
from dst.sample import draw_pairs, draw_units
from dst.select import Found, best, bits, exchange, locate, lowest, nothing, protected
from dst.state import SparseState, active_counts
from dst.stream import strongest_missing
from dst.update import AXIS, REWIRE_STREAM, Loss, all_finite, run_loss, stream

Array = jax.Array

# Candidates drawn at a time: half of |P|, so that drawing takes less memory than what exists.
LEAST, MOST = 2**12, 2**20
UNTIL_DONE = 1000  # rounds, of which even a half dense network needs but a few


class Tally(NamedTuple):
    """What a rewire has found so far."""

    found: Found  # the best |P| candidates
    left: Array  # candidates still to draw: int32 (L,) of each layer, or () of the network
    realised: Array  # int32 (), inactive candidates scored, distinct at least in their chunk
    finite: Array  # bool (), whether all their scores were


def sparse_rewire_body(
    net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss
) -> Callable:
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    all_scored = method.score == "dense gradient"
    if all_scored and method.growth_memory == "dense":
        raise ConfigError(
            f"method is {method.name!r}, which needs the gradient of every possible connection; "
            "execution 'sparse' allows it a block at a time, with growth_memory='streamed'."
        )
    planned = plan(net, method)
    P_t, S_t = planned.grown, planned.subset
    keep = floors(net, method)
    look = observer(net, method, loss)
    explore = streamer(net, P_t) if all_scored else explorer(net, method, P_t, S_t)

    def body(state: SparseState, batch: Any, fg: Any):
        event = planned.event(state.step)
        P = jnp.asarray(P_t)[event]
        asked = jnp.asarray(S_t)[event] if method.heuristic else P
        seen, fg = look(state, batch, fg)
        tally = explore(state, seen, fg, asked, P)
        # With fewer candidates than |P_t| fewer are dropped, never more than can grow.
        k = (tally.found.score >= 0).sum(dtype=jnp.int32)
        arena, weights = state.masks, jnp.abs(state.params[VALUES]["kernel"])
        # What is not finite stays as it is; this also orders the check before the exchange, or XLA
        # would keep a copy of all weights for it.
        finite = tally.finite & all_finite((weights, fg))
        k = jnp.where(finite, k, 0)
        loose = jnp.ones(weights.size, bool)
        if keep.any():
            loose = ~protected(arena, weights, keep.tolist())
            k = jnp.minimum(k, loose.sum(dtype=jnp.int32))
        grown = best(nothing(tally.found.row.size, weights.dtype), tally.found, k)
        arena, source = exchange(arena, lowest(bits(weights), loose, k), grown, k)
        state = reconnect(tx, state, arena, source)
        return state, report(state, k, tally.realised if all_scored else asked, tally, finite)

    return body


def observer(net: Network, method: Method, loss: Loss) -> Callable:
    """look(state, batch, f x g) -> {path: (h, delta)}, {path: (f, g)}: one pass, none for SET."""
    scored = method.heuristic or method.score == "dense gradient"
    measure = HEURISTICS[method.heuristic or "uniform"](net, loss)

    def look(state: SparseState, batch: Any, fg: Any):
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        seen = observe(net.layers, value) if scored else {}
        if method.heuristic in OBSERVED:
            fg = OBSERVED[method.heuristic](net, state, seen)
        elif method.heuristic not in ON_HOST:
            fg = measure(state, batch)
        return seen, fg

    return look


# ------------------------------------------------------------- every inactive connection, or S
def streamer(net: Network, P_t: np.ndarray) -> Callable:
    """explore(state, seen, fg, asked, P) -> Tally: RigL's choice, the P best of all inactive."""

    def explore(state: SparseState, seen, fg, asked: Array, P: Array) -> Tally:
        values = state.params[VALUES]["kernel"]
        found, finite = strongest_missing(state.masks, seen, nothing(int(P_t[0]), values.dtype), P)
        inactive = min(net.possible - values.size, 2**31 - 1)
        return Tally(found, jnp.int32(0), jnp.int32(inactive), finite)

    return explore


def explorer(net: Network, method: Method, P_t: np.ndarray, S_t: np.ndarray) -> Callable:
    """explore(state, seen, fg, asked, P) -> Tally: the P best of S, in `method.rounds` rounds.

    `asked` is |S_l| of each layer (L,); for SET it is P of the whole network, (). What a round
    draws in vain, because it is active or was drawn before, the next draws again. SET goes on
    until it has P, which is then a uniform choice from all inactive connections.
    """
    rounds = method.rounds if method.heuristic else UNTIL_DONE
    sizes = np.array([layer.size for layer in net.layers.values()], np.float64)
    most = int(P_t[0])
    chunk = int(np.clip(most // 2, LEAST, MOST))

    def explore(state: SparseState, seen, fg, asked: Array, P: Array) -> Tally:
        arena, key = state.masks, stream(state, REWIRE_STREAM)
        groups = alike(arena.parts)
        left = asked
        if method.heuristic:
            possible = np.minimum(sizes, 2.0**31 - 1).astype(np.int32)
            left = jnp.minimum(asked, possible - arena.counts())

        def one_round(carry):
            i, tally = carry
            round_key, want = jax.random.fold_in(key, i), tally.left
            if not method.heuristic:
                want = _split(round_key, tally.left, sizes, most)
            for group in groups:
                size = max(1, min(chunk, int(S_t[0][group].max()) if method.heuristic else most))
                tally = search(arena, group, seen, fg, size, P, round_key, want, tally)
            return i + 1, tally

        dtype = state.params[VALUES]["kernel"].dtype
        tally = Tally(nothing(most, dtype), left, jnp.int32(0), jnp.bool_(True))
        more = lambda carry: (carry[0] < rounds) & (carry[1].left > 0).any()  # noqa: E731
        return lax.while_loop(more, one_round, (jnp.int32(0), tally))[1]

    return explore


def _split(key: Array, draws: Array, sizes: np.ndarray, most: int) -> Array:
    """How many of `draws` uniform draws fall into each layer: int32 (), (L,) -> int32 (L,)."""
    layer = draw_units(key, jnp.asarray(sizes / sizes.sum(), jnp.float32), most)
    layer = jnp.where(jnp.arange(most) < draws, layer, sizes.size)
    return jnp.zeros(sizes.size, jnp.int32).at[layer].add(1, mode="drop")


def alike(parts: tuple[Part, ...]) -> list[list[int]]:
    """Layers of one shape share one compiled search: ResNet-56 has 7 of them, not 57."""
    groups: dict[Any, list[int]] = {}
    for l, part in enumerate(parts):
        groups.setdefault((part.layer.shape, part.block), []).append(l)
    return list(groups.values())


def search(
    arena: Arena, group: list[int], seen, fg, size: int, P: Array, key: Array, want: Array, tally
) -> Tally:
    """Draws want[l] candidates in each layer l of the group, `size` at a time, into the tally."""
    parts = [arena.parts[l] for l in group]
    part, paths = parts[0], [p.layer.path for p in parts]
    f, g = (jnp.stack([fg[path][n] for path in paths]) for n in (0, 1))
    firsts = jnp.array([p.first for p in parts], jnp.int32)
    index = jnp.array(group, jnp.int32)
    scores = [scorer(p, seen.get(path)) for p, path in zip(parts, paths, strict=True)]

    def member(m, tally: Tally) -> Tally:
        l = index[m]

        def chunk(t, tally: Tally) -> Tally:
            drawn = jax.random.fold_in(jax.random.fold_in(key, l), t)
            row, column = draw_rows(part, drawn, f[m], g[m], size, want[l] - t * size)
            inside = row < part.rows
            again = (row[1:] == row[:-1]) & (column[1:] == column[:-1])
            row = jnp.where(inside, row, 0)
            _, active = locate(arena, part, row + firsts[m], column)
            valid = inside & ~active & ~jnp.append(jnp.zeros(1, bool), again)
            score = lax.switch(m, scores, column, row % part.n_out)
            score = jnp.where(valid, score.astype(tally.found.score.dtype), -1)
            found = best(tally.found, Found(row + firsts[m], column, score), P)
            # As long as there is room for all, what a chunk draws again is known and not counted.
            held = (found.score >= 0).sum(dtype=jnp.int32)
            more = held - (tally.found.score >= 0).sum(dtype=jnp.int32)
            count = jnp.where(held < P, more, valid.sum(dtype=jnp.int32))
            left = tally.left.at[l].add(-count) if tally.left.ndim else P - held
            finite = tally.finite & jnp.isfinite(score).all()
            return Tally(found, left, tally.realised + count, finite)

        return lax.fori_loop(0, -(-want[l] // size), chunk, tally)

    return lax.fori_loop(0, len(group), member, tally)


def draw_rows(part: Part, key: Array, f: Array, g: Array, size: int, want: Array):
    """Rows within the layer and columns of `want` of `size` draws from f x g, sorted; int32.

    The row of what is not wanted is `part.rows`.
    """
    column, output = draw_pairs(key, f, g, part.layer.shape, size)
    wanted = (jnp.arange(size) < want) & (f.max() > 0) & (g.max() > 0)
    row = jnp.where(wanted, column // part.block * part.n_out + output, part.rows)
    if part.rows * part.block > 2**32:
        return lax.sort((row, column), num_keys=2, is_stable=False)
    # One unsigned number for both sorts several times faster than two. The highest stands for what
    # is not wanted; of a layer of exactly 2^32 connections the very last is then never drawn.
    block, last = np.uint32(part.block), np.uint32(2**32 - 1)
    both = row.astype(jnp.uint32) * block + (column % part.block).astype(jnp.uint32)
    both = lax.sort(jnp.where(wanted, both, last), is_stable=False)
    row = jnp.where(both == last, part.rows, (both // block).astype(jnp.int32))
    return row, (both % block).astype(jnp.int32) + row // part.n_out * part.block


def scorer(part: Part, units: tuple[Array, Array] | None) -> Callable[[Array, Array], Array]:
    """|dL/dw| of candidates (column, output); without h and delta, for SET, all score alike."""

    def score(column: Array, output: Array) -> Array:
        if units is None:
            return jnp.ones(column.size)
        h, delta = units
        if part.layer.kind == "dense" and compiled(h) and compiled(delta):
            G = kernels.gradient_on(column, output, h, delta)
        else:
            G = gradient_at(part.layer, h, delta, column, output)
        return jnp.abs(lax.pmean(G, AXIS))

    return score


# --------------------------------------------------------------------------------------- drop, grow
def reconnect(tx, state: SparseState, arena: Arena, source: Array) -> SparseState:
    """Values and moments follow their connections; those of grown ones start over."""
    values = state.params[VALUES]["kernel"]
    owners = recognise(state.opt_state, state.params, {VALUES: values})

    def moved(leaf: Array, start: Array) -> Array:
        in_place = compiled(leaf)
        stays = kernels.move(leaf, source) if in_place else leaf[jnp.maximum(source, 0)]
        return jnp.where(source < 0, start, stays)

    params = {**state.params, VALUES: {"kernel": moved(values, jnp.zeros((), values.dtype))}}
    leaves, tree = jax.tree.flatten(state.opt_state)
    starts = jax.tree.leaves(tx.init(params))
    leaves = [
        moved(leaf, start) if owner else leaf
        for leaf, start, owner in zip(leaves, starts, owners, strict=True)
    ]
    return state.replace(params=params, opt_state=jax.tree.unflatten(tree, leaves), masks=arena)


def report(state: SparseState, k: Array, asked: Array, tally: Tally, finite: Array):
    """What a rewire did, for the log, as in masked execution."""
    parts = state.masks.parts
    return {
        "pruned": k,
        "grown": k,
        "subset_asked": asked.sum(),
        "subset_realised": tally.realised,
        "active": active_counts(state.masks),
        "dead_units": {part.layer.path: state.masks.dead_units(part) for part in parts},
        "finite": finite,
    }
