"""The flags that make several processes one run, and how these find each other.

JAX is imported when they are right, not before.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from dst.errors import ConfigError, Rule, check_value, integer

TOGETHER = ("coordinator", "processes", "process")


class Place(NamedTuple):
    """Where this process is among all; all None where JAX finds it out by itself."""

    coordinator: str | None = None  # HOST:PORT of the first process
    processes: int | None = None
    process: int | None = None


def define(values: flags.FlagValues) -> None:
    """Adds --coordinator, --processes, --process and --distributed."""
    for name in TOGETHER:
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "", flag_values=values)


def place(values: flags.FlagValues) -> Place | None:
    """What the flags say, None if this is the only process. Raises: ConfigError."""
    given = [name for name in TOGETHER if values[name].value is not None]
    if values.distributed and given:
        raise ConfigError(
            "--distributed is for clusters that JAX recognises by itself; it must stand without "
            f"--{given[0]}."
        )
    if not given:
        return Place() if values.distributed else None
    for name in TOGETHER:
        if name not in given:
            raise ConfigError(f"--{given[0]} also needs --{name}; it is missing.")
    check_value("--coordinator", values.coordinator, (_is_address, "HOST:PORT of process 0"))
    processes = _number("processes", values.processes, integer(1))
    process = _number("process", values.process, integer(0, processes - 1))
    return Place(values.coordinator, processes, process)


def _is_address(text: str) -> bool:
    found = re.fullmatch(r"\S+:(\d{1,5})", text)
    return found is not None and 0 < int(found[1]) < 2**16


def _number(name: str, text: str, rule: Rule) -> int:
    number = int(text) if re.fullmatch(r"-?\d+", text) else text
    check_value(f"--{name}", number, rule)
    return int(number)


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[None]:
    """A block in which this process is one of several, if it has a place among them.

    Raises: ConfigError if there is no cluster, the port is taken or their devices differ in number.
    """
    if place is None:
        yield
        return
    _join(place)
    try:
        yield
    except ConfigError:  # in all of them, as what ends the block in any other way
        raise
    except BaseException:
        # Python's own exit waits for the other processes, which wait for this one: minutes.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _join(place: Place) -> None:
    if place.process == 0:
        _check_port(str(place.coordinator))
    import jax  # takes seconds: not before the flags are right

    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the loop's
    if place.coordinator is None:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ConfigError(
                "--distributed needs a cluster that JAX recognises (Slurm, Open MPI, TPU pods); "
                "elsewhere use --coordinator, --processes and --process."
            ) from error
    else:
        # What JAX knows of a cluster does not overrule the flags.
        jax.distributed.initialize(*place, cluster_detection_method="deactivate")
    counts = [len(jax.local_devices(process_index=p)) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"All processes must have the same number of devices; they have {counts} "
            "(CUDA_VISIBLE_DEVICES hides some)."
        )


def _check_port(coordinator: str) -> None:
    # JAX would crash.
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise ConfigError(
            f"Process 0 cannot listen at --coordinator={coordinator}: {error.strerror}."
        ) from error
