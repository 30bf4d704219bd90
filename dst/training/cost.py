"""What a method costs: memory at its peak and arithmetic, counted and never measured.

Memory is in words of 4 bytes per possible connection. Arithmetic is FLOPs, 2 for each product that
an active connection takes part in; what is not a sparse layer (norms, biases, layers that stay
dense) is not counted. Either is what a program needs that holds and computes only what exists;
masked execution holds and computes everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dst.methods.base import Method
from dst.methods.before import BEFORE
from dst.methods.combinations import memories
from dst.methods.distributions import active_count
from dst.methods.grow import GROWTHS
from dst.methods.heuristics import HEURISTICS
from dst.methods.memory import MEMORIES
from dst.methods.plan import plan
from dst.methods.schedules import largest_remainder
from dst.network import Network
from dst.observe import layer_calls

Counts = Mapping[str, int]

BIT = 1 / 32  # words


# ---------------------------------------------------------------------------------------- memory
def peak_words(method: Method, net: Network) -> float:
    """Words per possible connection at the method's peak, activations not counted.

    A connection is value, gradient, momentum and index; a dense weight has no index but a mask bit.
    """
    if method.name in ("dense", "lottery"):
        return 3.0 + (method.name == "lottery")  # the weights to rewind to
    sparsity = method.sparsity if method.before else method.first_sparsity
    density = active_count(net.possible, sparsity) / net.possible
    held = min(4 * density, 3 + BIT)
    scoring = BEFORE[method.before].words if method.before else 0.0
    remembered = sum(MEMORIES[name].words for name in memories(method))
    growing = GROWTHS[method.score].words(method, net, plan(net, method), density)
    return max(held + remembered + growing, scoring)


# ------------------------------------------------------------------------------------ arithmetic
def multiply_adds(net: Network) -> dict[str, int]:
    """How often an example uses each weight of a layer: 1, or H' W' of a convolution's output.

    Calls of a layer add up. The model is traced on a batch of 1, nothing is computed.
    """

    def run(_):
        args = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), net.args)
        return net.model.init(jax.random.key(0), *args, **net.kwargs)

    calls = layer_calls(net.layers, run)
    return {path: sum(math.prod(c["y"].shape[:-1]) for c in calls[path]) for path in net.layers}


def forward_flops(uses: Counts, counts: Counts) -> int:
    """F(A) = 2 sum_l uses_l |A_l|: the forward pass of one example."""
    return 2 * sum(uses[path] * n for path, n in counts.items())


def step_flops(method: Method, uses: Counts, possible: Counts, active: Counts) -> int:
    """A step, an example: forward, gradient of the inputs, gradient of the weights."""
    F = forward_flops(uses, active)
    return 2 * F + (forward_flops(uses, possible) if GROWTHS[method.score].every_step else F)


def rewire_flops(
    method: Method, uses: Counts, possible: Counts, active: Counts, S: int, batch_size: int
) -> int:
    """A rewire on a batch, beside the step that follows; `active` before it, S is |S|.

    Marginals and the gradient on S take a pass each; sparse execution's GraBo takes one for both.
    """
    F = forward_flops(uses, active)
    gradient = GROWTHS[method.score].gradient
    if gradient == "all":
        return batch_size * (2 * F + forward_flops(uses, possible))
    if not gradient:
        return 0
    shares = active if method.subset_of == "active" else possible
    sizes = [possible[path] for path in shares]
    split = largest_remainder(S, [*shares.values()], sizes)
    scored = forward_flops(uses, dict(zip(shares, split.tolist(), strict=True)))
    passes = {"none": 0, "one": 1, "batch": batch_size}
    examples = passes[HEURISTICS[method.heuristic].examples]
    return batch_size * (2 * F + scored) + examples * 2 * F


def scoring_flops(method: Method, uses: Counts, possible: Counts, examples: int) -> int:
    """What scores that prune before the first step take; SynFlow's n passes need no examples."""
    if not method.before:
        return 0
    of_data = BEFORE[method.before].gradients
    gradients = of_data * examples if of_data else method.iterations
    return gradients * 3 * forward_flops(uses, possible)


def training_flops(
    method: Method,
    uses: Counts,
    possible: Counts,
    first: Counts,
    events: Iterable[Mapping[str, Any]],
    steps: int,
    batch_size: int,
    examples: int = 0,
) -> int:
    """FLOPs of a run of `steps` steps, from its log: `events` tell the counts after a change.

    `first` are the counts before the first event, `examples` those that are scored before training.
    Of Lottery's rounds all steps count, one after the other.
    """
    total, begin, active = scoring_flops(method, uses, possible, examples), 0, first
    for event in changes(events):
        now = event["step"]
        total += batch_size * (now - begin) * step_flops(method, uses, possible, active)
        if event["event"] == "rewire":
            S = event.get("subset_realised", 0)
            total += rewire_flops(method, uses, possible, active, S, batch_size)
        begin, active = now, event["active"]
    return total + batch_size * (steps - begin) * step_flops(method, uses, possible, active)


def changes(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events of a log after which layers have other counts."""
    return [event for event in events if "active" in event and event["event"] != "end"]


def run_cost(
    net: Network,
    method: Method,
    first: Counts,
    events: Iterable[Mapping[str, Any]],
    steps: int,
    batch_size: int,
    examples: int = 0,
    rounds: int = 1,
) -> dict[str, float]:
    """`cost` of a run: memory; its training and a forward pass in the end over the dense ones.

    The arguments are those of `training_flops`; dense training has the steps of one of the rounds.
    """
    uses = multiply_adds(net)
    possible = {path: layer.size for path, layer in net.layers.items()}
    changed = changes(events)
    last = changed[-1]["active"] if changed else first
    dense = forward_flops(uses, possible)
    total = training_flops(method, uses, possible, first, changed, steps, batch_size, examples)
    return {
        "peak_words_per_weight": peak_words(method, net),
        "training_flops_vs_dense": total * rounds / (3 * dense * batch_size * steps),
        "inference_flops_vs_dense": forward_flops(uses, last) / dense,
    }
