"""What the sparse benchmarks share: times in turns, peaks in fresh processes, a header, a table.

Two numbers for a peak, both in bytes:

  xla   what XLA's memory_analysis() plans: arguments + results - donated arguments + temporaries.
  rss   what the process really grows by: VmHWM during the runs, reset by /proc/self/clear_refs once
        the arguments exist, minus VmRSS when everything is imported and compiled and no argument
        exists. So arguments, results, temporaries and the allocator's waste count; code, the
        compiler and what only builds the arguments do not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from dst.rewire import rewire_body
from dst.training import log
from dst.training.steps import classification
from dst.update import parallel, update_body

MIB = 2**20
LEAST_ROUNDS = 5
SMALL = 64  # units of a layer whose memory is nothing
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # malloc gives every larger buffer back at once


# ---------------------------------------------------------------------------------- what is called
def program(net: Any, tx: Any, method: Any, what: str, shapes: Any) -> Any:
    """The compiled "step" or "rewire" of a classifier; as in a run, the state is given away.

    `shapes` are those of state and batch, the batch (1, B, ...).
    """
    one = jax.local_devices()[:1]
    if what == "step":
        body = update_body(net, tx, classification)
        return parallel(body, (None, 0), one, donate=(0,)).lower(*shapes).compile()
    body = rewire_body(net, tx, method, classification)
    return parallel(body, (None, 0, None), one, donate=(0,)).lower(*shapes, {}).compile()


class Run:
    """A compiled step or rewire and the state that it takes and returns."""

    def __init__(self, program: Any, state: Any, *rest: Any):
        self.program, self.state, self.rest = program, state, rest

    def __call__(self) -> Any:
        self.state, told = self.program(self.state, *self.rest)
        return self.state, told


# -------------------------------------------------------------------------------------------- time
def in_turns(
    calls: Mapping[Any, Callable[[], Any]], seconds: float = 0, least: int = LEAST_ROUNDS
) -> dict[Any, list[float]]:
    """Seconds of each call in each round: rounds as long as `seconds` last, and `least` of them.

    Every turn makes one call before that is not counted: else the smaller ones would pay for the
    caches, and for the pages, that the larger ones took.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            jax.block_until_ready(call())
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and least of a call's seconds; the least is what a busy machine disturbs less."""
    return {
        "median_seconds": statistics.median(times),
        "least_seconds": min(times),
        "rounds": len(times),
    }


# ------------------------------------------------------------------------------------------ memory
def xla_peak(compiled: Any) -> int:
    """Bytes that XLA plans for a compiled program."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes


def shapes(tree: Any) -> Any:
    """The tree's shapes and dtypes, to compile without arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def growth(prepare: Callable[[int], Callable[[], Any]], size: int) -> int:
    """The peak `rss` in bytes of what prepare(size) makes and of two runs of what it returns.

    It must be compiled before, and the process started by `alone`. A small one runs first, so that
    code is loaded and threads exist; then the arguments are made once in vain, for the operations
    that make them are compiled, too.
    """
    jax.block_until_ready(prepare(SMALL)())
    prepare(size)
    base = settle()
    run = prepare(size)
    forget_peak()
    for _ in range(2):
        jax.block_until_ready(run())
        time.sleep(0.1)  # XLA frees a little later what is dropped
    return peak_since() - base


def settle() -> int:
    """Gives freed memory back to the system: VmRSS in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def forget_peak() -> None:
    """From now on `peak_since` counts."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")


def peak_since() -> int:
    """VmHWM in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def alone(module: str, *arguments: Any, environment: Mapping[str, str] = AT_ONCE) -> dict[str, Any]:
    """The last line, JSON, that `module` prints in a fresh process.

    Its malloc gives buffers back `AT_ONCE`; how long glibc keeps one otherwise depends on history.
    """
    return side_by_side(1, module, *arguments, environment=environment)[0]


def side_by_side(
    processes: int, module: str, *arguments: Any, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The same of several fresh processes at the same time."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **environment}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(command)} failed")
    return [json.loads(text.splitlines()[-1]) for text in told]


# ------------------------------------------------------------------------------------------ output
def header(benchmark: str, packages: Iterable[str] = (), **settings: Any) -> dict[str, Any]:
    """Versions, of these packages too, processor, threads, git revision, load, settings."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    found = {k: v for k, v in log.header({}).items() if k != "config"}
    for package in packages:
        found["versions"][package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][package] = importlib.metadata.version(package)
    return {
        "benchmark": benchmark,
        **found,
        "cpu": names[0] if names else None,
        "threads": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        **settings,
    }


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one peak, in this process
    return parser


class Lines:
    """JSON lines, printed as they come and appended to a file if there is one."""

    def __init__(self, out: Path | None):
        self.out = out
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Prints and keeps a line."""
        text = json.dumps(line)
        print(text, flush=True)
        self.lines.append(line)
        if self.out:
            with self.out.open("a") as file:
                file.write(text + "\n")


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown; a bar in a cell is escaped."""
    head = list(head)
    body = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in body)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
