"""The state of a run: arrays only, one immutable pytree. A checkpoint is this and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from dst.masks import fan_in_weights, layer_counts, random_mask
from dst.methods import Method
from dst.moments import recognise
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
    """Immutable training state; inactive connections are exactly 0 in `params` and `opt_state`."""

    step: Array  # int32 ()
    params: Any
    batch_stats: Any  # every other variable collection of the model
    masks: dict[str, Array]  # layer path -> bool, the kernel's shape
    opt_state: optax.OptState
    key: Array  # all randomness is fold_in(key, step)
    method: Any  # the method's own arrays
    progress: Progress


def fresh_progress() -> Progress:
    """Progress before the first epoch."""
    return Progress(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.float32(3e38), jnp.int32(0))


def init_state(
    net: Network, tx: optax.GradientTransformation, method: Method, key: Array
) -> SparseState:
    """A network of exactly K random connections: G(n, M) masks, fan-in scaled weights (Sec. 4.1).

    Everything but the sparse kernels comes from the model's own initialisers. Errors: an optimizer
    whose state `dst` cannot keep sparse.
    """
    mask_key, weight_key, model_key, run_key = jax.random.split(key, 4)
    shapes = {path: layer.shape for path, layer in net.layers.items()}
    counts = layer_counts(shapes, method.sparsity, method.distribution)
    masks, kernels = {}, {}
    for i, (path, shape) in enumerate(shapes.items()):
        mask = random_mask(jax.random.fold_in(mask_key, i), shape, counts[path])
        weights = fan_in_weights(jax.random.fold_in(weight_key, i), mask, method.gain)
        kernels[path] = jnp.asarray(weights)
        masks[path] = jnp.asarray(mask)
    variables = init_rest(net, model_key)
    params = with_kernels(variables.pop("params", {}), kernels)
    recognise(jax.eval_shape(tx.init, params), params, masks)
    return SparseState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables,
        masks=masks,
        opt_state=tx.init(params),
        key=run_key,
        method=(),
        progress=fresh_progress(),
    )


def init_rest(net: Network, key: Array) -> dict[str, Any]:
    """All variables of the model but its sparse kernels, from the model's own initialisers."""

    # Jitted, so that XLA drops the forward pass and the kernels, which nothing uses.
    @jax.jit
    def init(key):
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), net.args)
        variables = flax.core.unfreeze(net.model.init(key, *zeros, **net.kwargs))
        flat = traverse_util.flatten_dict(variables.get("params", {}), sep="/")
        rest = {k: v for k, v in flat.items() if k.removesuffix("/kernel") not in net.layers}
        return {**variables, "params": traverse_util.unflatten_dict(rest, sep="/")}

    return init(key)


def kernels_of(params: Any, masks: Mapping[str, Any]) -> dict[str, Array]:
    """{layer path: kernel} of the sparse layers, in the order of `masks`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: flat[f"{path}/kernel"] for path in masks}


def with_kernels(params: Any, kernels: Mapping[str, Array]) -> Any:
    """`params` with these kernels in the place of their own."""
    flat = traverse_util.flatten_dict(params, sep="/")
    flat |= {f"{path}/kernel": kernel for path, kernel in kernels.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def sparsity_of(masks: Mapping[str, Array]) -> float:
    """Share of inactive connections, from exact counts on the host."""
    active = sum(int(np.count_nonzero(m)) for m in masks.values())
    return 1.0 - active / sum(m.size for m in masks.values())
