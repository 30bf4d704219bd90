"""A network's variables as one NumPy file, its sparse kernels as CSR matrices."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array

from dst.errors import ConfigError

Entries = dict[str, np.ndarray]


class Kernel(NamedTuple):
    """The connections of one kernel, sorted by input, then output."""

    shape: tuple[int, ...]
    outputs: int
    position: np.ndarray  # int64 (M,), in the flat kernel
    values: np.ndarray  # float32 (M,)

    def dense(self) -> np.ndarray:
        """The kernel as Flax holds it."""
        kernel = np.zeros(math.prod(self.shape), np.float32)
        kernel[self.position] = self.values
        return kernel.reshape(self.shape)


def write(path: Path, entries: Entries) -> None:
    """The file, whole or not at all. Raises: what cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:  # given a name, NumPy would append .npz
            np.savez(file, **entries)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[Entries, dict[str, Kernel]]:
    """What is dense in the file, and its sparse kernels, both by name."""
    try:
        with open(path, "rb") as file:
            return _parse(file)
    except MemoryError:
        raise
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # whatever zipfile and NumPy make of other files
        raise ConfigError(f"{path} is damaged, or no file of dst.export.") from error


def _parse(file: BinaryIO) -> tuple[Entries, dict[str, Kernel]]:
    with zipfile.ZipFile(file) as archive:
        if archive.testzip():  # NumPy checks no sum of an entry whose header says it is shorter
            raise zipfile.BadZipFile
    file.seek(0)
    with np.load(file) as stored:
        entries = dict(stored.items())
    names = entries.pop("sparse").tolist()
    return entries, {name: _from_csr(entries, name) for name in names}


def to_csr(name: str, kernel: Kernel) -> Entries:
    """The four entries of a kernel."""
    shape = math.prod(kernel.shape) // kernel.outputs, kernel.outputs
    places = np.divmod(kernel.position, kernel.outputs)
    W = coo_array((kernel.values, places), shape=shape).tocsr()
    return {
        f"{name}/data": W.data,
        f"{name}/indices": W.indices.astype(np.int32),
        f"{name}/indptr": W.indptr.astype(np.int32),
        f"{name}/shape": np.array(kernel.shape),
    }


def _from_csr(entries: Entries, name: str) -> Kernel:
    """Takes the kernel out of `entries`. Raises: what is not a sorted CSR matrix."""
    parts = ("data", "indices", "indptr", "shape")
    data, indices, indptr, sides = (entries.pop(f"{name}/{part}") for part in parts)
    shape = tuple(sides.tolist())
    inputs = indptr.size - 1
    if inputs not in np.cumprod(shape)[:-1]:
        raise ValueError(f"{name} of shape {shape} has no matrix of {inputs} inputs")
    W = csr_array((data, indices, indptr), shape=(inputs, math.prod(shape) // inputs))
    W.check_format(full_check=True)
    # SciPy cuts off what indptr does not reach, and makes integers of other indices.
    if W.nnz != data.size or indices.dtype.kind != "i" or not W.has_canonical_format:
        raise ValueError(f"{name} has connections outside, twice or out of order")
    row, output = W.tocoo().coords
    position = row.astype(np.int64) * W.shape[1] + output
    return Kernel(shape, W.shape[1], position, W.data.astype(np.float32))
