"""Guided exploration: S is drawn from f x g, scored by the gradient on S, and the best |P| kept.

S is drawn a chunk at a time and never held, where a layer's h and delta can be: its candidates are
then scored as they come. Otherwise, where h and delta are maps and too large, or where memory of
every possible connection is there anyway, S is held for a second pass, whose cotangents are the
gradient on S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dst.axis import AXIS
from dst.connections.backends import cpp as kernels
from dst.connections.backends.dispatch import compiled, on_cpu
from dst.connections.base import Candidates, Connections, Part, table
from dst.layers.base import Layer
from dst.loss import Loss, run_loss
from dst.methods.arrivals import Pairs
from dst.methods.base import Method
from dst.methods.candidates import Sample, Source, quota
from dst.methods.heuristics import HEURISTICS, look
from dst.methods.plan import Plan, asked, plan
from dst.methods.quota import Quota
from dst.methods.sample import Sampling, fold_subset, group_by_shape, hold_subset, sampling
from dst.network import Network
from dst.observe import gradient_on
from dst.state import REWIRE_STREAM, SparseState, stream
from dst.update import all_finite

Array = jax.Array
Layers = Mapping[str, Layer]
Marginals = Mapping[str, tuple[Array, Array]]
Held = dict[str, tuple[Array, Array]]  # of each layer S_l, flat positions, and its size


def magnitude(layer: Layer, G: Array) -> Array:
    """|dL/dw|, the paper's score of a candidate."""
    return jnp.abs(G)


def on_subset(
    net: Network,
    method: Method,
    planned: Plan,
    loss: Loss,
    score: Callable[[Layer, Array], Array] = magnitude,
) -> Source:
    """S: |S_l| distinct inactive connections of each layer, of which the best |P| are found.

    `score(layer, G)` of their gradients: float (n,) -> (n,), >= 0.
    """
    how = sampling(net, method, planned)

    def sample(state: SparseState, batch: Any, fg: Any, event: Array, salt: Array) -> Sample:
        A = state.masks
        later = scored_later(net, method, A)

        def value(batch: Any) -> Callable:
            return lambda extra: run_loss(net, loss, state.params, state, batch, extra)[0]

        seen, fg = observed(net, method, state, later, value(batch), fg)
        held = quota(net, method, planned, event, salt).at_most(sum(how.sizes))
        wanted = asked(method, jnp.asarray(planned.subset)[event], A.counts())
        found = held.empty(A.weights(state.params).dtype)
        search = Search(score, state, how, seen, fg, wanted, held)
        tally = Sample(found, wanted.sum(), jnp.int32(0), all_finite(fg))
        S: Held = {}
        for group in group_by_shape(A.parts):
            if A.parts[group[0]].layer.path in later:
                S |= hold(how, A, search.key, group, fg, wanted)
            else:
                tally = lax.fori_loop(0, len(group), search.score(group), tally)
        if not S:
            return tally
        realised = tally.realised + sum(count for _, count in S.values())
        again = batch if A.every_possible else later_than(realised, batch)
        positions = {path: position for path, (position, _) in S.items()}
        G = lax.pmean(gradient_on(later, value(again), positions), AXIS)
        return search.rank(tally._replace(realised=realised), S, G)

    return sample


def drawing(net: Network, method: Method) -> Callable:
    """`draw(key, A, f x g, event)`: S_l of each layer and its size, held: {path: (S_l, |S_l|)}."""
    planned = plan(net, method)
    how = sampling(net, method, planned)

    def draw(key: Array, A: Connections, fg: Marginals, event: Array) -> Held:
        wanted = asked(method, jnp.asarray(planned.subset)[event], A.counts())
        S: Held = {}
        for group in group_by_shape(A.parts):
            S |= hold(how, A, key, group, fg, wanted)
        return {path: S[path] for path in net.layers}

    return draw


def hold(
    how: Sampling, A: Connections, key: Array, group: list[int], fg: Marginals, wanted: Array
) -> Held:
    """S_l of each layer of a group, flat positions int32 (size,), and how many there are."""
    part, paths, index, f, g = of_group(A, fg, group)

    def member(given: tuple) -> tuple[Array, Array]:
        l, f, g = given
        there = lambda column, output: A.find(l, column, output, part)  # noqa: E731
        own, active = jax.random.fold_in(key, l), A.counts()[l]
        return hold_subset(how, group[0], part, own, (f, g), wanted[l], active, there)

    S, count = lax.map(member, (index, f, g))
    return {path: (S[m], count[m]) for m, path in enumerate(paths)}


def of_group(
    A: Connections, fg: Marginals, group: list[int]
) -> tuple[Part, list[str], Array, Array, Array]:
    """A part of the group's shape; paths, indices int32 (L',), f and g (L', n) of its layers."""
    paths = [A.parts[l].layer.path for l in group]
    f, g = (jnp.stack([fg[path][n] for path in paths]) for n in (0, 1))
    return A.parts[group[0]], paths, jnp.array(group, jnp.int32), f, g


