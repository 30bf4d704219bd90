"""The state of a run: arrays only, one immutable pytree. A checkpoint is this and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from dst.connections.arena import VALUES, Arena, Connections, fill, lay_out
from dst.connections.execution import init_rest
from dst.connections.masks import active_count, fan_in_weights, layer_counts, random_positions
from dst.connections.moments import recognise, refuse_unless_coordinate_wise
from dst.errors import ConfigError
from dst.methods.combinations import check, check_execution
from dst.methods.memory import first_memory
from dst.methods.table import Method
from dst.network import Network

Array = jax.Array


class Progress(struct.PyTreeNode):
    """What the training loop must remember of the epoch and of early stopping."""

    loss_sum: Array  # float32 (), over the epoch's steps
    correct_sum: Array  # float32 (), mean accuracy over the epoch's steps
    count: Array  # int32 (), steps of this epoch
    best_loss: Array  # float32 (), 3e38 before the first epoch: a checkpoint holds no infinity
    stale_epochs: Array  # int32 (), epochs since best_loss


class SparseState(struct.PyTreeNode):
    """Immutable training state: what is inactive is exactly 0 in `params` and `opt_state`.

    In sparse execution it is not there at all: see `dst.connections.arena`.
    """

    step: Array  # int32 ()
    params: Any
    batch_stats: Any  # every other variable collection of the model
    masks: Any  # layer path -> bool, the kernel's shape; or the arena's structure
    opt_state: optax.OptState
    key: Array  # all randomness is fold_in(key, step)
    method: Any  # what the method remembers, see `dst.methods.memory`
    progress: Progress


def fresh_progress() -> Progress:
    """Progress before the first epoch."""
    return Progress(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.float32(3e38), jnp.int32(0))


def first_counts(net: Network, method: Method) -> dict[str, int]:
    """Connections of each layer at step 0; their sum is K."""
    shapes = {path: layer.shape for path, layer in net.layers.items()}
    return layer_counts(shapes, method.first_sparsity, method.distribution)


def count_of(net: Network, sparsity: float) -> int:
    """K = N - round(N s). Errors: no connection is left."""
    N = net.possible
    K = active_count(N, sparsity)
    if not K:
        raise ConfigError(
            f"sparsity is {sparsity}, which leaves none of the {N} possible connections; the "
            f"highest that keeps one is {_highest(N)}."
        )
    return K


def _highest(N: int) -> float:
    """The highest sparsity of so many digits as N has, and one more, that keeps a connection."""
    unit = 10 ** (len(str(N)) + 1)
    most = unit - unit // (2 * N)
    return next(s for s in (n / unit for n in range(most, 0, -1)) if active_count(N, s))


def init_state(
    net: Network, tx: optax.GradientTransformation, method: Method, key: Array
) -> SparseState:
    """A network of exactly K random connections: G(n, M) masks, fan-in scaled weights (Sec. 4.1).

    Everything but the sparse kernels comes from the model's own initialisers, and the same key
    gives both executions the same network. A method that prunes before training begins with all
    connections, and the state says so: it does not train before `prune_at_init` or a Lottery
    ticket. Errors: an optimizer whose state `dst` cannot keep sparse, a method that cannot run in
    the network's execution, a sparsity that leaves no connection.
    """
    check(method)
    check_execution(method, net.execution)
    count_of(net, method.sparsity)
    mask_key, weight_key, model_key, run_key = jax.random.split(key, 4)
    counts = first_counts(net, method)

    def connections():
        for l, (layer, count) in enumerate(zip(net.layers.values(), counts.values(), strict=True)):
            position = random_positions(jax.random.fold_in(mask_key, l), layer.size, count)
            seed, output = jax.random.fold_in(weight_key, l), position % layer.n_out
            yield position, fan_in_weights(seed, output, layer.n_out, method.gain)

    variables = init_rest(net, model_key)
    params = variables.pop("params")
    masks: Any
    own: dict[str, Any] = {}
    if net.execution == "sparse":
        refuse_unless_coordinate_wise(tx, params, net.layers)
        masks, values = fill(lay_out(net, counts), connections())
        params = {**params, VALUES: {"kernel": jnp.asarray(values)}}
        recognise(jax.eval_shape(tx.init, params), params, {VALUES: values})
    else:
        masks, kernels = densely(net, connections())
        params = with_kernels(params, kernels)
        recognise(jax.eval_shape(tx.init, params), params, masks)
        own = first_memory(method, masks, kernels, jax.random.fold_in(weight_key, len(masks)))
    return SparseState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables,
        masks=masks,
        opt_state=tx.init(params),
        key=run_key,
        method=own,
        progress=fresh_progress(),
    )


def densely(net: Network, connections: Iterable) -> tuple[dict[str, Array], dict[str, Array]]:
    """Masks and kernels of masked execution, from each layer's flat positions and values."""
    masks, kernels = {}, {}
    for layer, (position, weights) in zip(net.layers.values(), connections, strict=True):
        mask, kernel = np.zeros(layer.size, bool), np.zeros(layer.size, np.float32)
        mask[position], kernel[position] = True, weights
        masks[layer.path] = jnp.asarray(mask.reshape(layer.shape))
        kernels[layer.path] = jnp.asarray(kernel.reshape(layer.shape))
    return masks, kernels


def masks_of(state: SparseState) -> dict[str, Array]:
    """The masks of masked execution; none in sparse execution, where nothing is inactive."""
    return {} if isinstance(state.masks, Arena) else state.masks


def active_counts(connections: Connections) -> dict[str, Array]:
    """Connections of each layer: int32 scalars."""
    if isinstance(connections, Arena):
        paths = [part.layer.path for part in connections.parts]
        return dict(zip(paths, connections.counts(), strict=True))
    return {path: mask.sum(dtype=jnp.int32) for path, mask in connections.items()}


def kernels_of(params: Any, masks: Mapping[str, Any]) -> dict[str, Array]:
    """{layer path: kernel} of the sparse layers, in the order of `masks`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: flat[f"{path}/kernel"] for path in masks}


def join(by_layer: Mapping[str, Array]) -> Array:
    """All layers' entries in one vector, in layer order."""
    return jnp.concatenate([leaf.ravel() for leaf in by_layer.values()])


def with_kernels(params: Any, kernels: Mapping[str, Array]) -> Any:
    """`params` with these kernels in the place of their own."""
    flat = traverse_util.flatten_dict(params, sep="/")
    flat |= {f"{path}/kernel": kernel for path, kernel in kernels.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def sparsity_of(connections: Connections) -> float:
    """Share of inactive connections, from exact counts on the host."""
    if isinstance(connections, Arena):
        possible = sum(part.layer.size for part in connections.parts)
        return 1.0 - connections.column.size / possible
    active = sum(int(np.count_nonzero(m)) for m in connections.values())
    return 1.0 - active / sum(m.size for m in connections.values())
