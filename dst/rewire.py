"""The rewire step, Figure 1 of the paper: drop P, sample S, score S, grow G.

Every method that moves connections during training is this one step, in either execution. They
differ in which connections may be dropped (the weakest, those below a threshold, those whose sign
changed), where candidates come from (`everything`, or a sample S from f x g), how these are scored
(by chance, by momentum, by the dense gradient, by the gradient on S), and whether growth is ranked
over the whole network, shared out to layers, or within each (`keep_counts`).

A, the active connections, are `state.masks`. The weakest are dropped and the best grown over all
layers together, or within each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dst.arguments import check_devices, check_is, takes_key
from dst.connections.base import Candidates, Moves, row_salts
from dst.connections.hashing import hashed
from dst.connections.masks import reset
from dst.connections.moments import recognise
from dst.connections.select import lowest
from dst.errors import ConfigError
from dst.loss import Loss
from dst.methods.base import Method
from dst.methods.candidates import Sample, room
from dst.methods.combinations import check, check_execution, memories
from dst.methods.distributions import count_of
from dst.methods.drop import DROPS, dropping, looked_at
from dst.methods.grow import GROWTHS
from dst.methods.heuristics import HEURISTICS
from dst.methods.memory import after_rewire, memory_report, refuse_waiting
from dst.methods.plan import plan
from dst.methods.quota import exchange_within
from dst.methods.share import SHARES, shared_out
from dst.methods.subset import later_than
from dst.network import Network
from dst.optimizer import check_optimizer
from dst.state import TIE_STREAM, SparseState, active_counts, stream
from dst.update import all_finite, parallel, placer, refuse_another, split_batch

LOGGER = logging.getLogger("dst")
Array = jax.Array


def rewire_body(net: Network, tx: optax.GradientTransformation, method: Method, loss: Loss):
    """One rewire on one device's share of the batch: (state, batch, f x g) -> (state, report)."""
    check_is("net", net, Network, "dst.network(model, x)")
    check_is("method", method, Method, "dst.method(name, sparsity=...)")
    takes_key(loss)
    if not method.moves:
        raise ConfigError(f"method is {method.name!r}, whose connections never move.")
    check(method)
    check_execution(method, net.execution)
    planned, K = plan(net, method), count_of(net, method.sparsity)
    drop_rule, most = DROPS[method.drop], room(net, method, planned)
    may_drop = dropping(net, method)
    sample = GROWTHS[method.score].source(net, method, planned, loss)

    def body(state: SparseState, batch: Any, fg: Any):
        refuse_another(net, tx, state)
        if missing := [name for name in memories(method) if name not in state.method]:
            raise ConfigError(
                f"method must be that of init_state; {method.name!r} needs what it remembers from "
                f"the start on ({', '.join(missing)}), which this state has not."
            )
        refuse_waiting(state.method)
        refuse_other_sparsity(method, K, state.masks)
        event = planned.event(state.step)
        target, G_t = (jnp.asarray(n)[event] for n in (planned.active, planned.grown))
        A, w = state.masks, state.masks.weights(state.params)
        salt = row_salts(A.parts, stream(state, TIE_STREAM))
        # The gradient is taken before the drop; P and G are disjoint: S holds inactive ones only.
        S = sample(state, batch, fg, event, salt)
        if not A.every_possible:  # else XLA would hold what chooses P while S is drawn
            state = state.replace(params=later_than(S.realised, state.params))
            w = A.weights(state.params)
        surplus = A.total - target
        view = looked_at(A, w, salt, state.method, drop_rule.strength)
        finite = S.finite & all_finite(w)
        if drop_rule.strength:
            finite &= ~jnp.isnan(view.strength).any()
        eligible, wanted = may_drop(view, event, surplus + G_t)
        # If something is not finite nothing moves; this also orders the check before the exchange,
        # or XLA would keep a copy of all weights for it.
        if planned.each is not None:
            each = jnp.where(finite, jnp.asarray(planned.each)[event], 0)
            P, G, drop = exchange_within(A, view.order, eligible, S.found, each, salt)
            grow = drop
        else:
            drop, grow = over_all(eligible, wanted, surplus, S, most, finite)
            P = lowest(view.order, eligible, drop, A.ties(salt))
            if method.share:
                weights = SHARES[method.share].weights(A, A.exists & ~P, state.method)
                G = shared_out(A, S.found, grow, weights)
            else:
                G = best_candidates(S.found, grow, most, salt)
        A, moves = A.exchange(P, G, grow, salt)
        own = after_rewire(state.method, A, wanted, G_t)
        state = reconnect(tx, state.replace(method=own), A, moves)
        return state, rewire_report(state, drop, grow, S, finite)

    return body


