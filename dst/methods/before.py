"""Pruning before training: every possible connection is scored and the K best stay.

| `before`    | score of a connection w                 | data       | source                |
| ----------- | --------------------------------------- | ---------- | --------------------- |
| `snip`      | |w g|, g = dL/dw                        | one pass   | Lee et al., 2019      |
| `grasp`     | w (H g), signed, of logits / T          | two passes | Wang et al., 2020     |
| `grasp_abs` | |w (H g)|                               | two passes | Lubana and Dick, 2021 |
| `synflow`   | |w| dR/d|w|, again in each of n rounds  | none       | Tanaka et al., 2020   |

L is the mean loss of all examples: gradients are summed with their signs before anything else. The
choice is global, and the weights that stay are not scaled or drawn anew.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst import hosts
from dst.axis import AXIS
from dst.connections.masks import kernels_of, with_kernels
from dst.errors import ConfigError
from dst.loss import Loss, run_loss
from dst.methods.base import Method
from dst.methods.heuristics import NOTHING, check_flow, check_inputs, total_flow, without_dropout
from dst.network import Network
from dst.state import SparseState
from dst.update import parallel, replicate, split_batch
from dst.vocabulary import Names

Array = jax.Array
ByLayer = dict[str, Array]

Value = Callable[[ByLayer, Any], Array]  # value(kernels, batch): the mean loss of one batch
Score = Callable[["Value", ByLayer, "Mean"], ByLayer]  # score(value, kernels, mean)
Mean = Callable[..., ByLayer]  # mean(f, *args): of f(kernels, batch, *args), over all examples
Show = Callable[[int, int | None], Any]  # show(done, total); total is None if unknown


class Given(NamedTuple):
    """What pruning may look at, and how it runs."""

    K: int  # connections to keep
    batches: Iterable[Any]
    devices: list | None
    show: Show | None


def strongest(
    score: Mapping[str, Any], masks: Mapping[str, Any], k: int, what: str
) -> dict[str, np.ndarray]:
    """Masks of the k largest scores of active connections: global, by stable rank.

    Signed scores of the kernels' shapes; of equals the first in layer order is kept, and never one
    that is inactive. Raises: a score that is not finite, told as `what`.
    """
    for path, mask in masks.items():
        if not np.isfinite(np.asarray(score[path])[np.asarray(mask)]).all():
            raise ConfigError(
                f"{what} of layer {path!r} must be finite, but some is NaN or infinite."
            )
    active = np.concatenate([np.asarray(mask).ravel() for mask in masks.values()])
    flat = np.concatenate([np.asarray(score[path]).ravel() for path in masks])
    order = np.argsort(np.where(active, -flat, np.inf), kind="stable")
    chosen = np.zeros(active.size, bool)
    chosen[order[: min(k, np.count_nonzero(active))]] = True
    parts = np.split(chosen, np.cumsum([mask.size for mask in masks.values()])[:-1])
    return {path: c.reshape(masks[path].shape) for path, c in zip(masks, parts, strict=True)}


# --------------------------------------------------------------------------- scores that need data
def snip(value: Value, kernels: ByLayer, mean: Mean) -> ByLayer:
    """|w g|: what the loss loses, to first order, with the connection."""
    g = mean(jax.grad(value))
    return {path: jnp.abs(w * g[path]) for path, w in kernels.items()}


def grasp(value: Value, kernels: ByLayer, mean: Mean) -> ByLayer:
    """w (H g): the largest stay, for without them the gradient's norm would fall.

    g is that of all examples when H g is taken of any: sum_b H_b g, not sum_b H_b g_b.
    """
    g = mean(jax.grad(value))
    Hg = mean(hessian_product(value), g)
    return {path: w * Hg[path] for path, w in kernels.items()}


def grasp_abs(value: Value, kernels: ByLayer, mean: Mean) -> ByLayer:
    """|w (H g)|: connections without which the gradient's norm would change most stay."""
    return {path: jnp.abs(score) for path, score in grasp(value, kernels, mean).items()}


