"""Several hosts: one run on the devices of several processes.

Every process runs the same program. It holds the whole state on its own devices and takes its own
share of each batch; only what `dst.update.parallel` runs crosses hosts, and what is asked here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from dst.errors import ConfigError


def is_first() -> bool:
    """Whether this is the process that writes: the only one, or the first of several.

    A process that is alone is not asked: the answer would take hold of its accelerators.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def devices(each: int | None = None) -> list:
    """The first `each` devices (None: all) of every process, one process after the other."""
    processes = range(jax.process_count())
    return [d for p in processes for d in jax.local_devices(process_index=p)[:each]]


def local_indices(devices: list) -> np.ndarray:
    """Where this process's devices are among all `devices`: int (local devices,)."""
    here = jax.process_index()
    return np.array([i for i, device in enumerate(devices) if device.process_index == here])


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Each flag, true in all processes if it is in one."""
    if jax.process_count() == 1:
        return flags
    return tuple(map(bool, process_allgather(np.array(flags)).any(0)))


def gather(value: Any) -> list:
    """The `value` of every process, as JSON keeps it, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(process_allgather(np.array(text.size)).max())
    padded = np.pad(text, (0, longest - text.size), constant_values=ord(" "))
    return [json.loads(row.tobytes()) for row in process_allgather(padded)]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """A block that asks nothing of other processes, after which all of them go on or none does.

    Raises: the block's own, or `ConfigError` with that of another process.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    sentences = gather(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for process, sentence in enumerate(sentences):
        if sentence is not None:
            raise ConfigError(f"Process {process} cannot start: {sentence}")