def over_all(
    eligible: Array, wanted: Array, surplus: Array, S: Sample, most: int, finite: Array
) -> tuple[Array, Array]:
    """|P| and |G| of a rewire over all layers together: int32 (), ().

    With fewer candidates than |P| fewer are dropped, never more than can grow.
    """
    left = jnp.minimum(wanted, eligible.sum(dtype=jnp.int32))
    grow = jnp.minimum(left - surplus, S.found.valid.sum(dtype=jnp.int32))
    grow = jnp.where(finite, jnp.clip(grow, 0, most), 0)
    drop = jnp.where(finite, jnp.maximum(jnp.minimum(surplus + grow, left), 0), 0)
    return drop, grow


def best_candidates(found: Candidates, k: Array, most: int, salt: Array) -> Candidates:
    """G, the k <= `most` best of S, the others emptied. Of equals those of the lower hashes."""

    def best() -> Array:
        values, _ = lax.top_k(found.score, min(most, found.score.size))
        cut = values[jnp.maximum(k - 1, 0)]
        better, equal = found.score > cut, (found.score == cut) & found.valid
        left = k - better.sum(dtype=jnp.int32)
        ties = lambda: lowest(hashed(salt[found.row], found.column), equal, left)  # noqa: E731
        some = lax.cond(equal.sum(dtype=jnp.int32) > left, ties, lambda: equal)
        return (better | some) & (k > 0)

    every = found.valid.sum(dtype=jnp.int32) <= k
    G = lax.cond(every, lambda: found.valid, best)
    return found._replace(score=jnp.where(G, found.score, -1))


def reconnect(tx, state: SparseState, A: Any, moves: Moves) -> SparseState:
    """Weights and moments follow their connections; those of grown ones start over."""
    values = state.masks.kernels(state.params)
    owners = recognise(state.opt_state, state.params, values)
    zero = {owner: moves.carry(v, owner, jnp.zeros((), v.dtype)) for owner, v in values.items()}
    params = A.put(state.params, zero)
    opt_state = reset(moves, state.opt_state, tx.init(params), owners)
    return state.replace(params=params, opt_state=opt_state, masks=A)


def rewire_report(state: SparseState, drop: Array, grow: Array, S: Sample, finite: Array):
    """What a rewire did, for the log: |P|, |G|, |S| asked and realised, each layer's counts."""
    return {
        "pruned": drop,
        "grown": grow,
        "subset_asked": S.asked,
        "subset_realised": S.realised,
        "active": active_counts(state.masks),
        "dead_units": state.masks.dead_units(),
        **memory_report(state.method),
        "finite": finite,
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

    To be called before the update of the steps that `dst.due(method, step)` names, and no others.
    With `donate` the new state takes the memory of the old one, which is then gone. A state of
    another sparsity than the method's is moved to that, and the log says so. Raises: a state of
    another network or optimizer, in sparse execution of another sparsity.
    """
    check_optimizer(tx)
    check_devices(devices)
    body, K = rewire_body(net, tx, method, loss), count_of(net, method.sparsity)
    step = parallel(body, (None, 0, None), devices, (0,) if donate else ())
    measure = on_host(net, method)
    place = placer(devices)

    def rewire(state: SparseState, batch: Any):
        check_is("state", state, SparseState, "dst.init_state(net, tx, method, key)")
        found = state.masks.counts().sum()  # before the state's memory is the new one's
        state = place(state)
        rewired = step(state, split_batch(batch, devices), measure(state))
        if not (method.ramps or isinstance(found, jax.core.Tracer) or int(found) == K):
            words = other_sparsity(method, K, found)
            LOGGER.warning("The rewire moves to what the method says: %s.", words)
        return rewired

    return rewire


def refuse_other_sparsity(method: Method, K: int, A: Any) -> None:
    """Raises: connections that have memory for another number than the method's."""
    held = A.exists.size
    if not A.every_possible and held != K:
        raise ConfigError(f"method must be that of init_state: {other_sparsity(method, K, held)}.")


def other_sparsity(method: Method, K: int, found: Any) -> str:
    """In words: the method's connections and those of a state."""
    return f"its sparsity {method.sparsity:g} is {K:,} connections, the state has {int(found):,}"


def on_host(net: Network, method: Method) -> Callable[[SparseState], Any]:
    """The heuristic's part that runs before the jitted step (SynFlow, in float64), else nothing."""
    find = HEURISTICS[method.heuristic].on_host if method.heuristic else None
    return find(net) if find else lambda state: {}
