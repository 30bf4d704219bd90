"""The rewire step of sparse execution, Figure 1 of the paper: drop P, sample S, score S, grow G.

The choice is that of `dst.rewire`, but S is never held: candidates come a chunk at a time, are
scored, and only the best |P| so far are kept. Memory is O(K + units + a chunk); no array has the
size of a layer's dense kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dst.connections.arena import VALUES, Arena, Part
from dst.connections.backends import cpp as kernels
from dst.connections.hashing import hashed
from dst.connections.moments import recognise
from dst.connections.products import compiled, on_cpu
from dst.connections.select import (
    Found,
    best,
    bits,
    exchange,
    exists,
    hashes_of,
    lowest,
    nothing,
    protected,
    row_salts,
)
from dst.layers.base import Layer
from dst.methods.arrivals import Pairs
from dst.methods.candidates import as_chance
from dst.methods.heuristics import HEURISTICS, OBSERVED, ON_HOST
from dst.methods.plan import Plan, asked, floors, plan
from dst.methods.sample import Sampling, alike, fold_by_chance, fold_subset, hold_subset, sampling
from dst.methods.stream import strongest_missing
from dst.methods.table import Method
from dst.network import Network
from dst.observe import gradient_on, observe_and_sum
from dst.state import SparseState, active_counts
from dst.update import (
    AXIS,
    CHANCE_STREAM,
    REWIRE_STREAM,
    TIE_STREAM,
    Loss,
    all_finite,
    run_loss,
    stream,
)

Array = jax.Array


class Tally(NamedTuple):
    """What a rewire has found so far."""

    found: Found  # the best |P| candidates
    asked: Array  # int32 (), |S| that was asked for
    realised: Array  # int32 (), |S|
    finite: Array  # bool (), whether all scores were


def sparse_rewire_body(
    net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss
) -> Callable:
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    all_scored = method.score == "dense gradient"
    planned = plan(net, method)
    P_t, keep = planned.grown, floors(net, method)
    look = observer(net, method, loss)
    by_score = explorer if method.heuristic else by_chance
    explore = (streamer if all_scored else by_score)(net, method, planned, loss)

    def body(state: SparseState, batch: Any, fg: Any):
        event = planned.event(state.step)
        P = jnp.asarray(P_t)[event]
        salt = row_salts(state.masks, stream(state, TIE_STREAM))
        seen, fg = look(state, batch, fg)
        tally = explore(state, batch, seen, fg, event, salt)
        # With fewer candidates than |P_t| fewer are dropped, never more than can grow.
        k = (tally.found.score >= 0).sum(dtype=jnp.int32)
        arena, weights = state.masks, jnp.abs(state.params[VALUES]["kernel"])
        # What is not finite stays as it is; this also orders the check before the exchange, or XLA
        # would keep a copy of all weights for it.
        finite = tally.finite & all_finite((weights, fg))
        k = jnp.where(finite, jnp.minimum(k, P), 0)
        ties = lambda: hashes_of(arena, salt)  # noqa: E731
        loose = jnp.ones(weights.size, bool)
        if keep.any():
            loose = ~protected(arena, weights, keep.tolist(), ties)
            k = jnp.minimum(k, loose.sum(dtype=jnp.int32))
        grown = best(nothing(tally.found.row.size, weights.dtype), tally.found, k, salt)
        arena, source = exchange(arena, lowest(bits(weights), loose, k, ties), grown, k)
        state = reconnect(tx, state, arena, source)
        return state, report(state, k, tally, finite)

    return body


def twice(net: Network, method: Method) -> dict[str, Layer]:
    """Layers whose gradient on S takes a second pass, for their h and delta are too large to hold.

    Those are maps; GraEst and a streamed RigL have to hold all the same.
    """
    if not method.heuristic or method.heuristic == "graest":
        return {}
    return {path: layer for path, layer in net.layers.items() if layer.large}


def observer(net: Network, method: Method, loss: Loss) -> Callable:
    """look(state, batch, f x g) -> {path: (h, delta)}, {path: (f, g)}: one pass, none for SET."""
    scored = method.heuristic or method.score == "dense gradient"
    measure = HEURISTICS[method.heuristic or "uniform"](net, loss)
    later = twice(net, method)
    held = {path: layer for path, layer in net.layers.items() if scored and path not in later}
    summed = later if method.heuristic == "grabo" else {}

    def look(state: SparseState, batch: Any, fg: Any):
        value = lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]  # noqa: E731
        seen, sums = observe_and_sum(held, summed, value) if held or summed else ({}, {})
        if method.heuristic in OBSERVED:
            fg = {**OBSERVED[method.heuristic](net, state, seen), **lax.psum(sums, AXIS)}
        elif method.heuristic not in ON_HOST:
            fg = measure(state, batch)
        return seen, {path: fg[path] for path in net.layers} if fg else fg

    return look


# ------------------------------------------------------------- every inactive connection, or S
def streamer(net: Network, method: Method, planned: Plan, loss: Loss) -> Callable:
    """explore(state, batch, seen, fg, event, salt) -> Tally: RigL's choice, of all inactive."""

    def explore(state: SparseState, batch: Any, seen, fg, event: Array, salt: Array) -> Tally:
        values, P = state.params[VALUES]["kernel"], jnp.asarray(planned.grown)[event]
        empty = nothing(int(planned.grown.max()), values.dtype)
        found, finite = strongest_missing(state.masks, seen, empty, P, salt)
        inactive = jnp.int32(min(net.possible - values.size, 2**31 - 1))
        return Tally(found, inactive, inactive, finite)

    return explore


