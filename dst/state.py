"""The state of a run: arrays only, one immutable pytree. A checkpoint is this and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dst.connections.base import Connections
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


# Every use of randomness in a step folds its own constant into fold_in(key, step).
DROPOUT_STREAM, REWIRE_STREAM, BATCH_STREAM = 0, 1, 2
TIE_STREAM, CHANCE_STREAM = 5, 6  # hashes of connections; 3 and 4 are GraEst's and experiments'
MODEL_STREAM, LOSS_STREAM = 7, 8  # beside dropout, the model's other streams; the loss's own key


def stream(state: SparseState, purpose: int) -> Array:
    """The step's random key for one purpose: fold_in(fold_in(key, step), purpose)."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def active_counts(connections: Connections) -> dict[str, Array]:
    """Connections of each layer: int32 scalars."""
    paths = [part.layer.path for part in connections.parts]
    return dict(zip(paths, connections.counts(), strict=True))


def sparsity_of(source: SparseState | Connections, net: Network | None = None) -> float:
    """Share of inactive connections, of a state or its `masks`, from exact counts on the host.

    Of the layers that are sparse, or, given the network, of all its weights of two axes or more:
    the overall sparsity, in which what stays dense counts too.
    """
    connections = source.masks if isinstance(source, SparseState) else source
    sparsity = connections.sparsity()
    return sparsity if net is None else net.overall(sparsity)
