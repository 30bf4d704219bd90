"""The handwritten digits of scikit-learn, 8x8: nothing to download."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from dst.data.dataset import stratified_split
from dst.data.table import Splits

TEST_SIZE = 360  # of 1,797


def read() -> Splits:
    """The same split in every run; pixels 0..16 become 0..240, exactly."""
    digits = load_digits()
    images = (digits.images[..., None] * 15).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = stratified_split(labels, TEST_SIZE)
    scaled = images[train] / 255
    return Splits(
        *(images[train], labels[train], images[test], labels[test]),
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
    )
