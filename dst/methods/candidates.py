"""Where candidates to grow come from, and how they are scored: S of Figure 1.

A source is sample(state, batch, f x g, event, salt) -> `Sample`: everything inactive, scored at
once or a block at a time, or a subset of it, drawn from f x g or by chance. Scores are >= 0; the
best grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.axis import AXIS
from dst.connections.base import Candidates, no_candidates, row_of, row_salts
from dst.connections.hashing import hashed
from dst.connections.masks import join
from dst.loss import Loss, run_loss
from dst.methods.arrivals import Pairs
from dst.methods.base import Method
from dst.methods.distributions import first_counts
from dst.methods.drop import DROPS
from dst.methods.plan import Plan, most_active
from dst.methods.quota import Quota, best_of_each
from dst.methods.sample import Visit, fold_by_chance, fold_by_chance_of_each, sampling
from dst.network import Network
from dst.state import CHANCE_STREAM, REWIRE_STREAM, SparseState, stream
from dst.update import all_finite

Array = jax.Array


class Sample(NamedTuple):
    """S, or the best of it, with its scores."""

    found: Candidates
    asked: Array  # int32 (), |S| that was asked for
    realised: Array  # int32 (), |S|
    finite: Array  # bool (), whether all scores and marginals were


Source = Callable[..., Sample]  # (state, batch, f x g, event, salt)


def room(net: Network, method: Method, planned: Plan) -> int:
    """The most connections that can ever grow at once, at least 1.

    What a rule drops that asks no plan, a threshold or signs, is only known when it happens.
    """
    return max(1, int(planned.grown.max()) if DROPS[method.drop].planned else net.possible)


def most_at(net: Network, method: Method, planned: Plan, event: Array) -> Array:
    """The most that can grow at an event: int32 ()."""
    if DROPS[method.drop].planned:
        return jnp.asarray(planned.grown)[event]
    return jnp.int32(room(net, method, planned))


def quota(net: Network, method: Method, planned: Plan, event: Array, salt: Array) -> Quota:
    """The list of the best that an event may grow."""
    most = room(net, method, planned)
    return Quota(most_at(net, method, planned, event), most, salt, planned.each, event)


def nothing(net: Network, method: Method, planned: Plan, loss: Loss) -> Source:
    """No candidate: pruning only drops."""

    def sample(state: SparseState, batch: Any, fg: Any, event: Array, salt: Array) -> Sample:
        zero = jnp.int32(0)
        return Sample(no_candidates(1), zero, zero, jnp.bool_(True))

    return sample


# ---------------------------------------------------------------------- everything that is inactive
def everything(score: Callable[[SparseState, Any], Array], planned: Plan) -> Source:
    """Every inactive connection, scored at once: score(state, batch) -> (N,), >= 0.

    Of a plan of each layer only the best of each are handed on.
    """

    def sample(state: SparseState, batch: Any, fg: Any, event: Array, salt: Array) -> Sample:
        scores = score(state, batch)
        found, inactive = state.masks.every(scores), state.masks.inactive
        if planned.each is not None:
            found = best_of_each(state.masks, found, jnp.asarray(planned.each)[event], salt)
        return Sample(found, inactive, inactive, all_finite(scores))

    return sample


def by_chance(state: SparseState, batch: Any) -> Array:
    """DSR, DeepR: a random order of all candidates."""
    salt = row_salts(state.masks.parts, stream(state, CHANCE_STREAM))
    return as_chance(state.masks.hashes(salt))


def as_chance(hashes: Array) -> Array:
    """Numbers in (0, 1], in the order of the hashes: uint32 (n,) -> float32 (n,)."""
    return ((hashes >> 8) + 1).astype(jnp.float32) * np.float32(2.0**-24)


def by_momentum(state: SparseState, batch: Any) -> Array:
    """SNFS: |momentum| of every possible connection, which the update step keeps."""
    return jnp.abs(join(state.method["momentum"]))


def by_dense_gradient(net: Network, loss: Loss) -> Callable[[SparseState, Any], Array]:
    """RigL: |dL/dw| of every possible connection, a gradient of the size of the dense model."""

    def score(state: SparseState, batch: Any) -> Array:
        value = lambda params: run_loss(net, loss, params, state, batch)[0]  # noqa: E731
        G = lax.pmean(state.masks.kernels(jax.grad(value)(state.params)), AXIS)
        return jnp.abs(join(G))

    return score


# -------------------------------------------------------------------------------------- by chance
def by_chance_alone(net: Network, method: Method, planned: Plan, loss: Loss) -> Source:
    """SET's S: |P| inactive connections of the network, every set of them equally likely.

    Or |P_l| of each layer.
    """
    how, draw = sampling(net, method, planned), drawn_by_chance(net, method, planned)

    def sample(state: SparseState, batch: Any, fg: Any, event: Array, salt: Array) -> Sample:
        A, P = state.masks, jnp.asarray(planned.grown)[event]
        held = quota(net, method, planned, event, salt)
        chances = row_salts(A.parts, stream(state, CHANCE_STREAM))

        def visit(found: Candidates, pairs: Pairs, chosen: Array) -> Candidates:
            row = row_of(A.parts, pairs.l, pairs.column, pairs.output)
            score = as_chance(hashed(chances[row], pairs.column)).astype(found.score.dtype)
            new = Candidates(row, pairs.column, jnp.where(chosen, score, -1))
            return held.best(found, new, pairs.l)

        empty = held.empty(A.weights(state.params).dtype)
        key = stream(state, REWIRE_STREAM)
        found, count = draw(how.chunk, A, key, event, visit, empty)
        return Sample(found, P, count, jnp.bool_(True))

    return sample


def drawn_by_chance(net: Network, method: Method, planned: Plan) -> Callable[..., Any]:
    """`draw(chunk, A, key, event, visit, carry)`: as many as are planned, folded as they come."""
    if planned.each is None:
        most = room(net, method, planned)
        free = net.possible - most_active(net, method, planned.active)

        def of_network(chunk: int, A: Any, key: Array, event: Array, visit: Visit, carry: Any):
            P = jnp.asarray(planned.grown)[event]
            return fold_by_chance(chunk, most, free, A.parts, key, P, A.total, A.find, visit, carry)

        return of_network
    each = planned.each
    counts = first_counts(net, method)
    free_of = [net.layers[path].size - count for path, count in counts.items()]

    def of_layers(chunk: int, A: Any, key: Array, event: Array, visit: Visit, carry: Any):
        P = jnp.asarray(each)[event]
        return fold_by_chance_of_each(
            chunk, each.max(0), free_of, A.parts, key, P, A.counts(), A.find, visit, carry
        )

    return of_layers
