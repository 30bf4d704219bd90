"""CIFAR through TensorFlow Datasets (TFDS), without TensorFlow: prepare it once, read it whole.

    python -m dst.data.cifar cifar100 [--data_dir=DIR]    download (161 MiB) and prepare: a minute

TFDS names, downloads, checks, shuffles and writes the data set, so that the result is its own
`cifar100/3.0.2` in array_record format. Only two of its steps would import TensorFlow, and both
are replaced here: unpacking the archive (tarfile) and encoding the images as PNG (Pillow).
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.image_classification import cifar
from tqdm import tqdm

from dst.data.table import Splits
from dst.errors import ConfigError


class Cifar10(cifar.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's own `cifar10`, prepared without TensorFlow."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        """{split: examples}, read from the downloaded archive without unpacking it to disk."""
        info = self._cifar_info
        with tarfile.open(dl_manager.download(info.url)) as archive:

            def read(file: str) -> bytes:
                return archive.extractfile(info.prefix + file).read()  # type: ignore[union-attr]

            for key, file in zip(info.label_keys, info.label_files, strict=True):
                names = read(file).decode().split("\n")
                self.info.features[key].names = [name for name in names if name]
            train, test = (b"".join(map(read, f)) for f in (info.train_files, info.test_files))
        return {
            "train": self._generate_examples("train", train),
            "test": self._generate_examples("test", test),
        }

    def _generate_examples(self, split: str, content: bytes) -> Iterator[tuple[int, dict]]:
        """(index, example) of each row: its labels, then 3 x 32 x 32 bytes, channels first."""
        keys = self._cifar_info.label_keys
        for i, row in enumerate(np.frombuffer(content, np.uint8).reshape(-1, len(keys) + 3072)):
            pixels = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG")
            labels = dict(zip(keys, row, strict=False))
            yield i, {"id": f"{split}_{i:05d}", "image": png.getvalue(), **labels}


class Cifar100(Cifar10, cifar.Cifar100, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's own `cifar100`, prepared without TensorFlow."""


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100}
FAILURES = (OSError, tfds.download.DownloadError, NonMatchingChecksumError, tarfile.TarError)
CHUNK = 1000  # records read at a time: twice as fast as one by one
BAR: dict[str, Any] = {"leave": False, "disable": None}  # tqdm's: gone when done, none in a log


def command(name: str, data_dir: str = "") -> str:
    """The shell command that prepares the data set `name`."""
    return f"python -m dst.data.cifar {name}" + (f" --data_dir={data_dir}" if data_dir else "")


def prepare(name: str, data_dir: str = "") -> None:
    """Download and prepare `name` below `data_dir` ('' = TFDS's default folder), with progress.

    Raises ConfigError (one sentence) if the download fails or the folder cannot be written.
    """
    builder = BUILDERS[name](data_dir=data_dir or None)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format="array_record", download_config=config)
    except FAILURES as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} cannot be prepared in {builder.data_dir}: {reason}") from error


def read(name: str, data_dir: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{'train', 'test'}: uint8 images (N, 32, 32, 3) and int32 labels (N,), in CIFAR's own order.

    Raises ConfigError (one sentence with the command to run) if there is no such readable set.
    """
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    folder = root / name / str(BUILDERS[name].VERSION)
    if not (folder / "dataset_info.json").exists():
        raise ConfigError(
            f"{folder} holds no prepared {name}; get it with: {command(name, data_dir)}"
        )
    try:
        return {split: _read_split(name, split, root) for split in ("train", "test")}
    except NotImplementedError as error:
        raise ConfigError(
            f"{folder} is not in array_record format and cannot be read without TensorFlow; "
            f"prepare it once more in another folder: {command(name, 'ANOTHER_FOLDER')}"
        ) from error


# Appendix A's statistics and appendix B's order.
STATISTICS: dict[str, dict[str, Any]] = {
    "cifar10": dict(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), augment=("flip", "crop")
    ),
    "cifar100": dict(
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment=("crop", "flip", "rotate"),
    ),
}


def splits(name: str, data_dir: str = "") -> Splits:
    """`read` with the paper's statistics and augmentation."""
    found = read(name, data_dir)
    return Splits(*found["train"], *found["test"], **STATISTICS[name])


def _read_split(name: str, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; ids sort as the original order, which TFDS had shuffled and sharded."""
    png = {"image": tfds.decode.SkipDecoding()}
    source = tfds.data_source(name, split=split, data_dir=root, download=False, decoders=png)
    ids, images, labels = [], [], []
    for start in tqdm(range(0, len(source), CHUNK), f"reading {name} {split}", **BAR):
        for record in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            ids.append(record["id"])
            images.append(np.asarray(Image.open(io.BytesIO(record["image"]))))
            labels.append(record["label"])
    order = np.argsort(ids)
    return np.stack(images)[order], np.asarray(labels, np.int32)[order]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dst.data.cifar", description="Prepare CIFAR.")
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--data_dir", default="", help="default: ~/tensorflow_datasets (TFDS's)")
    args = parser.parse_args(argv)
    try:
        prepare(args.name, args.data_dir)
    except ConfigError as error:
        print(f"dst: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
