"""The training step, on either kind of connections; the only place that says pmap.

JAX's maintainers have put pmap into maintenance. DST_MAP=shard_map maps the same functions with
jit(shard_map) instead, on the devices of one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dst import hosts
from dst.arguments import check_devices, check_is, described, form, is_key, takes_key
from dst.axis import AXIS
from dst.connections.execution import EXECUTIONS, slower
from dst.connections.moments import recognise
from dst.errors import ConfigError, check_value, one_of
from dst.loss import Loss, run_loss
from dst.methods.memory import after_step, refuse_waiting
from dst.network import Network
from dst.optimizer import check_optimizer, extended
from dst.state import SparseState

LOGGER = logging.getLogger("dst")
Array = jax.Array


def parallel(f: Callable, in_axes: Any, devices: list | None = None, donate: tuple[int, ...] = ()):
    """`f` on every device: arguments split where `in_axes` is 0, replicated where it is None.

    With several processes `devices` are those of all, but arguments and results stay in a process:
    it gives the part of a split one that belongs to its own devices, as `split_batch` does.

    What `f` returns must be equal on all devices (averaged inside with pmean or psum): the state
    has no device axis, and is the same pytree on 1 and on N devices.
    """
    name = os.environ.get("DST_MAP", "pmap")
    check_value("DST_MAP", name, one_of(MAPS))
    mapped = MAPS[name](f, in_axes, devices, donate)
    devices = devices or hosts.devices()
    if devices[0].platform != "cpu" or len(devices) == 1:
        return mapped
    # Several calls in flight deadlock in the thread pool that virtual CPU devices share.
    return lambda *args: jax.block_until_ready(mapped(*args))


def _pmap(f: Callable, in_axes: Any, devices: list | None, donate: tuple[int, ...]) -> Callable:
    return jax.pmap(
        f, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=devices, donate_argnums=donate
    )


def _shard_map(
    f: Callable, in_axes: Any, devices: list | None, donate: tuple[int, ...]
) -> Callable:
    devices = devices or hosts.devices()
    if len(hosts.local_indices(devices)) < len(devices):
        raise ConfigError(
            "DST_MAP must be 'pmap' where several processes share the devices, not 'shard_map'."
        )

    def on_each(*args: Any) -> Any:
        own = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
        given = zip(args, in_axes, strict=True)
        return f(*(tree if axis is None else own(tree) for tree, axis in given))

    mesh = Mesh(np.asarray(devices), (AXIS,))
    specs = tuple(PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in in_axes)
    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)


MAPS = {"pmap": _pmap, "shard_map": _shard_map}


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
    """Leaves (B, ...) -> this process's rows of (D, B / D, ...).

    Raises: D does not divide B, something without rows.
    """
    devices = devices or hosts.devices()
    count, own = len(devices), hosts.local_indices(devices)

    def split(leaf):
        if not hasattr(leaf, "shape") or not len(leaf.shape) or not leaf.shape[0]:
            key = "; a loss(apply, batch, key) is given a key" if is_key(leaf) else ""
            raise ConfigError(f"batch must hold arrays (B, ...), not {described(leaf)}{key}.")
        if leaf.shape[0] % count:
            raise ConfigError(
                f"batch_size is {leaf.shape[0]}; allowed are multiples of the {count} devices."
            )
        rows = jnp.reshape(leaf, (count, leaf.shape[0] // count, *leaf.shape[1:]))
        return rows if len(own) == count else rows[own]

    if not jax.tree.leaves(batch):
        raise ConfigError(f"batch must hold arrays (B, ...), not {batch!r}.")
    return jax.tree.map(split, batch)


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


def all_finite(tree: Any) -> Array:
    """Whether every float of the tree is finite: bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def refuse_other_layers(net: Network, state: SparseState) -> None:
    """Raises: a state whose sparse layers are not those of the network."""
    theirs = {part.layer.path: part.layer.shape for part in state.masks.parts}
    ours = {path: layer.shape for path, layer in net.layers.items()}
    for path in {**ours, **theirs}:
        was, now = (shapes.get(path, "missing") for shapes in (theirs, ours))
        if was != now:
            raise ConfigError(
                f"state is of another network: layer {path!r} is {was} in it, and {now} in net."
            )


def refuse_another(net: Network, tx: optax.GradientTransformation, state: SparseState) -> None:
    """Raises: a state of another network or optimizer. Asked while a step is traced."""
    if not isinstance(state.masks, EXECUTIONS[net.execution].kind):
        raise ConfigError(
            f"state is of another network, not one of execution {net.execution!r}; init_state(net, "
            "tx, method, key) makes one, from weights or a file of dst.export with params=."
        )
    refuse_other_layers(net, state)
    fresh = jax.eval_shape(tx.init, state.params)
    structure: Any = jax.tree.structure
    same = structure(fresh) == structure(state.opt_state)
    if not same or not jax.tree.all(jax.tree.map(_same_shape, fresh, state.opt_state)):
        raise ConfigError(
            "tx must be the optimizer that init_state was given; the state of this one is "
            f"{form(fresh)}, and state.opt_state is {form(state.opt_state)}."
        )


def _same_shape(one: Any, other: Any) -> bool:
    return one.shape == other.shape


def tell_frozen(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Says in the log, while a step is traced, that batch normalisation learns no statistics."""
    pairs = zip(*(jax.tree.leaves(c.get("batch_stats", {})) for c in (before, after)), strict=True)
    if (same := [one is other for one, other in pairs]) and all(same):
        LOGGER.warning(
            "The loss leaves all batch_stats as they are; a model with a flag is told to train by "
            "apply(x, train=True), or whatever its name is."
        )


def update_body(net: Network, tx: optax.GradientTransformation, loss: Loss) -> Callable:
    """One step on one device's share of the batch: (state, batch) -> (state, metrics)."""
    check_is("net", net, Network, "dst.network(model, x)")
    check_optimizer(tx)
    takes_key(loss)
    step = extended(tx).update

    def body(state: SparseState, batch: Any) -> tuple[SparseState, dict[str, Array]]:
        refuse_another(net, tx, state)
        refuse_waiting(state.method)
        A = state.masks
        owners = recognise(state.opt_state, state.params, A.kernels(state.params))
        objective = lambda params: run_loss(net, loss, params, state, batch)  # noqa: E731
        gradients, run = jax.grad(objective, has_aux=True)(state.params)
        tell_frozen(state.batch_stats, run.collections)
        gradients, run = jax.tree.map(average, (gradients, run))
        finite = all_finite((run.loss, gradients))
        own = after_step(state.method, A.kernels(gradients))
        gradients = A.only_existing(gradients)
        more = {"value": run.loss, "grad": gradients}  # for those that ask
        updates, opt_state = step(gradients, state.opt_state, state.params, **more)
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
    divides by weights. An optimizer that asks for value= is given the loss, and grad= its gradient.
    Raises ConfigError: a state of another network or optimizer, a loss that is not as `Loss` says.
    With `donate` the new state takes the memory of the old one, which is then gone.
    Weights, gradients and moments of inactive connections are exactly 0 before and after.
    """
    check_devices(devices)
    step = parallel(update_body(net, tx, loss), (None, 0), devices, (0,) if donate else ())
    if words := slower(net):
        LOGGER.warning("Sparse execution: %s.", words)
    place = placer(devices)

    def update(state: SparseState, batch: Any):
        check_is("state", state, SparseState, "dst.init_state(net, tx, method, key)")
        return step(place(state), split_batch(batch, devices))

    return update