def explorer(net: Network, method: Method, planned: Plan, loss: Loss) -> Callable:
    """explore(state, batch, seen, fg, event, salt) -> Tally: the best |P| of S.

    Of maps S is held for a second pass, else never.
    """
    how, later = sampling(net, method, planned), twice(net, method)

    def explore(state: SparseState, batch: Any, seen, fg, event: Array, salt: Array) -> Tally:
        arena, P = state.masks, jnp.asarray(planned.grown)[event]
        wanted = asked(method, jnp.asarray(planned.subset)[event], arena.counts())
        empty = nothing(int(planned.grown.max()), state.params[VALUES]["kernel"].dtype)
        tally = Tally(empty, wanted.sum(), jnp.int32(0), jnp.bool_(True))
        S: dict[str, tuple[Array, Array]] = {}
        for group in alike(arena.parts):
            if arena.parts[group[0]].layer.path in later:
                S |= holding(state, how, group, fg, wanted)
            else:
                one = searching(state, how, group, seen, fg, wanted, P, salt)
                tally = lax.fori_loop(0, len(group), one, tally)
        if not S:
            return tally
        again = later_than(tally.realised + sum(count for _, count in S.values()), batch)
        value = lambda extra: run_loss(net, loss, state.params, state, again, extra)[0]  # noqa: E731
        G = lax.pmean(gradient_on(later, value, {path: s for path, (s, _) in S.items()}), AXIS)
        found, finite, realised = tally.found, tally.finite, tally.realised
        for part in arena.parts:
            if part.layer.path in later:
                held, count = S[part.layer.path]
                column, output = jnp.divmod(held, part.n_out)
                row = part.row(column, output) + part.first
                score = jnp.where(jnp.arange(held.size) < count, jnp.abs(G[part.layer.path]), -1)
                found, finite = ranked(found, finite, row, column, score, P, salt)
                realised += count
        return Tally(found, tally.asked, realised, finite)

    return explore


def later_than(first: Array, batch: Any) -> Any:
    """The batch, once `first` is there.

    Else XLA would see that the second pass begins as the first, and hold all maps between them.
    """
    wait = kernels.after if on_cpu() else lambda a, first: lax.optimization_barrier((a, first))[0]
    real = lambda a: jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: wait(a, first) if real(a) else a, batch)


def holding(
    state: SparseState, how: Sampling, group: list[int], fg, wanted: Array
) -> dict[str, tuple[Array, Array]]:
    """S_l of each layer of the group, and its size: {path: (flat positions (size,), int32 ())}."""
    arena, key = state.masks, stream(state, REWIRE_STREAM)
    parts = [arena.parts[l] for l in group]
    part, paths = parts[0], [part.layer.path for part in parts]
    index, firsts = jnp.array(group), jnp.array([p.first for p in parts], jnp.int32)

    def member(given: tuple) -> tuple[Array, Array]:
        l, first, f, g = given
        there, own = existing(arena, part, first), jax.random.fold_in(key, l)
        return hold_subset(how, group[0], part, own, (f, g), wanted[l], arena.counts()[l], there)

    f, g = (jnp.stack([fg[path][n] for path in paths]) for n in (0, 1))
    S, count = lax.map(member, (index, firsts, f, g))
    return {path: (S[m], count[m]) for m, path in enumerate(paths)}


def existing(arena: Arena, part: Part, first: Array) -> Callable[[Array, Array], Array]:
    """Whether a layer has (column, output): `part` is one of its shape, `first` its own row."""
    return lambda column, output: exists(
        arena, part.block, part.row(column, output) + first, column
    )


