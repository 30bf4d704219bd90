"""The training step, on either kind of connections; the only place that says pmap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from flax.core.scope import in_filter, subtract_filters, union_filters
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dst import hosts
from dst.connections.arena import VALUES
from dst.connections.execution import forward
from dst.connections.moments import recognise
from dst.errors import ConfigError
from dst.methods.memory import after_step, refuse_waiting
from dst.network import Network
from dst.sown import entries
from dst.state import SparseState

Array = jax.Array
AXIS = "devices"

# loss(apply, batch) -> (mean loss, {metric: mean}), of a device's rows of the batch; apply(*inputs)
# runs the model in train mode. What the devices give is averaged, all alike: for plain means over
# rows that is the mean over the batch. A loss that divides by a sum of its own (weights, a mask)
# would give the mean of the devices' ratios: let it divide by that sum's mean over the devices,
# jax.lax.pmean(weights.sum(), AXIS). Metrics are means too: of a count, that of a device.
# As in Flax, apply(*inputs, mutable=["losses"]) is (outputs, {"losses": what the model sowed}).
Loss = Callable[[Callable[..., Any], Any], tuple[Array, Mapping[str, Array]]]

# Every use of randomness in a step folds its own constant into fold_in(key, step).
DROPOUT_STREAM, REWIRE_STREAM, BATCH_STREAM = 0, 1, 2
TIE_STREAM, CHANCE_STREAM = 5, 6  # hashes of connections; 3 and 4 are GraEst's and experiments'


def stream(state: SparseState, purpose: int) -> Array:
    """The step's random key for one purpose: fold_in(fold_in(key, step), purpose)."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def parallel(f: Callable, in_axes: Any, devices: list | None = None, donate: tuple[int, ...] = ()):
    """`f` on every device: arguments split where `in_axes` is 0, replicated where it is None.

    With several processes `devices` are those of all, but arguments and results stay in a process:
    it gives the part of a split one that belongs to its own devices, as `split_batch` does.

    What `f` returns must be equal on all devices (averaged inside with pmean or psum): the state
    has no device axis, and is the same pytree on 1 and on N devices.
    """
    mapped = jax.pmap(
        f, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=devices, donate_argnums=donate
    )
    devices = devices or hosts.devices()
    if devices[0].platform != "cpu" or len(devices) == 1:
        return mapped
    # Several calls in flight deadlock in the thread pool that virtual CPU devices share.
    return lambda *args: jax.block_until_ready(mapped(*args))


def replicate(tree: Any, devices: list | None = None) -> Any:
    """`tree` on every device of this process, as `parallel` returns it: nothing compiles twice."""
    return jax.device_put(tree, _everywhere(devices))


def _everywhere(devices: list | None) -> NamedSharding:
    devices = devices or hosts.devices()
    mesh = Mesh(np.asarray([devices[i] for i in hosts.local_indices(devices)]), (AXIS,))
    return NamedSharding(mesh, PartitionSpec())


def placer(devices: list | None = None) -> Callable[[Any], Any]:
    """`replicate` for what may be there already, as all but the first state of a loop are.

    To look costs 0.1 ms for 300 arrays; `parallel` would compile anew for others.
    """
    there = _everywhere(devices)

    def place(tree: Any) -> Any:
        where = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
        return tree if all(s is there or s == there for s in where) else jax.device_put(tree, there)

    return place


