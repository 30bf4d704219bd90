"""The state of a run: arrays only, one immutable pytree. A checkpoint is this and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dst.connections.base import Connections
from dst.connections.execution import EXECUTIONS, init_rest
from dst.connections.initial import fan_in_weights, random_positions
from dst.connections.moments import recognise
from dst.errors import ConfigError
from dst.methods.combinations import check, check_execution
from dst.methods.distributions import active_count, layer_counts
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
    masks: Any  # A: `Masks`, layer path -> bool of the kernel's shape; or an `Arena`
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

    def layers():
        for l, (layer, count) in enumerate(zip(net.layers.values(), counts.values(), strict=True)):
            position = random_positions(jax.random.fold_in(mask_key, l), layer.size, count)
            seed, output = jax.random.fold_in(weight_key, l), position % layer.n_out
            yield position, fan_in_weights(seed, output, layer.n_out, method.gain)

    variables = init_rest(net, model_key)
    params = variables.pop("params")
    execution = EXECUTIONS[net.execution]
    execution.refuse(net, tx, params)
    A, values = execution.connect(net, counts, layers())
    params = A.put(params, values)
    recognise(jax.eval_shape(tx.init, params), params, values)
    own = first_memory(method, A, values, jax.random.fold_in(weight_key, len(net.layers)))
    return SparseState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables,
        masks=A,
        opt_state=tx.init(params),
        key=run_key,
        method=own,
        progress=fresh_progress(),
    )


def active_counts(connections: Connections) -> dict[str, Array]:
    """Connections of each layer: int32 scalars."""
    paths = [part.layer.path for part in connections.parts]
    return dict(zip(paths, connections.counts(), strict=True))


def sparsity_of(connections: Connections) -> float:
    """Share of inactive connections, from exact counts on the host."""
    return connections.sparsity()
