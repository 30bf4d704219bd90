"""Loss and accuracy on a held-out set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dst import hosts
from dst.axis import AXIS
from dst.connections.execution import forward
from dst.data import Dataset
from dst.data import pipeline as data
from dst.network import Network
from dst.state import SparseState
from dst.update import parallel, replicate


def make_evaluate(
    config: ConfigDict, dataset: Dataset, net: Network, devices: list, images: Any, labels: Any
) -> Callable[[SparseState], dict[str, float]]:
    """`evaluate(state)` -> mean loss and accuracy over all of `images`, whatever the batch size."""
    count = len(labels)
    share = min(-(-config.eval_batch_size // len(devices)), -(-count // len(devices)))
    batch = share * len(devices)
    # Padded with images of weight 0, so that every batch has one shape.
    padding = -count % batch
    images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.zeros(padding, labels.dtype)])
    weights = np.concatenate([np.ones(count, np.float32), np.zeros(padding, np.float32)])
    held = replicate((images, labels, weights), devices)

    def body(params, connections, collections, held, start, device):
        begin = start + device * share
        x, y, w = (jax.lax.dynamic_slice_in_dim(a, begin, share) for a in held)
        x = data.normalise(x, dataset.mean, dataset.std)
        logits: Any = forward(net, params, connections, collections, x, train=False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        sums = jnp.sum(w * loss), jnp.sum(w * (logits.argmax(-1) == y))
        return jax.lax.psum(sums, AXIS)

    step = parallel(body, (None, None, None, None, None, 0), devices)
    index = hosts.local_indices(devices)

    def evaluate(state: SparseState) -> dict[str, float]:
        network = state.params, state.masks, state.batch_stats
        sums = [step(*network, held, start, index) for start in range(0, len(labels), batch)]
        loss, correct = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0) / count
        return {"loss": float(loss), "accuracy": float(correct)}

    return evaluate