def split_batch(batch: Any, devices: list | None = None) -> Any:
    """Leaves (B, ...) -> this process's rows of (D, B / D, ...). Raises: D does not divide B."""
    devices = devices or hosts.devices()
    count, own = len(devices), hosts.local_indices(devices)

    def split(leaf):
        if not jnp.ndim(leaf):
            raise ConfigError(f"batch must hold arrays (B, ...), not {leaf!r}.")
        if leaf.shape[0] % count:
            raise ConfigError(
                f"batch_size is {leaf.shape[0]}; allowed are multiples of the {count} devices."
            )
        rows = jnp.reshape(leaf, (count, leaf.shape[0] // count, *leaf.shape[1:]))
        return rows if len(own) == count else rows[own]

    return jax.tree.map(split, batch)


class _Run(struct.PyTreeNode):
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
) -> tuple[Array, _Run]:
    """The loss on one batch, in train mode; `state` stays, new statistics come back."""
    updated = dict(state.batch_stats)
    key = jax.random.fold_in(stream(state, DROPOUT_STREAM), jax.lax.axis_index(AXIS))
    calls = itertools.count()  # a loss may run the model several times, each with its own dropout
    ours = ["params", VALUES, *(extra or {})]

    def apply(*args, mutable: Any = False, rngs: Any = None, **kwargs):
        own = {"dropout": jax.random.fold_in(key, next(calls))}
        rngs = rngs if rngs is None or isinstance(rngs, Mapping) else {"params": rngs}
        written = subtract_filters(union_filters(mutable, list(state.batch_stats)), ours)
        outputs, new = forward(
            net,
            params,
            state.masks,
            {**updated, **(extra or {})},
            *args,
            frozen=extra is not None,  # probes are asked for, not parameters
            rngs={**own, **(rngs or {})},
            mutable=written,
            **kwargs,
        )
        updated.update(_statistics(net, state, new))
        if mutable is False:
            return outputs
        return outputs, {name: c for name, c in new.items() if in_filter(mutable, name)}

    value, metrics = loss(apply, batch)
    value = value.astype(jnp.float32)
    metrics = jax.tree.map(inexact, metrics)
    return value, _Run(value, metrics, updated)


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


def average(leaf: Array) -> Array:
    """Mean over the devices, of its own type: integers are rounded down, a bool is that of any.

    So what is equal on all, as a model's own counters are, stays what it is.
    """
    devices = jax.lax.axis_size(AXIS)
    if devices == 1:
        return leaf  # XLA would copy it
    if leaf.dtype == jnp.bool_:
        return jax.lax.psum(leaf.astype(jnp.int32), AXIS) > 0
    if jnp.issubdtype(leaf.dtype, jnp.integer):  # in two parts, or the sum may overflow
        whole, rest = jnp.divmod(leaf, devices)
        return jax.lax.psum(whole, AXIS) + jax.lax.psum(rest, AXIS) // devices
    return jax.lax.pmean(leaf, AXIS) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def inexact(metric: Any) -> Array:
    """A metric as a float, for its mean over devices to be one: counts and bools as float32."""
    metric = jnp.asarray(metric)
    floats = jnp.issubdtype(metric.dtype, jnp.inexact)
    return metric if floats else metric.astype(jnp.float32)


def all_finite(tree: Any) -> Array:
    """Whether every float of the tree is finite: bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def update_body(net: Network, tx: optax.GradientTransformation, loss: Loss) -> Callable:
    """One step on one device's share of the batch: (state, batch) -> (state, metrics)."""

    def body(state: SparseState, batch: Any) -> tuple[SparseState, dict[str, Array]]:
        refuse_waiting(state.method)
        A = state.masks
        owners = recognise(state.opt_state, state.params, A.kernels(state.params))
        objective = lambda params: run_loss(net, loss, params, state, batch)  # noqa: E731
        gradients, run = jax.grad(objective, has_aux=True)(state.params)
        gradients, run = jax.tree.map(average, (gradients, run))
        finite = all_finite((run.loss, gradients))
        own = after_step(state.method, A.kernels(gradients))
        gradients = A.only_existing(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = A.only_existing(optax.apply_updates(state.params, updates))
        opt_state = A.reset_missing(opt_state, tx.init(params), owners)
        seen = state.progress
        progress = seen.replace(
            loss_sum=seen.loss_sum + run.loss,
            correct_sum=seen.correct_sum + run.metrics.get("accuracy", jnp.float32(0)),
            count=seen.count + 1,
        )
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=run.collections,
            opt_state=opt_state,
            method=own,
            progress=progress,
        )
        return state, {"loss": run.loss, **run.metrics, "finite": finite}

    return body


def make_update(
    net: Network,
    tx: optax.GradientTransformation,
    loss: Loss,
    *,
    devices: list | None = None,
    donate: bool = False,
) -> Callable[[SparseState, Any], tuple[SparseState, dict[str, Array]]]:
    """The jitted update step: (state, batch) -> (state, metrics), on all `devices`.

    `batch` is any pytree of arrays (B, ...), split over the devices; B must be divisible by them.
    Loss and metrics are means over the devices, each of its own rows: see `Loss` for one that
    divides by weights.
    With `donate` the new state takes the memory of the old one, which is then gone.
    Weights, gradients and moments of inactive connections are exactly 0 before and after.
    """
    step = parallel(update_body(net, tx, loss), (None, 0), devices, (0,) if donate else ())
    place = placer(devices)

    def update(state: SparseState, batch: Any):
        return step(place(state), split_batch(batch, devices))

    return update