def scored_later(net: Network, method: Method, A: Connections) -> Layers:
    """Layers whose S is held, and whose gradient on S takes a second pass.

    Sketches hold h and delta of all layers, which then score S without another pass.
    """
    if A.every_possible:
        return net.layers
    if HEURISTICS[method.heuristic].holds:
        return {}
    return {path: layer for path, layer in net.layers.items() if layer.large}


def observed(
    net: Network, method: Method, state: SparseState, later: Layers, value: Callable, fg: Any
) -> tuple[Mapping[str, tuple[Array, Array]], Marginals]:
    """h and delta of the layers that are held, and f x g: one pass, or none."""
    heuristic = HEURISTICS[method.heuristic]
    held = {p: layer for p, layer in net.layers.items() if heuristic.holds or p not in later}
    summed = {p: layer for p, layer in later.items() if heuristic.sums and p not in held}
    seen = look(held, summed, value, state)
    fg = heuristic.measure(net, state, seen) if heuristic.measure else fg
    return seen.units, {path: fg[path] for path in net.layers}


def later_than(first: Array, batch: Any) -> Any:
    """The batch, once `first` is there.

    Else XLA would see that the second pass begins as the first, and hold all maps between them.
    """
    wait = kernels.after if on_cpu() else lambda a, first: lax.optimization_barrier((a, first))[0]
    real = lambda a: jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: wait(a, first) if real(a) else a, batch)


class Search:
    """One rewire's search for the best of S, a group of layers of one shape at a time."""

    def __init__(
        self,
        score: Callable[[Layer, Array], Array],
        state: SparseState,
        how: Sampling,
        units: Mapping[str, tuple[Array, Array]],
        fg: Marginals,
        wanted: Array,
        held: Quota,
    ):
        self.A, self.key = state.masks, stream(state, REWIRE_STREAM)
        self.how, self.units, self.fg, self.wanted = how, units, fg, wanted
        self.held, self.score_of = held, score

    def score(self, group: list[int]) -> Callable[[Array, Sample], Sample]:
        """(m, tally) -> tally: S_l of the m-th layer scored, the best of it among those so far."""
        part, paths, index, f, g = of_group(self.A, self.fg, group)
        firsts = table([self.A.parts[l] for l in group], "first")
        scores = [
            scorer(self.score_of, self.A.parts[l], self.units[path])
            for l, path in zip(group, paths, strict=True)
        ]

        def member(m: Array, tally: Sample) -> Sample:
            l, first = index[m], firsts[m]

            def visit(carry: tuple[Candidates, Array], pairs: Pairs, chosen: Array):
                score = lax.switch(m, scores, pairs.column, pairs.output)
                row = part.row(pairs.column, pairs.output) + first
                return self._ranked(*carry, l, row, pairs.column, score, chosen)

            (found, finite), count = fold_subset(
                self.how,
                group[0],
                part,
                jax.random.fold_in(self.key, l),
                (f[m], g[m]),
                self.wanted[l],
                self.A.counts()[l],
                lambda column, output: self.A.find(l, column, output, part),
                visit,
                (tally.found, tally.finite),
            )
            return Sample(found, tally.asked, tally.realised + count, finite)

        return member

    def rank(self, tally: Sample, S: Mapping[str, tuple[Array, Array]], G: Any) -> Sample:
        """The best of what is held among those so far, by the gradients on it."""
        lists: list[tuple[int, tuple[Array, ...]]] = []
        for l, part in enumerate(self.A.parts):
            if part.layer.path in S:
                position, count = S[part.layer.path]
                column, output = jnp.divmod(position, part.n_out)
                row = part.row(column, output) + part.first
                score = self.score_of(part.layer, G[part.layer.path])
                lists.append((l, (row, column, score, jnp.arange(position.size) < count)))
        if not self.held.by_layer:  # all at once
            columns = zip(*(listed for _, listed in lists), strict=True)
            lists = [(0, tuple(jnp.concatenate(column) for column in columns))]
        found, finite = tally.found, tally.finite
        for l, listed in lists:
            found, finite = self._ranked(found, finite, l, *listed)
        return tally._replace(found=found, finite=finite)

    def _ranked(
        self,
        found: Candidates,
        finite: Array,
        l: Array | int,
        row: Array,
        column: Array,
        score: Array,
        S: Array,
    ) -> tuple[Candidates, Array]:
        """The best with those in S among them, and whether all scores were finite and >= 0.

        `l` is their layer, where each has a part of the list.
        """
        right = jnp.isfinite(score) & (score >= 0)
        new = Candidates(row, column, jnp.where(S & right, score, -1).astype(found.score.dtype))
        return self.held.best(found, new, l), finite & (right | ~S).all()


def scorer(
    score_of: Callable[[Layer, Array], Array], part: Part, units: tuple[Array, Array]
) -> Callable[[Array, Array], Array]:
    """The score of candidates (column, output), from h and delta."""
    h, delta = units

    def score(column: Array, output: Array) -> Array:
        if part.layer.matrix and compiled(h) and compiled(delta):
            G = kernels.gradient_on(column, output, h, delta)
        else:
            G = part.layer.gradient_at(h, delta, column, output)
        return score_of(part.layer, lax.pmean(G, AXIS))

    return score