def by_score(
    score: Score, passes: int, cooled: bool
) -> Callable[[Network, Method, Loss, SparseState, Given], dict[str, np.ndarray]]:
    """Keeps the K connections of the largest score, which takes so many passes over the batches."""

    def prune(
        net: Network, method: Method, loss: Loss, state: SparseState, given: Given
    ) -> dict[str, np.ndarray]:
        value = objective(net, loss, method.temperature if cooled else 1.0)
        mean = mean_on_devices(state, given.batches, passes, given.devices, given.show)
        scores = score(value, kernels_of(state.params, state.masks), mean)
        return strongest(scores, state.masks, given.K, f"the {method.before!r} score")

    return prune


def hessian_product(value: Value) -> Callable[[ByLayer, Any, ByLayer], ByLayer]:
    """(kernels, batch, g) -> H g of the batch's loss, forward over reverse; no H is ever made."""

    def product(kernels: ByLayer, batch: Any, g: ByLayer) -> ByLayer:
        gradient = lambda kernels: jax.grad(value)(kernels, batch)  # noqa: E731
        return jax.jvp(gradient, (kernels,), (g,))[1]

    return product


def mean_over(
    kernels: ByLayer,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Callable], Callable] = jax.jit,
) -> Mean:
    """A function that takes means over all examples of `batches()`: mean(f, *args).

    Each batch counts by its examples, so that batches may differ in size. `run(f)` is what is
    called on a batch. Raises: no examples, or not as many as in the pass before.
    """
    passes: list[int] = []

    def mean(f: Callable, *args: Any) -> ByLayer:
        step, count, total = run(f), 0, jax.tree.map(jnp.zeros_like, kernels)
        for batch in batches():
            n = examples(batch)
            part = step(kernels, batch, *args)
            total, count = jax.tree.map(lambda t, p, n=n: t + n * p, total, part), count + n
        passes.append(count)
        if count != passes[0]:
            raise ConfigError(
                f"batches gave {passes[0]} examples at first and {count} when iterated again; it "
                "must give the same ones, as a list does."
            )
        if not count:
            raise ConfigError("batches gives no examples; a score needs some.")
        return jax.tree.map(lambda t: t / count, total)

    return mean


def mean_on_devices(
    state: SparseState, batches: Iterable, passes: int, devices: list | None, show: Show | None
) -> Mean:
    """`mean_over` with each batch split over the devices; f gets (state, batch) for a batch."""
    state = replicate(state, devices)
    total = passes * operator.length_hint(batches) or None
    done = itertools.count(1)

    def each() -> Iterator[Any]:
        for batch in whole(batches, len(devices or hosts.devices())):
            yield batch
            if show:
                show(next(done), total)

    def run(f: Callable) -> Callable:
        body = lambda kernels, state, batch, args: lax.pmean(  # noqa: E731
            f(kernels, (state, batch), *args), AXIS
        )
        step = parallel(body, (None, None, 0, None), devices)
        return lambda kernels, batch, *args: step(kernels, state, split_batch(batch, devices), args)

    return mean_over(kernels_of(state.params, state.masks), each, run)


