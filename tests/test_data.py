"""Data: the digits, the pure batch, and augmentation against NumPy and Pillow."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

import dst
from dst.data import load
from dst.data import pipeline as data
from dst.errors import ConfigError
from dst.state import stream
from tests import tiny

CIFAR10_ORDER = ("flip", "crop")
CIFAR100_ORDER = ("crop", "flip", "rotate")
_augment = jax.jit(data.augment, static_argnums=0)


# ---- Digits --------------------------------------------------------------------------------


def test_digits_are_scikit_learns_scaled_exactly_and_normalised_by_the_training_part():
    loaded, again = load("digits"), load("digits")
    assert loaded.train_images.shape == (1437, 8, 8, 1) and loaded.test_images.shape[0] == 360
    images = np.concatenate([loaded.train_images, loaded.test_images])
    labels = np.concatenate([loaded.train_labels, loaded.test_labels])
    original = load_digits()
    ours = {(i.tobytes(), int(y)) for i, y in zip(images[..., 0] // 15, labels, strict=True)}
    theirs = zip(original.images.astype(np.uint8), original.target, strict=True)
    assert ours == {(i.tobytes(), int(y)) for i, y in theirs}  # all 1,797 differ: also disjoint
    assert len(ours) == 1797 and not (images % 15).any()
    share = np.bincount(loaded.test_labels) / np.bincount(original.target)
    assert np.all(abs(share - 360 / 1797) < 1 / 170)  # stratified: to the nearest image
    normal = data.normalise(jnp.asarray(loaded.train_images), loaded.mean, loaded.std)
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=1e-4)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("size", [-1, 9, 1428, 2000])
def test_impossible_validation_size(size):
    with pytest.raises(ConfigError, match=rf"^validation_size must be .* 1427, not {size}\.$"):
        load("digits", validation_size=size)


def test_unknown_data_set():
    names = "'digits', 'cifar10' or 'cifar100'"
    with pytest.raises(ConfigError, match=rf"^dataset must be {names}, not 'mnist'\.$"):
        load("mnist")


# ---- The batch of a step ---------------------------------------------------------------------

N, BATCH = 103, 8  # 12 steps, 7 examples left over
IMAGES = jnp.broadcast_to(jnp.arange(N, dtype=jnp.uint8)[:, None, None, None], (N, 4, 4, 1))
LABELS = jnp.arange(N, dtype=jnp.int32)


@jax.jit
def _batch(seed, step):
    """The batch as the loop makes it, with everything traced."""
    order = data.epoch_order(jax.random.key(seed), step // data.steps_per_epoch(N, BATCH), N)
    return data.batch(IMAGES, LABELS, order, step, BATCH)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_covers_each_example_at_most_once_and_labels_follow_images(seed, epoch):
    seen = []
    for step in range(12 * epoch, 12 * (epoch + 1)):
        images, labels = _batch(seed, step)
        assert images.shape == (BATCH, 4, 4, 1) and images.dtype == jnp.uint8
        np.testing.assert_array_equal(
            images, np.broadcast_to(labels[:, None, None, None], images.shape)
        )
        seen += labels.tolist()
    assert len(set(seen)) == 96 and set(seen) <= set(range(N))


def test_batches_are_pure_in_key_and_step_and_differ_otherwise():
    order = data.epoch_order(jax.random.key(3), 2, N)
    direct = data.batch(IMAGES, LABELS, order, 2 * 12 + 5, BATCH)[1]  # a step that is not traced
    np.testing.assert_array_equal(_batch(3, 29)[1], direct)
    np.testing.assert_array_equal(_batch(3, 29)[1], order[40:48])
    for other in (_batch(3, 28), _batch(3, 29 + 12), _batch(4, 29)):
        assert other[1].tolist() != direct.tolist()


@pytest.mark.parametrize(("devices", "operations"), [(2, CIFAR10_ORDER), (4, CIFAR100_ORDER)])
def test_the_parts_of_the_devices_are_the_global_batch(devices, operations):
    images = jax.random.bits(jax.random.key(9), (N, 32, 32, 3), jnp.uint8)
    order, key, share = (
        data.epoch_order(jax.random.key(0), 0, N),
        jax.random.key(1),
        BATCH // devices,
    )

    def part(device):
        x, y = data.batch(images, LABELS, order, 7, BATCH, device, devices)
        return data.augment(operations, key, x, first=device * share), y

    x, y = jax.jit(jax.vmap(part))(jnp.arange(devices))
    whole, labels = data.batch(images, LABELS, order, 7, BATCH)
    np.testing.assert_array_equal(y.reshape(-1), labels)
    np.testing.assert_array_equal(x.reshape(whole.shape), _augment(operations, key, whole))


FOUR = np.arange(4)


def streams():
    """The constants that uses of randomness fold into the key of a step or of the run."""
    walked = pkgutil.walk_packages(dst.__path__, "dst.")
    names = [module.name for module in walked if ".native." not in module.name]
    found = [vars(importlib.import_module(name)) for name in (*names, "experiments.quality")]
    return {n: int(v) for module in found for n, v in module.items() if n.endswith("_STREAM")}


def test_no_two_uses_of_randomness_share_a_key(monkeypatch):
    """The order of an epoch, every stream of a step, and what is split or folded off them."""
    constants = streams()
    assert {"ORDER_STREAM", "DROPOUT_STREAM", "SKETCH_STREAM"} <= constants.keys()
    assert len(set(constants.values())) == len(constants)
    state = tiny.setup().state
    initial = jax.random.split(jax.random.key(0), 4)  # `init_state`'s; the last is the run's
    assert initial[3] == state.key
    users = {f"initial key {n}": key for n, key in enumerate(initial)}
    monkeypatch.setattr(jax.random, "permutation", lambda key, _: key)
    fold = jax.vmap(jax.random.fold_in, (None, 0))  # its keys are also those of `split`
    for n in range(24):
        own = {
            f"{name} of step {n}": stream(state.replace(step=jnp.int32(n)), value)
            for name, value in constants.items()
            if name != "ORDER_STREAM"
        }
        own[f"order of epoch {n}"] = data.epoch_order(state.key, n, N)
        parts = {f"{u}, {i}": k for u, key in own.items() for i, k in enumerate(fold(key, FOUR))}
        users |= {**own, **parts, f"step {n}": jax.random.fold_in(state.key, n)}
    taken: dict[bytes, str] = {}
    for user, key in users.items():
        assert taken.setdefault(np.asarray(jax.random.key_data(key)).tobytes(), user) == user


# ---- Normalisation and augmentation ----------------------------------------------------------


def test_normalise_is_per_channel_and_black_is_minus_mean_over_std():
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    out = data.normalise(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)
    black = data.normalise(jnp.zeros((1, 1, 1, 3), jnp.uint8), mean, std)
    np.testing.assert_allclose(black[0, 0, 0], -np.array(mean) / np.array(std), rtol=1e-6)


def _rotated(image, degrees):
    """Slow float64 nearest-neighbour rotation, and where the choice of a pixel is not a tie."""
    size = image.shape[0]
    centre, angle = (size - 1) / 2, np.deg2rad(float(degrees))
    out, sure = np.zeros_like(image), np.zeros((size, size), bool)
    for i in range(size):
        for j in range(size):
            v, u = i - centre, j - centre
            source = (
                np.array(
                    [np.sin(angle) * u + np.cos(angle) * v, np.cos(angle) * u - np.sin(angle) * v]
                )
                + centre
            )
            y, x = np.floor(source + 0.5).astype(int)
            sure[i, j] = np.all(abs((source % 1) - 0.5) > 1e-4)
            if 0 <= y < size and 0 <= x < size:
                out[i, j] = image[y, x]
    return out, sure


@jax.jit
def _rotate_alone(degrees, image):
    y, x = jnp.mgrid[:32, :32]
    y, x = data.rotate_by(degrees, y, x, 32)
    inside = (y >= 0) & (y < 32) & (x >= 0) & (x < 32)
    return jnp.where(inside[..., None], image[jnp.clip(y, 0, 31), jnp.clip(x, 0, 31)], 0)


@pytest.mark.parametrize("degrees", [-15.0, -7.3, 0.0, 1.7, 11.1, 15.0])
def test_rotation_is_nearest_neighbour_about_the_centre(degrees):
    image = np.random.default_rng(1).integers(1, 256, (32, 32, 3), np.uint8)
    ours = np.asarray(_rotate_alone(degrees, image))
    expected, sure = _rotated(image, degrees)
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(ours[sure], expected[sure])
    # Pillow, which torchvision's RandomRotation calls, says the same, the direction included.
    pillow = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.NEAREST))
    np.testing.assert_array_equal(ours[sure], pillow[sure])
    assert ((ours[0, 0] == 0).all() and (ours[-1, -1] == 0).all()) == (abs(degrees) > 5)


def _by_hand(operations, key, image):
    """The operations one after the other on a NumPy image, with the draws that `augment` uses."""
    sure = np.ones((32, 32), bool)
    for name, k in zip(operations, jax.random.split(key, len(operations)), strict=True):
        if name == "flip" and jax.random.bernoulli(k):
            image = image[:, ::-1]
        if name == "crop":
            top, left = 4 + np.asarray(jax.random.randint(k, (2,), -4, 5))
            image = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        if name == "rotate":
            image, sure = _rotated(image, jax.random.uniform(k, minval=-15.0, maxval=15.0))
    return image, sure


@pytest.mark.parametrize("operations", [CIFAR10_ORDER, CIFAR100_ORDER])
def test_augment_is_appendix_b_image_by_image(operations):
    images = np.random.default_rng(2).integers(1, 256, (24, 32, 32, 3), np.uint8)
    key = jax.random.key(5)
    out = np.asarray(_augment(operations, key, images, 16))
    assert out.dtype == np.uint8
    for i, image in enumerate(images):
        expected, sure = _by_hand(operations, jax.random.fold_in(key, 16 + i), image)
        np.testing.assert_array_equal(out[i][sure], expected[sure])


@pytest.mark.parametrize("operations", [CIFAR10_ORDER, CIFAR100_ORDER])
def test_padding_and_corners_are_black_and_nothing_else_changes_value(operations):
    white = jnp.full((64, 32, 32, 3), 255, jnp.uint8)
    out = np.asarray(_augment(operations, jax.random.key(0), white))
    assert set(np.unique(out)) == {0, 255} and (out == 0).any(axis=(1, 2, 3)).sum() > 50


def test_without_operations_images_pass_unchanged():
    images = jax.random.bits(jax.random.key(0), (3, 8, 8, 1), jnp.uint8)
    np.testing.assert_array_equal(data.augment((), jax.random.key(1), images), images)


KEYS = jax.random.split(jax.random.key(7), 8100)


def test_flip_has_probability_one_half():
    _, x = jax.vmap(lambda k: data.flip(k, jnp.int32(0), jnp.int32(3), 32))(KEYS)
    assert set(x.tolist()) == {3, 28} and abs(float((x == 3).mean()) - 0.5) < 0.03


def test_all_81_crops_are_equally_likely():
    y, x = jax.vmap(lambda k: data.crop(k, jnp.int32(0), jnp.int32(0), 32))(KEYS)
    counts = np.zeros((9, 9), int)
    np.add.at(counts, (np.asarray(y) + 4, np.asarray(x) + 4), 1)
    assert counts.sum() == 8100
    assert ((counts - 100) ** 2 / 100).sum() < 150  # chi-square, 80 degrees of freedom: p < 1e-5


def test_the_angle_is_uniform_between_minus_and_plus_15_degrees():
    far = 10**6  # from the centre, where a rounded coordinate still tells the angle
    y, x = jax.vmap(lambda k: data.rotate(k, jnp.float32(15.5), jnp.float32(far), 32))(KEYS)
    degrees = np.rad2deg(np.arctan2(np.asarray(y) - 15.5, np.asarray(x) - 15.5))
    assert abs(degrees).max() <= 15.001
    deciles = np.quantile(degrees, np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(-15, 15, 11), atol=0.6)
