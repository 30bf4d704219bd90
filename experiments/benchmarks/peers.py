"""A whole training step of one sparse layer: `dst` against what one would take instead.

    python -m experiments.benchmarks.peers [--out FILE.jsonl] [--sizes 4096]
                                           [--densities 0.1 0.02 0.01] [--rounds 21]

A step is the forward product, the gradient of the input, the gradient of the connections that
exist, and SGD with momentum on them; batch 128, float32, two threads. Every peer lives in a process
of its own, since the OpenMP and thread pools of several would disturb each other, and is asked for
one step at a time, in turns of random order. What it computes is compared with float64 NumPy
first. Peers that are not installed are left out, and that is said:

    pip install -e .[bench]
    pip install --no-build-isolation sparseprop

The second command needs a C++ compiler and the environment activated: sparseprop's setup.py calls
`pip` and `python3` itself, which finds no pybind11 in an isolated build.
"""

from __future__ import annotations

import argparse
import json
import statistics
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from experiments.benchmarks import turns
from experiments.benchmarks.peer_steps import BATCH, LEARNING_RATE, MOMENTUM, PEERS, Sparse, sparse

TOLERANCE = 1e-5  # relative, of float32 against float64
PACKAGES = ("torch", "sparseprop", "sparselab", "scipy")


def work(name: str, size: int, density: float, pipe: Connection) -> None:
    """The process of one peer: what it computes first, then the times of one step a request."""
    turns.bind()
    layer = sparse(size, density)
    try:
        peer = PEERS[name](layer)
    except ImportError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    y, dx, gradient, _ = (np.array(result) for result in peer.step())
    values = np.asarray(peer.step()[3])
    if peer.transposed:
        y, dx = y.T, dx.T
    pipe.send((y, dx, gradient[peer.connections], values[peer.connections] - layer.values))
    turns.serve(pipe, {"step": peer.step})


def reference(layer: Sparse) -> tuple[np.ndarray, ...]:
    """y, dx and gradient of the first step, and the change of the values in two; float64."""
    x, delta = layer.x.astype(np.float64), layer.delta.astype(np.float64)
    weights = layer.dense().astype(np.float64)
    gradient = (delta.T @ x)[layer.output, layer.input]  # the same in both steps
    return x @ weights.T, delta @ weights, gradient, -LEARNING_RATE * (2 + MOMENTUM) * gradient


def start(size: int, density: float) -> tuple[dict[str, turns.Worker], list[dict]]:
    """{peer: process}, lines: those that are there, and what was found out."""
    right = reference(sparse(size, density))
    workers, lines = {}, []
    for name in PEERS:
        worker = turns.start(work, name, size, density)
        line, got = {"peer": name, "size": size, "density": density}, worker.told
        if isinstance(got, str):
            lines.append(line | {"unavailable": got})
            continue
        norm = np.linalg.norm
        errors = [float(norm(a - b) / norm(b)) for a, b in zip(got, right, strict=True)]
        names = ("y", "dx", "gradient", "change")
        lines.append(line | {"relative_error": dict(zip(names, errors, strict=True))})
        if not max(errors) < TOLERANCE:
            raise SystemExit(f"{name} computes something else: {lines[-1]}")
        workers[name] = worker
        print(f"{name}: relative error {max(errors):.1e}", flush=True)
    return workers, lines


def measure(size: int, density: float, rounds: int) -> list[dict]:
    """A line for every peer: medians of `rounds` steps."""
    workers, lines = start(size, density)
    times = turns.take(workers, "step", rounds)
    for worker in workers.values():
        worker.stop()
    for line in lines:
        if line["peer"] in times:
            seconds, cpu = zip(*times[line["peer"]], strict=True)
            line["median_seconds"] = statistics.median(seconds)
            line["quartiles"] = statistics.quantiles(seconds, n=4)[::2]
            line["rounds"] = rounds
            line["cores_busy"] = round(statistics.median(np.divide(cpu, seconds)), 2)
    return lines


def table(lines: list[dict]) -> str:
    """Markdown: a row a peer, a column a layer, milliseconds."""
    columns = list(dict.fromkeys((line["size"], line["density"]) for line in lines))
    cells = {
        (line["peer"], line["size"], line["density"]): f"{1000 * line['median_seconds']:.1f}"
        for line in lines
        if "median_seconds" in line
    }
    heads = [f"{size}², {100 * density:g} %" for size, density in columns]
    rows = [["ms a step", *heads], ["---"] * (1 + len(heads))]
    rows += [[name, *(cells.get((name, *column), "–") for column in columns)] for name in PEERS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.02, 0.01])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    from experiments.benchmarks.measure import header  # jax, which not every peer's process needs

    settings = {"threads": turns.THREADS, "batch": BATCH, "rounds": options.rounds}
    lines = [header("peers", PACKAGES, **settings)]
    for size in options.sizes:
        for density in options.densities:
            lines += measure(size, density, options.rounds)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, table(lines[1:]), sep="\n")
    if options.out:
        with options.out.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
