"""Data sets as uint8 arrays, the batch of a step as a pure function, augmentation on the device.

The order of an epoch, the batch of a step and every random number of an image follow from a key
and the step alone, so there is no iterator to save; and those of an image do not depend on how
many devices share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dst.errors import ConfigError

Array = jax.Array


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C) and labels int32 (N,); mean and std per channel in units of 255."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    validation_images: np.ndarray  # empty if validation_size is 0
    validation_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...]  # names of OPERATIONS, in the order in which an image passes them


# ---- Loading ---------------------------------------------------------------------------------

DIGITS_TEST_SIZE = 360  # of 1,797

# Appendix A's statistics and appendix B's order.
_CIFAR = {
    "cifar10": dict(
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment=("flip", "crop"),
    ),
    "cifar100": dict(
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment=("crop", "flip", "rotate"),
    ),
}


def load(name: str, data_dir: str = "", validation_size: int = 0) -> Dataset:
    """'digits' (scikit-learn's), 'cifar10' or 'cifar100' (TFDS's, below `data_dir`; '' = default).

    `validation_size` images are taken off the training set, the same ones in every run, each
    class in proportion. Raises ConfigError: unknown name, impossible size, data set not prepared.
    """
    if name == "digits":
        images, labels, rest = _digits()
    elif name in _CIFAR:
        from dst.data import cifar  # imports TFDS, which digits do not need

        splits = cifar.read(name, data_dir)
        (images, labels), (test_images, test_labels) = splits["train"], splits["test"]
        rest = dict(_CIFAR[name], test_images=test_images, test_labels=test_labels)
    else:
        allowed = ", ".join(["digits", *_CIFAR])
        raise ConfigError(f"dataset must be one of {allowed}, not {name!r}.")
    train, validation = _stratified_split(labels, validation_size)
    return Dataset(
        name=name,
        train_images=images[train],
        train_labels=labels[train],
        validation_images=images[validation],
        validation_labels=labels[validation],
        **rest,
    )


def _digits() -> tuple[np.ndarray, np.ndarray, dict]:
    """Training images and labels, and the other fields; pixels 0..16 become 0..240, exactly."""
    digits = load_digits()
    images = (digits.images[..., None] * 15).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = _stratified_split(labels, DIGITS_TEST_SIZE)
    scaled = images[train] / 255
    rest = dict(
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
        augment=(),
    )
    return images[train], labels[train], rest


def _stratified_split(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of all but `size` examples and of those, each class in proportion."""
    everything, classes = np.arange(len(labels)), len(np.unique(labels))
    if size == 0:
        return everything, everything[:0]
    if not classes <= size <= len(labels) - classes:
        raise ConfigError(
            f"validation_size must be 0 or from {classes} (one a class) to "
            f"{len(labels) - classes}, not {size}."
        )
    kept, held_out = train_test_split(everything, test_size=size, stratify=labels, random_state=0)
    return np.sort(kept), np.sort(held_out)


# ---- The batch of a step ---------------------------------------------------------------------

# Folded into the run's key, as the steps are for everything else (`dst.update.stream`): no step is
# so large, so that no epoch has the key of a step.
ORDER_STREAM = np.uint32(2**32 - 1)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """floor(n / batch_size): the examples left over sit out, others in each epoch."""
    return n // batch_size


def epoch_order(key: Array, epoch: Array | int, n: int) -> Array:
    """The epoch's permutation of the n training examples, int32 (n,).

    A function of its own because it sorts (30 ms for 50,000 on a CPU): compute it once an epoch.
    """
    own = jax.random.fold_in(jax.random.fold_in(key, ORDER_STREAM), epoch)
    return jax.random.permutation(own, jnp.arange(n, dtype=jnp.int32))


def batch(
    images: Array,
    labels: Array,
    order: Array,
    step: Array | int,
    batch_size: int,
    device: Array | int = 0,
    devices: int = 1,
) -> tuple[Array, Array]:
    """Images and labels of the global batch of `step`, or of the part of it of one device.

    `order` is epoch_order(key, step // steps_per_epoch, n), so the batch follows from (key, step).
    `device` of `devices` gets rows [device * b, (device + 1) * b), b = batch_size / devices, and
    gathers no other. Pure; `step` and `device` may be traced.
    """
    share = batch_size // devices
    position = step % steps_per_epoch(order.shape[0], batch_size)
    chosen = jax.lax.dynamic_slice_in_dim(order, position * batch_size + device * share, share)
    return images[chosen], labels[chosen]


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(x / 255 - mean) / std per channel (appendix A): uint8 (..., C) to float32."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean_, std_ = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean_) / std_


# ---- Augmentation (appendix B) ---------------------------------------------------------------
# Each operation says from which pixel (y, x) of its input an output pixel comes; outside of the
# image is black. Going back through all of them gives one gather an image, whatever their number.

PADDING = 4
MAX_DEGREES = 15.0


def flip(key: Array, y: Array, x: Array, size: int) -> tuple[Array, Array]:
    """Mirror left and right with probability 1/2."""
    return y, jnp.where(jax.random.bernoulli(key), size - 1 - x, x)


def crop(key: Array, y: Array, x: Array, size: int) -> tuple[Array, Array]:
    """Pad with 4 black pixels on all sides, then crop back at one of the 9 x 9 positions."""
    shift = jax.random.randint(key, (2,), -PADDING, PADDING + 1)
    return y + shift[0], x + shift[1]


def rotate(key: Array, y: Array, x: Array, size: int) -> tuple[Array, Array]:
    """Rotate about the centre by an angle uniform in +-15 degrees."""
    degrees = jax.random.uniform(key, minval=-MAX_DEGREES, maxval=MAX_DEGREES)
    return rotate_by(degrees, y, x, size)


def rotate_by(degrees: Array, y: Array, x: Array, size: int) -> tuple[Array, Array]:
    """Rotate counter-clockwise about the centre ((size - 1) / 2 twice), nearest neighbour.

    The interpolation is the default of torchvision's RandomRotation; the corners are black.
    """
    angle = degrees * (jnp.pi / 180)
    cos, sin, centre = jnp.cos(angle), jnp.sin(angle), (size - 1) / 2
    v, u = y - centre, x - centre
    nearest = lambda t: jnp.floor(t + centre + 0.5).astype(jnp.int32)  # noqa: E731
    return nearest(sin * u + cos * v), nearest(cos * u - sin * v)


OPERATIONS = {"flip": flip, "crop": crop, "rotate": rotate}


def augment(operations: Sequence[str], key: Array, images: Array, first: Array | int = 0) -> Array:
    """`images` uint8 (B, H, H, C), each after its own random `operations`, in their order.

    Image i draws from fold_in(key, first + i): `key` is the step's, `first` the place in the
    global batch of images[0], so an image gets the same treatment on any number of devices.
    """
    if not operations:
        return images
    places = first + jnp.arange(images.shape[0])
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    return jax.vmap(lambda k, image: _augment_one(operations, k, image))(keys, images)


def _augment_one(operations: Sequence[str], key: Array, image: Array) -> Array:
    size = image.shape[0]
    y, x = jnp.mgrid[:size, :size]
    inside = jnp.ones((size, size), bool)
    keys = jax.random.split(key, len(operations))
    for name, k in reversed(list(zip(operations, keys, strict=True))):
        y, x = OPERATIONS[name](k, y, x, size)
        inside &= (y >= 0) & (y < size) & (x >= 0) & (x < size)
    pixels = image[jnp.clip(y, 0, size - 1), jnp.clip(x, 0, size - 1)]
    return jnp.where(inside[..., None], pixels, 0)