def ranked(
    found: Found, finite: Array, row: Array, column: Array, score: Array, P: Array, salt: Array
) -> tuple[Found, Array]:
    """The best so far with these among them, and whether all scores were finite; -1 is none."""
    new = Found(row, column, score.astype(found.score.dtype))
    return best(found, new, P, salt), finite & jnp.isfinite(score).all()


def searching(
    state: SparseState, how: Sampling, group: list[int], seen, fg, wanted, P: Array, salt: Array
) -> Callable[[Array, Tally], Tally]:
    """(m, tally) -> tally: S_l of the group's m-th layer scored, its best among those so far."""
    arena, key = state.masks, stream(state, REWIRE_STREAM)
    parts = [arena.parts[l] for l in group]
    part, paths = parts[0], [part.layer.path for part in parts]
    f, g = (jnp.stack([fg[path][n] for path in paths]) for n in (0, 1))
    firsts, index = jnp.array([p.first for p in parts], jnp.int32), jnp.array(group, jnp.int32)
    scores = [scorer(p, seen[path]) for p, path in zip(parts, paths, strict=True)]

    def member(m: Array, tally: Tally) -> Tally:
        l, first = index[m], firsts[m]

        def visit(carry: tuple[Found, Array], pairs: Pairs, chosen: Array):
            score = jnp.where(chosen, lax.switch(m, scores, pairs.column, pairs.output), -1)
            row = part.row(pairs.column, pairs.output) + first
            return ranked(*carry, row, pairs.column, score, P, salt)

        (found, finite), count = fold_subset(
            how,
            group[0],
            part,
            jax.random.fold_in(key, l),
            (f[m], g[m]),
            wanted[l],
            arena.counts()[l],
            existing(arena, part, first),
            visit,
            (tally.found, tally.finite),
        )
        return Tally(found, tally.asked, tally.realised + count, finite)

    return member


def by_chance(net: Network, method: Method, planned: Plan, loss: Loss) -> Callable:
    """explore(state, batch, seen, fg, event, salt) -> Tally: SET's |P|, by chance."""
    how, most = sampling(net, method, planned), max(1, int(planned.grown.max()))

    def explore(state: SparseState, batch: Any, seen, fg, event: Array, salt: Array) -> Tally:
        arena, P = state.masks, jnp.asarray(planned.grown)[event]
        first, block, n_out = (
            jnp.array(a, jnp.int32)
            for a in zip(*((p.first, p.block, p.n_out) for p in arena.parts), strict=True)
        )
        longest = max(part.block for part in arena.parts)
        chances = row_salts(arena, stream(state, CHANCE_STREAM))

        def row(l: Array, column: Array, output: Array) -> Array:
            return first[l] + column // block[l] * n_out[l] + output

        def there(l: Array, column: Array, output: Array) -> Array:
            return exists(arena, longest, row(l, column, output), column)

        def visit(found: Found, pairs: Pairs, chosen: Array) -> Found:
            rows = row(pairs.l, pairs.column, pairs.output)
            score = as_chance(hashed(chances[rows], pairs.column)).astype(found.score.dtype)
            new = Found(rows, pairs.column, jnp.where(chosen, score, -1))
            return best(found, new, P, salt)

        empty = nothing(most, state.params[VALUES]["kernel"].dtype)
        groups, key = alike(arena.parts), stream(state, REWIRE_STREAM)
        K = jnp.int32(arena.column.size)
        found, count = fold_by_chance(
            how.chunk, most, groups, arena.parts, key, P, K, there, visit, empty
        )
        return Tally(found, P, count, jnp.bool_(True))

    return explore


def scorer(part: Part, units: tuple[Array, Array]) -> Callable[[Array, Array], Array]:
    """|dL/dw| of candidates (column, output), from h and delta."""
    h, delta = units

    def score(column: Array, output: Array) -> Array:
        if part.layer.matrix and compiled(h) and compiled(delta):
            G = kernels.gradient_on(column, output, h, delta)
        else:
            G = part.layer.gradient_at(h, delta, column, output)
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


def report(state: SparseState, k: Array, tally: Tally, finite: Array):
    """What a rewire did, for the log, as in masked execution."""
    parts = state.masks.parts
    return {
        "pruned": k,
        "grown": k,
        "subset_asked": tally.asked,
        "subset_realised": tally.realised,
        "active": active_counts(state.masks),
        "dead_units": {part.layer.path: state.masks.dead_units(part) for part in parts},
        "finite": finite,
    }
