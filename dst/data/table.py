"""The data sets: what is known of each before it is read, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dst.errors import check_value, integer, is_int
from dst.vocabulary import Names


class Splits(NamedTuple):
    """What a reader returns: all images, uint8 (N, H, W, C), and their labels, integers (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, ...] | None = None  # per channel, in units of 255; None: that of training
    std: tuple[float, ...] | None = None
    augment: tuple[str, ...] = ()  # names of `pipeline.OPERATIONS`, the first is done first


class Source(NamedTuple):
    """A data set that is not read yet."""

    train_images: int  # how many, validation included
    image: tuple[int, int, int]  # (H, W, C), H = W
    num_classes: int
    read: Callable[[str], Splits]  # called with config.data_dir


def _is_image(v: Any) -> bool:
    whole = isinstance(v, tuple) and len(v) == 3 and all(map(is_int, v))
    return whole and min(v) >= 1 and v[0] == v[1]


def check_source(who: str, source: Source) -> None:
    """Raises: ConfigError for values that a row cannot have."""
    check_value(f"train_images of {who}", source.train_images, integer(1))
    square = "a tuple (H, W, C) of integers >= 1 with H = W"
    check_value(f"image of {who}", source.image, (_is_image, square))
    check_value(f"num_classes of {who}", source.num_classes, integer(2))
    check_value(f"read of {who}", source.read, (callable, "a function of config.data_dir"))


# ---- Those of the package. Their files are imported when they are read: TFDS takes seconds.
def _digits(data_dir: str) -> Splits:
    from dst.data import digits

    return digits.read()


def _cifar10(data_dir: str) -> Splits:
    from dst.data import cifar

    return cifar.splits("cifar10", data_dir)


def _cifar100(data_dir: str) -> Splits:
    from dst.data import cifar

    return cifar.splits("cifar100", data_dir)


DATASETS: Names[Source] = Names(
    "dataset",
    Source,
    dict(
        digits=Source(1437, (8, 8, 1), 10, _digits),
        cifar10=Source(50_000, (32, 32, 3), 10, _cifar10),
        cifar100=Source(50_000, (32, 32, 3), 100, _cifar100),
    ),
    check_source,
)
