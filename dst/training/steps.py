"""The jitted steps of a run: the configured model, optimizer and method on resident data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dst import hosts
from dst.data import Dataset
from dst.data import pipeline as data
from dst.methods.base import Method
from dst.methods.schedules import learning_rate
from dst.network import Network
from dst.rewire import on_host, rewire_body
from dst.state import BATCH_STREAM, SparseState, stream
from dst.update import parallel, replicate, update_body

Array = jax.Array


class Resident(NamedTuple):
    """The training set on the devices, and the order of the epoch."""

    images: Array  # uint8 (N, H, W, C)
    labels: Array  # int32 (N,)
    order: Array  # int32 (N,)


def classification(apply: Callable[..., Array], batch: tuple[Array, Array]):
    """Mean cross-entropy and accuracy of a classifier: images (B, ...), labels (B,)."""
    images, labels = batch
    logits = apply(images, train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}


def schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a step: dropped by a factor at some epochs."""
    return learning_rate(
        config.learning_rate, config.lr_drop_epochs, config.lr_drop_factor, steps_per_epoch
    )


def optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum as in PyTorch: v <- mu v + (g + lambda w); w <- w - lr v (Sec. 4.1).

    With DeepR's l1 also g + alpha sign(w), for kernels only.
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    sgd = optax.sgd(rate, config.momentum)
    return optax.chain(decay, *([lasso(config.l1)] if config.l1 else []), sgd)


def lasso(alpha: float) -> optax.GradientTransformation:
    """Adds alpha sign(w) to the gradients of all kernels."""

    def add(path: Any, g: Array, w: Array) -> Array:
        return g + alpha * jnp.sign(w) if path[-1].key == "kernel" else g

    return optax.stateless(
        lambda gradients, params: jax.tree_util.tree_map_with_path(add, gradients, params)
    )


class ScoringBatches:
    """The training set as it is, in its own order: what pruning before training looks at.

    Not augmented, the last batch smaller; `config.score_batches` takes only the first ones.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset):
        self.dataset, self.size = dataset, config.batch_size
        self.count = -(-len(dataset.train_labels) // config.batch_size)
        if config.score_batches:
            self.count = min(self.count, config.score_batches)

    @property
    def examples(self) -> int:
        """How many there are."""
        return min(self.count * self.size, len(self.dataset.train_labels))

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for n in range(self.count):
            part = slice(n * self.size, (n + 1) * self.size)
            images, labels = self.dataset.train_images[part], self.dataset.train_labels[part]
            inputs = data.normalise(jnp.asarray(images), self.dataset.mean, self.dataset.std)
            yield inputs, labels


# --------------------------------------------------------------------------- the batch of a step
def residents(dataset: Dataset, key: Array, devices: list) -> Callable[[int], Resident]:
    """`resident(epoch)` of the run with this key; the data are put on the devices once."""
    images, labels = replicate((dataset.train_images, dataset.train_labels), devices)
    order = jax.jit(data.epoch_order, static_argnums=2)
    own = jnp.array(jax.random.key_data(key))  # the state's buffers are donated

    @functools.lru_cache(maxsize=1)
    def resident(epoch: int) -> Resident:
        permutation = order(jax.random.wrap_key_data(own), epoch, len(labels))
        return Resident(images, labels, replicate(permutation, devices))

    return resident


def make_fetch(config: ConfigDict, dataset: Dataset, devices: int) -> Callable[..., tuple]:
    """`fetch(state, resident, device)`: that device's share of the batch of the state's step."""
    share = config.batch_size // devices

    def fetch(state: SparseState, resident: Resident, device: Array) -> tuple[Array, Array]:
        images, labels = data.batch(*resident, state.step, config.batch_size, device, devices)
        key = stream(state, BATCH_STREAM)
        images = data.augment(dataset.augment, key, images, first=device * share)
        return data.normalise(images, dataset.mean, dataset.std), labels

    return fetch


# ------------------------------------------------------------------------ the two jitted functions
class Steps(NamedTuple):
    """What the loop calls; the state has no device axis."""

    update: Callable[[SparseState, Resident, int], tuple[SparseState, dict]]
    rewire: Callable[[SparseState, Resident], tuple[SparseState, dict]]


def looped(devices: list) -> bool:
    """Whether one dispatch takes several steps: everywhere but on CPU.

    XLA's CPU backend runs the gradients of convolutions many times slower inside a loop.
    """
    return devices[0].platform != "cpu"


def make_steps(
    config: ConfigDict, dataset: Dataset, net: Network, tx, rule: Method, devices: list
) -> Steps:
    """`update(state, resident, n)` takes n steps in one dispatch; `rewire(state, resident)` one.

    The batch is cut out of the resident data and augmented inside. Where `looped` is False, n must
    be 1.
    """
    fetch = make_fetch(config, dataset, len(devices))
    update_one = update_body(net, tx, classification)

    def one_update(state, resident, device):
        return update_one(state, fetch(state, resident, device))

    def many_updates(state, resident, n, device):
        # A while loop with a traced bound compiles once for every n, and stops at a NaN.
        def body(carry):
            i, state, _ = carry
            return i + 1, *one_update(state, resident, device)

        nothing = jax.eval_shape(one_update, state, resident, device)[1]
        metrics = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nothing)
        metrics["finite"] = jnp.bool_(True)
        go_on = lambda carry: (carry[0] < n) & carry[2]["finite"]  # noqa: E731
        return jax.lax.while_loop(go_on, body, (jnp.int32(0), state, metrics))[1:]

    index = hosts.local_indices(devices)
    if looped(devices):
        update_all = parallel(many_updates, (None, None, None, 0), devices, donate=(0,))
        update = lambda state, resident, n: update_all(state, resident, n, index)  # noqa: E731
    else:
        update_all = parallel(one_update, (None, None, 0), devices, donate=(0,))
        update = lambda state, resident, n: update_all(state, resident, index)  # noqa: E731
    if not rule.moves:
        return Steps(update, lambda state, resident: (state, {}))  # never called
    rewire_one = rewire_body(net, tx, rule, classification)

    def one_rewire(state, resident, fg, device):
        return rewire_one(state, fetch(state, resident, device), fg)

    rewire_all = parallel(one_rewire, (None, None, None, 0), devices, donate=(0,))
    measure = on_host(net, rule)
    return Steps(update, lambda state, resident: rewire_all(state, resident, measure(state), index))
