"""A data set by name: read, checked, its validation images taken off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dst.data.pipeline import OPERATIONS
from dst.data.table import DATASETS, Source, Splits
from dst.errors import (
    ConfigError,
    Rule,
    check_value,
    is_number,
    listed,
    one_of,
    quoted,
    tuple_of,
)


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


def load(name: str, data_dir: str = "", validation_size: int = 0) -> Dataset:
    """A data set of `DATASETS`, from the folder `data_dir` if it reads from one.

    `validation_size` images are taken off the training set, the same ones in every run, each
    class in proportion. Raises: ConfigError for an unknown name, an impossible size, a data set
    that cannot be read or is not what its row says.
    """
    check_value("dataset", name, one_of(DATASETS))
    source, who = DATASETS[name], f"dataset {name!r}"
    try:
        splits = source.read(data_dir)
    except OSError as error:
        raise ConfigError(f"{who} cannot be read: {quoted(error)}.") from error
    splits = checked(who, source, splits)
    train, validation = stratified_split(splits.train_labels, validation_size)
    return Dataset(
        name=name,
        train_images=splits.train_images[train],
        train_labels=splits.train_labels[train],
        test_images=splits.test_images,
        test_labels=splits.test_labels,
        validation_images=splits.train_images[validation],
        validation_labels=splits.train_labels[validation],
        num_classes=source.num_classes,
        mean=splits.mean or (),
        std=splits.std or (),
        augment=splits.augment,
    )


def stratified_split(labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of all but `size` examples and of those, each class in proportion."""
    everything, classes = np.arange(len(labels)), len(np.unique(labels))
    if size == 0:
        return everything, everything[:0]
    if not classes <= size <= len(labels) - classes:
        raise ConfigError(
            f"validation_size must be 0 or from {classes} (one a class) to "
            f"{len(labels) - classes}, not {size}."
        )
    from sklearn.model_selection import train_test_split  # takes a second

    try:
        kept, held_out = train_test_split(
            everything, test_size=size, stratify=labels, random_state=0
        )
    except ValueError as error:  # a class with a single image
        raise ConfigError(f"validation_size cannot be {size}: {quoted(error)}") from error
    return np.sort(kept), np.sort(held_out)


# ---- What a reader returned -------------------------------------------------------------------


def checked(who: str, source: Source, splits: Any) -> Splits:
    """The splits with nothing left open and labels int32. Raises: ConfigError, not as its row."""
    if not isinstance(splits, Splits):
        raise ConfigError(f"{who} must be read as dst.data.Splits, not {_found(splits)}.")
    classes = f"integers from 0 to {source.num_classes - 1}"
    for part in ("train", "test"):
        images, labels = getattr(splits, f"{part}_images"), getattr(splits, f"{part}_labels")
        n = source.train_images if part == "train" else max(1, np.size(labels))
        _expect(f"{part}_images of {who}", images, np.uint8, "uint8", (n, *source.image))
        _expect(f"{part}_labels of {who}", labels, np.integer, classes, (n,))
        if labels.min() < 0 or labels.max() >= source.num_classes:
            low, high = labels.min(), labels.max()
            raise ConfigError(f"{part}_labels of {who} must be {classes}, not {low} to {high}.")
        splits = splits._replace(**{f"{part}_labels": labels.astype(np.int32)})
    if splits.mean is None and splits.std is None:
        splits = splits._replace(**statistics(splits.train_images))
    channels = source.image[-1]
    check_value(f"mean of {who}", splits.mean, _numbers(channels, is_number, "numbers"))
    positive = _numbers(channels, lambda v: is_number(v) and v > 0, "numbers > 0")
    check_value(f"std of {who}", splits.std, positive)
    known = tuple_of(lambda v: v in OPERATIONS, lambda v: True, f"a tuple of {listed(OPERATIONS)}")
    check_value(f"augment of {who}", splits.augment, known)
    return splits


def statistics(images: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation per channel, in units of 255, from exact sums."""
    pixels = images[..., 0].size
    total = np.einsum("nhwc->c", images, dtype=np.int64, casting="unsafe")
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64, casting="unsafe")
    mean = total / pixels
    std = np.sqrt(squares / pixels - mean**2)
    return {"mean": tuple((mean / 255).tolist()), "std": tuple((std / 255).tolist())}


def _expect(name: str, array: Any, dtype: type, words: str, shape: tuple[int, ...]) -> None:
    right = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, dtype)
    if not right or array.shape != shape:
        raise ConfigError(f"{name} must be {words} of shape {shape}, not {_found(array)}.")


def _found(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


def _numbers(count: int, each: Callable[[Any], bool], words: str) -> Rule:
    return tuple_of(each, lambda v: len(v) == count, f"a tuple of {count} {words}, one a channel")
