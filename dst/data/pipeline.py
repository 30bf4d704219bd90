"""The batch of a step as a pure function of key and step, and augmentation on the device.

The order of an epoch, the batch of a step and every random number of an image follow from a key
and the step alone, so there is no iterator to save; and those of an image do not depend on how
many devices share the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


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
