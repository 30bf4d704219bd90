"""Where candidates to grow come from, and how they are scored: S of Figure 1.

Everything inactive, or a sample S from f x g; by chance, by momentum, by the dense gradient, whole
or streamed, or by the gradient on S. Positions are flat, in one vector over all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.arena import Part
from dst.connections.hashing import hashes_at, hashes_of_layer
from dst.methods.heuristics import HEURISTICS, ON_HOST
from dst.methods.plan import asked, plan
from dst.methods.sample import Sampling, alike, fold_by_chance, held, hold_subset, sampling
from dst.methods.stream import streamed_choice
from dst.methods.table import Method
from dst.network import Network
from dst.observe import gradient_on
from dst.state import SparseState, active_counts, join, kernels_of
from dst.update import (
    AXIS,
    CHANCE_STREAM,
    REWIRE_STREAM,
    Loss,
    all_finite,
    run_loss,
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


# ---------------------------------------------------------------------- where candidates come from
def candidates(net: Network, method: Method, loss: Loss) -> Callable[..., Candidates]:
    """S and its scores, of the method: (state, batch, f x g, event) -> Candidates."""
    if not method.score:
        return nothing
    if method.growth_memory == "streamed":
        return streamed(net, loss, int(plan(net, method).grown.max()))
    if method.score == "chance" and method.drop == "magnitude":
        return chance_subset(net, method)
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
    measure, draw = HEURISTICS[method.heuristic](net, loss), drawing(net, method)

    def choose(state: SparseState, batch, fg, event) -> tuple[ByLayer, ByLayer, Array]:
        fg = fg if method.heuristic in ON_HOST else measure(state, batch)
        return draw(stream(state, REWIRE_STREAM), state.masks, fg, event)

    return choose


def drawing(net: Network, method: Method) -> Callable:
    """`draw(key, masks, f x g, event)`: S of each layer, which of it counts, |S| asked for."""
    planned = plan(net, method)
    how, parts = sampling(net, method, planned), parts_of(net)

    def draw(key: Array, masks: ByLayer, fg, event) -> tuple[ByLayer, ByLayer, Array]:
        paths = list(net.layers)
        active = jnp.stack([*active_counts(masks).values()])
        wanted = asked(method, jnp.asarray(planned.subset)[event], active)
        S, valid = {}, {}
        for group in alike(parts):
            first = group[0]
            draw_one = functools.partial(_drawn, how, first, parts[first])
            given = [jnp.stack([a[paths[l]] for l in group]) for a in (*_columns(fg), masks)]
            index = jnp.asarray(group)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
            drawn = lax.map(draw_one, (keys, *given, wanted[index], active[index]))
            for i, l in enumerate(group):
                S[paths[l]], valid[paths[l]] = drawn[0][i], drawn[1][i]
        return {p: S[p] for p in paths}, {p: valid[p] for p in paths}, wanted.sum()

    return draw


def _drawn(how: Sampling, l: int, part: Part, given: tuple) -> tuple[Array, Array]:
    """S_l, and which of it count."""
    key, f, g, mask, asked, active = given
    taken = mask.ravel()
    there = lambda column, output: taken[column * part.n_out + output]  # noqa: E731
    S, count = hold_subset(how, l, part, key, (f, g), asked, active, there)
    return S, jnp.arange(S.size) < count


def chance_subset(net: Network, method: Method) -> Callable[..., Candidates]:
    """SET's S: |P| inactive connections of the network, every set of them equally likely."""
    planned = plan(net, method)
    how, parts = sampling(net, method, planned), parts_of(net)
    most = max(1, int(planned.grown.max()))
    n_out = jnp.array([part.n_out for part in parts], jnp.int32)
    start = np.cumsum([0, *(part.layer.size for part in parts[:-1])]).astype(np.int32)

    def sample(state: SparseState, batch: Any, fg: Any, event: Array) -> Candidates:
        A, wanted = join(state.masks), jnp.asarray(planned.grown)[event]

        def at(l, column, output):
            return jnp.asarray(start)[l] + column * n_out[l] + output

        (S, count), _ = fold_by_chance(
            how.chunk,
            most,
            alike(parts),
            parts,
            stream(state, REWIRE_STREAM),
            wanted,
            A.sum(dtype=jnp.int32),
            lambda *pair: A[at(*pair)],
            functools.partial(held, lambda pairs: at(pairs.l, pairs.column, pairs.output)),
            (jnp.zeros(most, jnp.int32), jnp.int32(0)),
        )
        chance = as_chance(hashes_at(net, stream(state, CHANCE_STREAM), S))
        score = jnp.where(jnp.arange(most) < count, chance, -jnp.inf)
        return Candidates(S, score, wanted, count, jnp.bool_(True))

    return sample


def parts_of(net: Network) -> list[Part]:
    """The layers as the sampler sees them, each one block."""
    return [Part(layer, layer.columns, 0) for layer in net.layers.values()]


def _columns(fg: dict[str, tuple[Array, Array]]) -> tuple[ByLayer, ByLayer]:
    return {p: f for p, (f, _) in fg.items()}, {p: g for p, (_, g) in fg.items()}


# ----------------------------------------------------------------------------- how they are scored
def by_chance(net: Network, loss: Loss) -> Callable[..., ByLayer]:
    """DSR, DeepR: a random order of all candidates."""

    def score(state: SparseState, batch: Any, S: ByLayer) -> ByLayer:
        key = stream(state, CHANCE_STREAM)
        flat = {
            path: hashes_of_layer(key, l, layer.columns, layer.n_out).ravel()
            for l, (path, layer) in enumerate(net.layers.items())
        }
        return {path: as_chance(flat[path][s]) for path, s in S.items()}

    return score


def as_chance(hashes: Array) -> Array:
    """Numbers in (0, 1], in the order of the hashes: uint32 (n,) -> float32 (n,)."""
    return ((hashes >> 8) + 1).astype(jnp.float32) * np.float32(2.0**-24)


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


def positions(net: Network, S: ByLayer) -> ByLayer:
    """Flat positions within a layer -> within the joined vector of all layers."""
    start = np.cumsum([0, *(layer.size for layer in net.layers.values())])
    return {path: S[path] + int(offset) for path, offset in zip(S, start[:-1], strict=True)}
