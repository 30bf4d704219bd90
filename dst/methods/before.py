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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dst import hosts
from dst.connections.masks import kernels_of, with_kernels
from dst.errors import ConfigError
from dst.methods.combinations import check_execution
from dst.methods.distributions import active_count
from dst.methods.heuristics import NOTHING, check_flow, check_inputs, total_flow, without_dropout
from dst.methods.memory import begun
from dst.methods.table import Method
from dst.network import Network
from dst.state import SparseState, count_of
from dst.update import AXIS, Loss, parallel, replicate, run_loss, split_batch

Array = jax.Array
ByLayer = dict[str, Array]

Value = Callable[[ByLayer, Any], Array]  # value(kernels, batch): the mean loss of one batch
Mean = Callable[..., ByLayer]  # mean(f, *args): of f(kernels, batch, *args), over all examples
Show = Callable[[int, int | None], Any]  # show(done, total); total is None if unknown


def prune_at_init(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    loss: Loss,
    state: SparseState,
    batches: Iterable[Any] = (),
    *,
    devices: list | None = None,
    show: Show | None = None,
) -> SparseState:
    """`state`, which has all connections, with the K that score best by `method.before`.

    `batches` are as for `make_update`, and can be iterated twice; a batch smaller than the first is
    cut to a multiple of the devices. Batch normalisation is in train mode, its new statistics are
    thrown away, and `nn.Dropout` is off. `show` is called after each batch, or round of SynFlow.
    Errors: sparse execution, no batches, scores that are not finite, no flow for SynFlow, a
    sparsity that leaves no connection.
    """
    K = count_of(net, method.sparsity)
    _check(net, method, state, K)
    if method.before == "synflow":
        masks = prune_by_flow(net, method, state, show)
    else:
        value = objective(net, loss, 1.0 if method.before == "snip" else method.temperature)
        score = SCORES[method.before]
        mean = mean_on_devices(state, batches, score is not snip, devices, show)
        scores = score(value, kernels_of(state.params, state.masks), mean)
        masks = strongest(scores, state.masks, K, f"the {method.before!r} score")
    return start_with(tx, state, masks)


def _check(net: Network, method: Method, state: SparseState, K: int) -> None:
    known = (*SCORES, "synflow")
    if method.before not in known:
        raise ConfigError(
            f"method is {method.name!r}, which does not prune before training; allowed are "
            f"{', '.join(known)}."
        )
    check_execution(method, net.execution)
    active = sum(np.count_nonzero(mask) for mask in state.masks.values())
    if active < K:
        raise ConfigError(
            f"state has {active} connections, fewer than the {K} to keep; it must be a new one "
            "with initial sparsity 0."
        )


def start_with(tx: optax.GradientTransformation, state: SparseState, masks: Any) -> SparseState:
    """`state` with these masks, exact zeros off them and a fresh optimizer, free to train.

    The rest stays as it is.
    """
    A = state.masks.but({path: jnp.asarray(mask) for path, mask in masks.items()})
    params = A.only_existing(state.params)
    return begun(state).replace(params=params, masks=A, opt_state=tx.init(params))


def strongest(
    score: Mapping[str, Any], masks: Mapping[str, Any], k: int, what: str
) -> dict[str, np.ndarray]:
    """Masks of the k largest scores of active connections: global, by stable rank.

    Signed scores of the kernels' shapes; of equals the first in layer order is kept, and never one
    that is inactive. Errors: a score that is not finite, told as `what`.
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


SCORES: dict[str, Callable[[Value, ByLayer, Mean], ByLayer]] = {
    "snip": snip,
    "grasp": grasp,
    "grasp_abs": grasp_abs,
}


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
    called on a batch. Errors: no examples, or not as many as in the pass before.
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
    state: SparseState, batches: Iterable, twice: bool, devices: list | None, show: Show | None
) -> Mean:
    """`mean_over` with each batch split over the devices; f gets (state, batch) for a batch."""
    state = replicate(state, devices)
    total = (1 + twice) * operator.length_hint(batches) or None
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

    return lambda apply, batch: loss(functools.partial(run, apply), batch)


# ----------------------------------------------------------------------------------------- SynFlow
def densities(sparsity: float, iterations: int) -> list[float]:
    """d_k = (1 - s)^(k / n), k = 1 .. n: what SynFlow leaves after each round."""
    return [(1 - sparsity) ** (k / iterations) for k in range(1, iterations + 1)]


def prune_by_flow(
    net: Network, method: Method, state: SparseState, show: Show | None
) -> dict[str, np.ndarray]:
    """SynFlow's masks: round after round the flow is scored anew and the weakest removed.

    In float64, on one device. Errors: a flow that is not finite or not positively homogeneous.
    """
    subject, instead = "method is 'synflow'", "use 'snip' or 'grasp'"
    check_inputs(net, subject, instead)
    counts = [round(net.possible * d) for d in densities(method.sparsity, method.iterations)]
    counts[-1] = active_count(net.possible, method.sparsity)
    given = state.params, dict(state.masks), state.batch_stats
    params, masks, collections = jax.device_get(given)
    with jax.enable_x64(True):
        measure = jax.jit(functools.partial(flow_scores, net))
        R, R_of_double = (measure(params, masks, collections, value)[0] for value in (1.0, 2.0))
        check_flow(R, R_of_double, subject, instead)
        for done, count in enumerate(counts, 1):
            _, scores = measure(params, masks, collections, 1.0)
            masks = strongest(jax.device_get(scores), masks, count, "the 'synflow' score")
            if show:
                show(done, len(counts))
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