def whole(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The batches; those smaller than the first cut to a multiple of `count`, if to nothing, none.

    Such is the last batch of a data set, of which at most count - 1 examples are lost.
    """
    first = None
    for batch in batches:
        n = examples(batch)
        first = n if first is None else first
        left = n - n % count if n < first else n
        if left == n:
            yield batch
        elif left:
            yield jax.tree.map(lambda leaf, left=left: leaf[:left], batch)


def examples(batch: Any) -> int:
    """How many examples a batch has: the first dimension of its arrays."""
    return jax.tree.leaves(batch)[0].shape[0]


def objective(net: Network, loss: Loss, temperature: float) -> Value:
    """value(kernels, (state, batch)): the loss in train mode of logits / T, without dropout."""

    def value(kernels: ByLayer, batch: Any) -> Array:
        state, batch = batch
        params = with_kernels(state.params, kernels)
        with nn.intercept_methods(without_dropout):
            return run_loss(net, cooled(loss, temperature), params, state, batch)[0]

    return value


def cooled(loss: Loss, temperature: float) -> Loss:
    """`loss` of what the model returns / T; integers stay as they are."""

    def divide(leaf: Array) -> Array:
        return leaf / temperature if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def run(apply: Callable, *args, mutable: Any = False, **kwargs):
        outputs = apply(*args, mutable=mutable, **kwargs)
        if mutable is False:
            return jax.tree.map(divide, outputs)
        return jax.tree.map(divide, outputs[0]), outputs[1]  # what the model sows stays as it is

    @functools.wraps(loss)  # whose parameters say whether it asks for a key
    def cool(apply: Callable, batch: Any, **key: Array):
        return loss(functools.partial(run, apply), batch, **key)

    return cool


# ----------------------------------------------------------------------------------------- SynFlow
def densities(sparsity: float, iterations: int) -> list[float]:
    """d_k = (1 - s)^(k / n), k = 1 .. n: what SynFlow leaves after each round."""
    return [(1 - sparsity) ** (k / iterations) for k in range(1, iterations + 1)]


def prune_by_flow(
    net: Network, method: Method, loss: Loss, state: SparseState, given: Given
) -> dict[str, np.ndarray]:
    """SynFlow's masks: round after round the flow is scored anew and the weakest removed.

    In float64, on one device. Raises: a flow that is not finite or not positively homogeneous.
    """
    subject, instead = "method is 'synflow'", "use 'snip' or 'grasp'"
    check_inputs(net, subject, instead)
    counts = [round(net.possible * d) for d in densities(method.sparsity, method.iterations)]
    counts[-1] = given.K
    held = state.params, dict(state.masks), state.batch_stats
    params, masks, collections = jax.device_get(held)
    with jax.enable_x64(True):
        measure = jax.jit(functools.partial(flow_scores, net))
        R, R_of_double = (measure(params, masks, collections, value)[0] for value in (1.0, 2.0))
        check_flow(R, R_of_double, subject, instead)
        for done, count in enumerate(counts, 1):
            _, scores = measure(params, masks, collections, 1.0)
            masks = strongest(jax.device_get(scores), masks, count, "the 'synflow' score")
            if given.show:
                given.show(done, len(counts))
    return masks


def flow_scores(
    net: Network, params: Any, masks: Any, collections: Any, value: float = 1.0
) -> tuple[Array, ByLayer]:
    """R of an input of `value`, and each connection's share |w| dR/d|w| of it, in float64.

    The shares of a layer sum to R where all flow goes through it. Shapes: the kernels'.
    """
    weights = {
        path: jnp.where(masks[path], jnp.abs(w).astype(jnp.float64), 0)
        for path, w in kernels_of(params, masks).items()
    }

    def flow(weights: ByLayer) -> Array:
        return total_flow(net, with_kernels(params, weights), masks, collections, value)

    R, slope = jax.value_and_grad(flow)(weights)
    scores = {path: w * slope[path] for path, w in weights.items()}
    # What the twin's TRACE alone makes is no flow; a NaN stays one.
    return R, {path: jnp.where(s < NOTHING, 0, s) for path, s in scores.items()}


class Before(NamedTuple):
    """What prunes once before training, and what that takes."""

    prune: Callable[[Network, Method, Loss, SparseState, Given], dict[str, np.ndarray]]
    words: float  # of 4 bytes a possible connection while it scores
    gradients: int  # of the dense network for each example; 0: it needs no data
    reads: tuple[str, ...] = ()  # fields of `Method`


# Weights, gradient and scores; for GraSP H g too, whose pass has the gradient and its tangent.
# SynFlow's copy and its gradient are float64.
BEFORE = Names(
    "score before training",
    Before,
    dict(
        snip=Before(by_score(snip, 1, False), 3.0, 1, ()),
        grasp=Before(by_score(grasp, 2, True), 4.0, 3, ("temperature",)),
        grasp_abs=Before(by_score(grasp_abs, 2, True), 4.0, 3, ("temperature",)),
        synflow=Before(prune_by_flow, 5.0, 0, ("iterations",)),
    ),
)
