"""Processes that take turns: one call in one of them at a time, asked for through a pipe.

In one process the thread pools of XLA, OpenMP and MKL, and one malloc, would disturb each other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

THREADS = 2
PAUSE = 0.02  # seconds: OpenMP's threads spin for a while after a call
MATH = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS")}


class Worker(NamedTuple):
    """A process, the pipe to it and what it told when it was ready for its first turn."""

    process: BaseProcess
    pipe: Connection
    told: Any

    def stop(self) -> None:
        """Ends the process; it may have ended itself."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()


def start(
    target: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Worker:
    """A fresh process that runs target(*arguments, pipe) in this environment, once it has told."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
    with mock.patch.dict(os.environ, {**MATH, **(environment or {})}):
        process.start()
    theirs.close()
    try:
        return Worker(process, pipe, pipe.recv())
    except EOFError:
        raise SystemExit(f"the process of {arguments} failed") from None


def bind() -> None:
    """In the process, before its libraries make threads: one core a thread."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def serve(pipe: Connection, calls: Mapping[str, Callable[[], Any]]) -> None:
    """In the process: for each name that comes, seconds and CPU seconds of one such call."""
    with contextlib.suppress(EOFError):  # the benchmark has given up
        while name := pipe.recv():
            calls[name]()  # the other processes have emptied the caches
            begin, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            pipe.send((time.perf_counter() - begin, time.process_time() - cpu))


def take(workers: Mapping[Any, Worker], call: str, rounds: int) -> dict[Any, list]:
    """{worker: (seconds, CPU seconds) of each round}; the order of each round is random."""
    times: dict[Any, list] = {name: [] for name in workers}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for i in rng.permutation(len(workers)):
            name = [*workers][i]
            time.sleep(PAUSE)
            workers[name].pipe.send(call)
            times[name].append(workers[name].pipe.recv())
    return times
