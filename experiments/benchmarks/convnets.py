"""VGG-16 and ResNet-56: sparse and masked execution, plain Flax and PyTorch, in one run.

    python -m experiments.benchmarks.convnets [--models vgg resnet mlp depthwise groups volume]
        [--malloc default kept] [--sparsity 0.98 0.95 0.9] [--rounds vgg=15 resnet=5 mlp=15]
        [--rewires 3] [--out FILE.jsonl]
    python -m experiments.benchmarks.convnets --show FILE.jsonl     # the tables of a log

Batch 128, float32, two threads, random images, SGD with momentum and weight decay. Every variant,
under every malloc, has a process of its own and is asked for one step at a time, in turns of
random order, each after one that is not counted; then for rewires, the same way. "kept" is malloc
as `dst.main` sets it, which keeps what is freed: `dst.training.runtime`.

First steps and rewires hold tracing, compiling and running. JAX's compilation cache lies in a
folder that is made for the run: the first malloc finds it empty ("cold"), the second one full.
Masked execution and the dense variants take the same time at any sparsity: they run at the first,
and so does sparse execution without fusing.

Peaks are what a fresh process grows by, see `measure`: with a malloc that gives buffers back at
once and, for what users would get, with the one that keeps. But for
VGG-16 and ResNet-56 only sparse and masked steps are measured; the rest of "mlp" is in `mlp.py`.

PyTorch (`pip install -e .[bench]`) is left out where it is not installed, and that is said. On a
busy machine OMP_WAIT_POLICY=passive keeps its threads from spinning for one that does not run, ten
times as long as a step takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dst.training import runtime
from experiments.benchmarks import convnet_steps, convnet_table, measure, turns
from experiments.benchmarks.convnet_steps import WHOLE, Case, program_of

MALLOCS = ("default", "kept")
ROUNDS = {"vgg": 15, "resnet": 5, "mlp": 15, "depthwise": 9, "groups": 9, "volume": 9}
REWIRES = 3
FULL = 0  # what `measure.growth` calls the network that is measured


# ---------------------------------------------------------------------------------------- the cases
def cases(model: str, sparsities: list[float]) -> Iterator[Case]:
    """The variants whose steps are compared."""
    yield from (Case(model, "sparse", sparsity) for sparsity in sparsities)
    yield Case(model, "masked", sparsities[0])
    if model in WHOLE:
        yield Case(model, "sparse, not fused", sparsities[0])
        yield from (Case(model, variant) for variant in convnet_steps.DENSE)


def rewires(cases: list[Case]) -> list[Case]:
    """Those of these networks."""
    own = [c for c in cases if c.variant not in convnet_steps.DENSE and c.model in WHOLE]
    return [case._replace(what="rewire") for case in own]


def others(case: Case) -> list[Case]:
    """Rewires by other methods, of which only the first and its peak are measured."""
    names = [name for name in convnet_steps.METHODS if name != case.method]
    return [rewire._replace(method=name) for rewire in rewires([case]) for name in names]


# ------------------------------------------------------------------------ in processes of their own
def work(case: Case, malloc: str, pipe: Connection) -> None:
    """A step or a rewire: what the first one takes, then turns."""
    turns.bind()
    if malloc == "kept":
        runtime.keep_memory()
    try:
        program = program_of(case)
    except ImportError as error:
        pipe.send({"unavailable": f"{type(error).__name__}: {error}"})
        return
    arguments = jax.block_until_ready(program.begin())
    sizes = program.sizes(arguments[0])
    begin = time.perf_counter()
    run = measure.Run(program.build(), *arguments)
    jax.block_until_ready(run())
    first = time.perf_counter() - begin
    del arguments
    measure.settle()  # the compiler's memory
    names = ("parameters", "layer_parameters", "weight_state_bytes")
    pipe.send({**dict(zip(names, sizes, strict=True)), "first_seconds": first})
    turns.serve(pipe, {case.what: lambda: jax.block_until_ready(run())})


def peak(case: Case, malloc: str) -> dict[str, int]:
    """Bytes at the peak of two steps or rewires; in a fresh process."""
    if malloc == "kept":
        runtime.keep_memory()
    programs = {FULL: program_of(case), measure.SMALL: program_of(case.small)}
    built = {n: program.build() for n, program in programs.items()}
    prepare = lambda n: measure.Run(built[n], *programs[n].begin())  # noqa: E731
    planned = {} if case.variant.startswith("torch") else {"xla": measure.xla_peak(built[FULL])}
    return {**planned, "rss": measure.growth(prepare, FULL)}


# --------------------------------------------------------------------------------- what is measured
def start(case: Case, malloc: str, caching: dict[str, str]) -> turns.Worker:
    """The process of a variant under a malloc."""
    return turns.start(work, case, malloc, environment=caching)


def in_turns(
    cases: list[Case], rounds: int, mallocs: list[str], caching: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """A line for every case and malloc: the first call, and the median of the turns."""
    workers, told = {}, {}
    for case, malloc in itertools.product(cases, mallocs):
        worker = start(case, malloc, caching)
        cold = malloc == mallocs[0] or case.variant.startswith("torch")
        line = {**case._asdict(), "malloc": malloc, "compiled": "cold" if cold else "cached"}
        told[case, malloc] = {**line, **worker.told}
        if "unavailable" not in worker.told:
            workers[case, malloc] = worker
        print(*case, malloc, worker.told, flush=True)
    dense = {
        w.told["parameters"] for (case, _), w in workers.items() if "sparse" not in case.variant
    }
    if len(dense) > 1:
        raise SystemExit(f"the dense networks have {dense} parameters, not all the same")
    times = turns.take(workers, cases[0].what, rounds) if rounds else {}
    for worker in workers.values():
        worker.stop()
    for key, line in told.items():
        if key in times:
            seconds, cpu = zip(*times[key], strict=True)
            busy = round(statistics.median(np.divide(cpu, seconds)), 2)
            line |= {**measure.summary(list(seconds)), "cores_busy": busy}
        yield line


def peaks(
    known: list[Case], options: argparse.Namespace, caching: dict
) -> Iterator[dict[str, Any]]:
    """A line for every peak."""
    wanted = [(case, "at once") for case in [*known, *rewires(known), *others(known[0])]]
    if "kept" in options.malloc:
        wanted += [(c, "kept") for c in known if c.sparsity == options.sparsity[0]]
    for case, malloc in wanted:
        module = "experiments.benchmarks.convnets"
        environment = {**turns.MATH, **({} if malloc == "kept" else measure.AT_ONCE), **caching}
        asked = json.dumps([case, malloc])
        found = measure.alone(module, "--alone", asked, environment=environment)
        yield {**case._asdict(), "malloc": malloc, "peak_bytes": found}


def cells(options: argparse.Namespace, caching: dict[str, str]) -> Iterator[dict[str, Any]]:
    """All lines: first those of time, in which nothing else should run."""
    missing = set()
    for model in options.models:
        own = [*cases(model, options.sparsity)]
        for line in in_turns(own, options.rounds[model], options.malloc, caching):
            yield line
            if "unavailable" in line:
                missing.add(line["variant"])
        if model in WHOLE:
            yield from in_turns(rewires(own), options.rewires, options.malloc, caching)
            yield from in_turns(others(own[0]), 0, options.malloc[:1], caching)
    print("Now memory: from here on the machine may be busy.", flush=True)
    for model in options.models:
        known = [case for case in cases(model, options.sparsity) if case.variant not in missing]
        yield from peaks(known, options, caching)


def rounds(text: str) -> tuple[str, int]:
    """MODEL=NUMBER."""
    model, _, number = text.partition("=")
    if model not in ROUNDS or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"must be MODEL=ROUNDS, not {text!r}")
    return model, int(number)


def main() -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=ROUNDS, default=[*ROUNDS])
    parser.add_argument("--malloc", nargs="+", choices=MALLOCS, default=[*MALLOCS])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.98, 0.95, 0.9])
    parser.add_argument("--rounds", type=rounds, nargs="+", default=[])
    parser.add_argument("--rewires", type=int, default=REWIRES)
    parser.add_argument("--show", type=Path, help="print the tables of a log, measure nothing")
    options = parser.parse_args()
    if options.alone:
        case, malloc = json.loads(options.alone)
        print(json.dumps(peak(Case(*case), malloc)))
        return
    if options.show:
        print(convnet_table.tables(map(json.loads, options.show.read_text().splitlines())))
        return
    options.rounds = {**ROUNDS, **dict(options.rounds)}
    lines = measure.Lines(options.out)
    policy = os.environ.get("OMP_WAIT_POLICY")
    lines.add(measure.header("convnets", ["torch"], dtype="float32", omp_wait_policy=policy))
    with tempfile.TemporaryDirectory() as folder:
        caching = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for cell in cells(options, caching):
            lines.add(cell)
    print(convnet_table.tables(lines.lines))


if __name__ == "__main__":
    main()
