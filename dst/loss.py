"""The loss of a step: what a user's function is given and must return, and how it is run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from flax.core import tracers
from flax.core.scope import in_filter, subtract_filters, union_filters

from dst.arguments import check_returned, described, takes_key
from dst.axis import AXIS, bound
from dst.connections.arena import VALUES
from dst.connections.execution import forward
from dst.errors import ConfigError, quoted
from dst.network import Network
from dst.sown import entries
from dst.state import DROPOUT_STREAM, LOSS_STREAM, MODEL_STREAM, SparseState, stream

Array = jax.Array

# loss(apply, batch) -> (mean loss, {metric: mean}), of a device's rows of the batch.
#
# apply(*inputs) runs the model as in training: it may draw, and what it writes, as batch
# normalisation its statistics, is kept. A flag of the model's own is given here, as in
# apply(x, train=True): the keyword arguments of dst.network are for discovery and prediction. As in
# Flax, apply(*inputs, mutable=["losses"]) is (outputs, {"losses": what the model sowed}), and
# method= and rngs= are what they are there. Random streams of any name have keys of their own
# without rngs=, which differ by step, device and call.
#
# loss(apply, batch, key), its third parameter called so, is given a key that differs by step and
# device too, for noise, mixup and the like; a rewire sees the same as the update that follows.
#
# On several devices what they return is averaged, all alike, and so is the gradient. For plain
# means over rows that is the mean over the batch. A loss that divides by a sum of its own (weights,
# a mask) would give the mean of the devices' ratios: `weighted_mean(values, weights)` is right, and
# so is division by that sum's mean over the devices, jax.lax.pmean(weights.sum(), "devices").
# Metrics are means too, each one number: of a count, that of a device.
Loss = Callable[..., tuple[Array, Mapping[str, Array]]]


def weighted_mean(values: Array, weights: Array) -> Array:
    """sum w v / sum w over the whole batch, from a loss on each device's rows: (b, ...) -> ().

    The mean over devices, which a step takes, of sum w v / (mean over devices of sum w); outside a
    step of what is given. Raises: weights that are not of the values' shape.
    """
    if jnp.shape(weights) != jnp.shape(values):
        raise ConfigError(
            f"weights must be of the shape of values, {jnp.shape(values)}, not "
            f"{jnp.shape(weights)}."
        )
    weights = jnp.asarray(weights, jnp.result_type(values, jnp.float32))
    total = weights.sum()
    return (weights * values).sum() / (jax.lax.pmean(total, AXIS) if bound(AXIS) else total)


class Run(struct.PyTreeNode):
    loss: Array
    metrics: Mapping[str, Array]
    collections: Any


def run_loss(
    net: Network,
    loss: Loss,
    params: Any,
    state: SparseState,
    batch: Any,
    extra: Mapping[str, Any] | None = None,
) -> tuple[Array, Run]:
    """The loss on one batch, in train mode; `state` stays, new statistics come back."""
    updated = dict(state.batch_stats)
    device = jax.lax.axis_index(AXIS)
    key = lambda purpose: jax.random.fold_in(stream(state, purpose), device)  # noqa: E731
    dropout, other = key(DROPOUT_STREAM), key(MODEL_STREAM)
    calls = itertools.count()  # a loss may run the model several times, each with its own dropout
    ours = ["params", VALUES, *(extra or {})]
    rows, outside = jax.tree.leaves(batch), tracers.current_trace()

    def apply(*args, mutable: Any = False, rngs: Any = None, **kwargs):
        call = next(calls)
        if "method" not in kwargs:
            _refuse_unbatched(net, rows, args)
        # Flax draws from "params" whatever has no stream of its own.
        own = {"dropout": dropout, "params": other}
        own = {name: jax.random.fold_in(key, call) for name, key in own.items()}
        rngs = rngs if rngs is None or isinstance(rngs, Mapping) else {"params": rngs}
        written = subtract_filters(union_filters(mutable, list(state.batch_stats)), ours)
        outputs, new = forward(
            net,
            params,
            state.masks,
            {**updated, **(extra or {})},
            *args,
            frozen=extra is not None,  # probes are asked for, not parameters
            chain=tracers.current_trace() == outside,
            rngs={**own, **(rngs or {})},
            mutable=written,
            **kwargs,
        )
        kept = _statistics(net, state, new)
        if kept and tracers.current_trace() != outside:
            raise ConfigError(
                f"apply writes {'/'.join(min(entries(kept)))!r} under jax.vmap or another "
                "transformation of the loss, which it cannot leave; call apply on the whole batch."
            )
        updated.update(kept)
        if mutable is False:
            return outputs
        return outputs, {name: c for name, c in new.items() if in_filter(mutable, name)}

    own_key = {"key": key(LOSS_STREAM)} if takes_key(loss) else {}
    value, metrics = check_returned(_called(loss, apply, batch, own_key))
    if next(calls) == 0:
        raise ConfigError(
            "loss never calls apply, its first argument: apply(*inputs) runs the model on the "
            "state's parameters, in place of model.apply(variables, *inputs)."
        )
    value = jnp.asarray(value, jnp.float32)
    metrics = jax.tree.map(inexact, metrics)
    return value, Run(value, metrics, updated)


def _called(loss: Loss, apply: Callable, batch: Any, key: Mapping[str, Array]) -> Any:
    """What the loss returns. Raises: one that takes `apply` for parameters, a stream that is lost.

    All else that it raises is its own.
    """
    try:
        return loss(apply, batch, **key)
    except VARIABLES as error:
        raise ConfigError(
            f"loss fails with {quoted(error)}; its first argument is a function: apply(*inputs) "
            "runs the model, in place of model.apply(variables, *inputs)."
        ) from error
    except flax.errors.InvalidRngError as error:  # nn.scan and nn.vmap hand on streams by name
        raise ConfigError(
            f"loss fails with {quoted(error)}; give the stream as apply(*inputs, "
            'rngs={"its name": key}), from loss(apply, batch, key).'
        ) from error


VARIABLES = (
    flax.errors.ApplyScopeInvalidVariablesTypeError,
    flax.errors.ApplyScopeInvalidVariablesStructureError,
)


def _refuse_unbatched(net: Network, rows: list[Any], args: tuple) -> None:
    """Raises: an array of the batch itself with one axis less than the example has in its place."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (args, net.args)]
    if structures[0] != structures[1]:
        return
    for leaf, example in zip(jax.tree.leaves(args), jax.tree.leaves(net.args), strict=True):
        mine = any(leaf is row for row in rows)
        if mine and jnp.ndim(leaf) == len(example.shape) - 1:
            raise ConfigError(
                f"batch must have a batch axis before all others: apply is given {described(leaf)} "
                f"where dst.network had {tuple(example.shape)}."
            )


def _statistics(net: Network, state: SparseState, new: Mapping[str, Any]) -> dict[str, Any]:
    """The state's collections as a call leaves them, without what it sowed.

    Raises: a variable that the state does not have, whose shape would then change.
    """
    kept = entries({name: c for name, c in new.items() if name in state.batch_stats})
    kept = {path: leaf for path, leaf in kept.items() if path not in net.sown}
    if more := kept.keys() - entries(state.batch_stats).keys():
        raise ConfigError(
            f"the loss makes the model add {'/'.join(min(more))!r} to its variables; give "
            "dst.network the arguments with which it makes them all, and sow into a collection "
            "that has no variables."
        )
    return traverse_util.unflatten_dict(kept)


def inexact(metric: Any) -> Array:
    """A metric as a float, for its mean over devices to be one: counts and bools as float32."""
    metric = jnp.asarray(metric)
    floats = jnp.issubdtype(metric.dtype, jnp.inexact)
    return metric if floats else metric.astype(jnp.float32)
