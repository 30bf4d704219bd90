"""Multilayer perceptrons through the user's functions: a step and a rewire, sparse and masked.

    python -m experiments.benchmarks.mlp [--hidden 4096 16384] [--seconds 40] [--no-pure]
        [--out FILE.jsonl]

1024-H-H-10 at 98 % sparsity, batch 128, float32, SGD with momentum, the state donated as in a run.
The rewire is GSE-GraBo's first, which is the largest: |P| = 0.2 K, |S| = 10 |P|. All variants run
in turns in one process; peaks are in bytes, see `measure`, each from a process of its own.

Activations are the bytes of h and dL/dh of every layer, once: 4 B sum (n_in + n_out). What a peak
has above them is given for each connection.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dst
from dst.connections.backends import cpp as kernels
from dst.methods.distributions import active_count
from dst.models import MLP
from experiments.benchmarks import measure

VARIANTS = ("kernels", "pure JAX", "masked")
EVERY = 1000  # steps between two rewires
REWIRES = 3


class Task(NamedTuple):
    """A network, its method and its batch."""

    inputs: int
    hidden: int
    sparsity: float
    batch: int
    distribution: str = "uniform"
    learning_rate: float = 1e-3
    floor: float = 0.0

    @property
    def activations(self) -> int:
        """Bytes of h and dL/dh of every layer."""
        units = (self.inputs, self.hidden, self.hidden, 10)
        return 4 * self.batch * sum(a + b for a, b in itertools.pairwise(units))


def tools(task: Task, variant: str) -> tuple[Any, ...]:
    """Network, optimizer and method."""
    example = jax.ShapeDtypeStruct((1, task.inputs), jnp.float32)
    execution = "masked" if variant == "masked" else "sparse"
    net = dst.network(
        MLP((task.hidden, task.hidden), 10), example, train=False, execution=execution
    )
    options = {"distribution": task.distribution, "floor": task.floor, "every": EVERY}
    method = dst.method("gse", task.sparsity, **options)
    return net, optax.sgd(task.learning_rate, 0.9), method


def state_of(task: Task, variant: str) -> Any:
    """A new network's state, at the step of the first rewire."""
    net, tx, method = tools(task, variant)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    return state.replace(step=jnp.int32(EVERY))


def batch_of(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and labels, (1, B, ...): the share of one device."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, task.batch, task.inputs), np.float32)
    return images, rng.integers(10, size=(1, task.batch), dtype=np.int32)


@functools.cache
def shapes_of(task: Task, variant: str) -> Any:
    """Shapes and dtypes of state and batch."""
    return measure.shapes((state_of(task, variant), batch_of(task)))


def compiled(task: Task, variant: str, what: str) -> Any:
    """The compiled "step" or "rewire"; as in a run, it is given the state away."""
    available = kernels.available() and variant == "kernels"
    with mock.patch.object(kernels, "available", lambda: available):  # asked while it is traced
        return measure.program(*tools(task, variant), what, shapes_of(task, variant))


def run_of(task: Task, variant: str, what: str, program: Any) -> measure.Run:
    """Ready to be called."""
    batch = jax.tree.map(jnp.array, batch_of(task))
    return measure.Run(program, state_of(task, variant), batch, *([{}] if what == "rewire" else []))


# --------------------------------------------------------------------------------- what is measured
def peak(variant: str, what: str, **task: Any) -> dict[str, int]:
    """Bytes at the peak of two steps or rewires; in a fresh process."""
    wanted = Task(**task)
    tasks = {n: wanted._replace(hidden=n) for n in (measure.SMALL, wanted.hidden)}
    programs = {n: compiled(t, variant, what) for n, t in tasks.items()}
    prepare = lambda n: run_of(tasks[n], variant, what, programs[n])  # noqa: E731
    return {
        "xla": measure.xla_peak(programs[wanted.hidden]),
        "rss": measure.growth(prepare, wanted.hidden),
    }


def cells(hidden: int, seconds: float, pure: bool = True) -> Iterator[dict[str, Any]]:
    """A line for every variant's step, and for every sparse variant's rewire."""
    task = Task(1024, hidden, 0.98, 128)
    variants = [v for v in VARIANTS[not kernels.available() :] if pure or v != "pure JAX"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for what, among in (("step", variants), ("rewire", variants[:-1])):
        runs = {v: run_of(task, v, what, compiled(task, v, what)) for v in among}
        enough = {"least": REWIRES} if what == "rewire" else {"seconds": seconds}
        for variant, times in measure.in_turns(runs, **enough).items():
            found[variant, what] = measure.summary(times)
        del runs
    for (variant, what), line in found.items():
        case = {"variant": variant, "what": what, **task._asdict()}
        peaks = measure.alone("experiments.benchmarks.mlp", "--alone", json.dumps(case))
        K = active_count(tools(task, variant)[0].possible, task.sparsity)
        ratio = found["masked", "step"]["median_seconds"] / line["median_seconds"]
        share = line["median_seconds"] / (EVERY * found[variant, "step"]["median_seconds"])
        yield {
            **case,
            "connections": K,
            **line,
            **({"masked_over_this": ratio} if what == "step" else {"share_of_time": share}),
            "peak_bytes": peaks,
            "activation_bytes": task.activations,
            "peak_per_connection": {n: (b - task.activations) / K for n, b in peaks.items()},
        }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, ratios, MiB."""

    def row(line):
        yield f"{line['inputs']}-{line['hidden']}-{line['hidden']}-10, {line['variant']}"
        yield line["what"]
        yield from (f"{1000 * line[f'{w}_seconds']:.4g}" for w in ("median", "least"))
        step = line["what"] == "step"
        yield f"{line['masked_over_this']:.1f} ×" if step else f"{line['share_of_time']:.1%}"
        yield from (f"{line['peak_bytes'][w] / measure.MIB:.1f}" for w in ("xla", "rss"))
        yield f"{line['activation_bytes'] / measure.MIB:.1f}"
        yield f"{line['peak_per_connection']['rss']:.1f}"

    head = ("network", "", "ms, median", "least", "masked / this, share of 1000 steps")
    return measure.table(
        (*head, "MiB, XLA", "MiB, RSS", "of it activations", "rest, B / connection"),
        map(row, lines),
    )


def main() -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--pure", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(peak(**json.loads(options.alone))))
        return
    lines = measure.Lines(options.out)
    lines.add(measure.header("mlp", dtype="float32"))
    for hidden in options.hidden:
        for cell in cells(hidden, options.seconds, options.pure):
            lines.add(cell)
    print(table(lines.lines[1:]))


if __name__ == "__main__":
    main()
