"""How connections grow: `GROWTHS`, the rows of `Method.score`, and what they declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dst.loss import Loss
from dst.methods.base import Method
from dst.methods.blockwise import streamed
from dst.methods.candidates import (
    Source,
    by_chance,
    by_chance_alone,
    by_dense_gradient,
    by_momentum,
    everything,
    nothing,
)
from dst.methods.drop import DROPS
from dst.methods.heuristics import HEURISTICS
from dst.methods.plan import Plan
from dst.methods.schedules import rounded_up
from dst.methods.subset import on_subset
from dst.network import Network
from dst.vocabulary import Names


class Growth(NamedTuple):
    """Where candidates come from and how they are scored, and what that takes."""

    source: Callable[[Network, Method, Plan, Loss], Source]
    draws: bool = False  # a subset S from the f x g of a heuristic
    gradient: str = ""  # that a rewire takes: of "all" possible connections, or of the "subset"
    every_step: bool = False  # takes the gradient of all possible connections in every step
    memory: tuple[str, ...] = ()  # names of `MEMORIES`
    by_layer: bool = False  # whether it finds the best of each layer, where these keep their counts
    # Why sparse execution cannot run this method, and what beside masked execution helps; or None.
    obstacle: Callable[[Method], tuple[str, str] | None] = lambda method: None
    # Words of 4 bytes a possible connection at a rewire, of (method, net, plan, density).
    words: Callable[[Method, Network, Plan, float], float] = lambda *_: 0.0


# -------------------------------------------------------------------------------------- by chance
def chance(net: Network, method: Method, planned: Plan, loss: Loss) -> Source:
    """As many as are to grow (SET); all, where a rule says how many or layers share."""
    if DROPS[method.drop].planned and not method.share:
        return by_chance_alone(net, method, planned, loss)
    return everything(by_chance, planned)


def _moved(method: Method, net: Network, planned: Plan, density: float) -> float:
    return planned.grown.max() / net.possible


# ---------------------------------------------------------------------------- by the dense gradient
def dense_gradient(net: Network, method: Method, planned: Plan, loss: Loss) -> Source:
    """RigL: the gradient of every possible connection, whole or a block at a time."""
    if method.growth_memory == "streamed":
        return streamed(net, method, planned, loss)
    return everything(by_dense_gradient(net, loss), planned)


def _at_once(method: Method) -> tuple[str, str] | None:
    if method.growth_memory == "streamed":
        return None
    what = "it takes the gradient of every possible connection at once"
    return what, "growth_memory='streamed' or "


def _gradient(method: Method, net: Network, planned: Plan, density: float) -> float:
    """Of a streamed one its best |P| are held, and a block."""
    return 2 * _moved(method, net, planned, density) if method.growth_memory == "streamed" else 1.0


# ---------------------------------------------------------------------------- by the gradient on S
def subset_sizes(method: Method, planned: Plan) -> np.ndarray:
    """|S_t| of every planned event, over all layers: int64 (E,)."""
    if method.subset_of == "active":  # of which the plan has but a bound for each layer
        return np.array([rounded_up(method.subset_ratio, int(K)) for K in planned.active])
    return planned.subset.sum(1, dtype=np.int64)


def _subset(method: Method, net: Network, planned: Plan, density: float) -> float:
    """S is held, index and gradient, as in the paper's count and in masked execution."""
    S = subset_sizes(method, planned).max() / net.possible
    return 2 * S + HEURISTICS[method.heuristic].words(net, density)


GROWTHS = Names(
    "growth",
    Growth,
    {
        "": Growth(nothing),
        "chance": Growth(chance, by_layer=True, words=_moved),
        "gradient": Growth(on_subset, draws=True, gradient="subset", by_layer=True, words=_subset),
        "dense gradient": Growth(
            dense_gradient, gradient="all", by_layer=True, obstacle=_at_once, words=_gradient
        ),
        "momentum": Growth(
            lambda net, method, planned, loss: everything(by_momentum, planned),
            every_step=True,
            by_layer=True,
            memory=("momentum", "decay"),
            words=lambda *_: 1.0,  # the dense gradient of every step, beside the momentum
        ),
    },
)
