"""Image data sets for the examples: the batch of a step, and the accuracy on the test set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import dst
from dst.data import Dataset, pipeline


def batches(data: Dataset, size: int, key: jax.Array) -> tuple[Callable[[int], Any], int]:
    """`batch(step)`, shuffled and augmented images and their labels, and how many are an epoch."""
    n = len(data.train_labels)
    per_epoch = pipeline.steps_per_epoch(n, size)
    order = functools.lru_cache(maxsize=1)(lambda epoch: pipeline.epoch_order(key, epoch, n))
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    @jax.jit
    def prepared(order, step):
        x, y = pipeline.batch(images, labels, order, step, size)
        x = pipeline.augment(data.augment, jax.random.fold_in(key, step), x)
        return pipeline.normalise(x, data.mean, data.std), y

    return lambda step: prepared(order(step // per_epoch), step), per_epoch


def accuracy(net: dst.Network, data: Dataset, state: dst.SparseState) -> dict[str, float]:
    """Of the test set, 500 images at a time."""
    predict, right = dst.predictor(net, state), 0
    for n in range(0, len(data.test_labels), 500):
        images = pipeline.normalise(data.test_images[n : n + 500], data.mean, data.std)
        right += int((predict(images).argmax(-1) == data.test_labels[n : n + 500]).sum())
    return {"test_accuracy": right / len(data.test_labels)}
