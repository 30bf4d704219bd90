"""A network small enough that every law can be checked on it in milliseconds."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dst


class Classifier(nn.Module):
    """Conv, batch norm, Dense with bias, Dense: every kind of layer that `dst` knows."""

    classes: int = 5
    norm: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(6, (3, 3), strides=2)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(20, bias_init=nn.initializers.normal())(x))
        return nn.Dense(self.classes)(x)


def loss(apply, batch):
    """Mean cross-entropy."""
    images, labels = batch
    logits = apply(images, train=True)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, {"accuracy": (logits.argmax(-1) == labels).mean()}


class Setup(NamedTuple):
    """The parts of a run on the tiny network."""

    net: dst.Network
    tx: optax.GradientTransformation
    method: dst.Method
    state: dst.SparseState
    batch: Any


SGD = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9))


IMAGE = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)


def setup(
    name="gse",
    sparsity=0.8,
    *,
    tx=SGD,
    seed=0,
    norm=True,
    images=16,
    execution="masked",
    **options,
) -> Setup:
    """A tiny run with a batch of random images; `options` go to the method."""
    method = dst.method(name, sparsity, **{"every": 2, "end": 12, **options})
    net = dst.network(Classifier(norm=norm), IMAGE, train=False, execution=execution)
    state = dst.init_state(net, tx, method, jax.random.key(seed))
    return Setup(net, tx, method, state, batch(seed, images))


def batch(seed: int, images: int = 16):
    """Random images (B, 6, 6, 2) and labels (B,)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, 6, 6, 2)).astype(np.float32)
    return x, rng.integers(5, size=images).astype(np.int32)


def active(state) -> dict[str, int]:
    """Active connections of each layer."""
    return {path: int(np.count_nonzero(mask)) for path, mask in state.masks.items()}


def kernels(tree, state) -> dict[str, np.ndarray]:
    """The sparse layers' kernels of `params` or of anything in its form."""
    return {path: np.asarray(kernel) for path, kernel in state.masks.kernels(tree).items()}
