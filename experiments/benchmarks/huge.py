"""Networks whose dense weights would not fit: memory and time of a step and a rewire, and learning.

    python -m experiments.benchmarks.huge [--networks 65536 1048576] [--steps 30] [--out FILE.jsonl]

1024-H-H-10 on scikit-learn's digits, each pixel as 4 x 4, through the user's functions, as in
`mlp`. H = 65536 is at 99 % sparsity, batch 128: weights, gradient and momentum of the hidden layer
alone would be 51.5 GB. H = 2^20 has 32 connections a unit in the hidden layer, batch 32: 13 TB.
Every network lives in a process of its own; first it takes `--steps` steps, then one rewire, the
largest, then some steps more. Memory is defined in `measure`; a loss is that of a step's own batch.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from dst.connections.backends.dispatch import tier
from dst.methods.distributions import active_count
from dst.state import active_counts
from experiments.benchmarks import measure
from experiments.benchmarks.mlp import EVERY, Task, compiled, state_of, tools

VARIANT = "kernels"  # pure JAX where there are none
# Without a floor the global drop takes all of the last layer of 2^20, whose fan-in is largest.
# "er" gives every layer 16 (n_in + n_out) connections, 33,554,432 the hidden one; the last is full.
TASKS = {
    65536: Task(1024, 65536, 0.99, 128, learning_rate=3e-4),
    2**20: Task(1024, 2**20, 1 - 60_833_792 / (2**40 + 1034 * 2**20), 32, "er", 1e-6, 0.5),
}


def batches(task: Task) -> Iterator[tuple[Any, Any]]:
    """Random digits for ever: inputs (1, B, 1024), labels (1, B)."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).reshape(-1, 8, 8).repeat(4, 1).repeat(4, 2).reshape(-1, 1024)
    rng = np.random.default_rng(0)
    while True:
        chosen = rng.choice(len(labels), task.batch, replace=False)
        yield (
            jnp.asarray(images[None, chosen], jnp.float32),
            jnp.asarray(labels[None, chosen], jnp.int32),
        )


def train(program: Any, state: Any, data: Iterator, steps: int) -> tuple[Any, list, list]:
    """State, seconds and losses of some steps."""
    seconds, losses = [], []
    for _ in range(steps):
        batch = next(data)
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, batch))
        seconds.append(time.perf_counter() - begin)
        losses.append(round(float(metrics["loss"]), 4))
    return state, seconds, losses


def live(task: Task, steps: int) -> dict[str, Any]:
    """What becomes of one network; in a fresh process."""
    small, data = task._replace(hidden=measure.SMALL), batches(task)
    train(compiled(small, VARIANT, "step"), state_of(small, VARIANT), data, 1)
    compiled(small, VARIANT, "rewire")(state_of(small, VARIANT), next(data), {})
    step, rewire = (compiled(task, VARIANT, what) for what in ("step", "rewire"))
    base = measure.settle()
    begin = time.perf_counter()
    state = state_of(task, VARIANT)
    made = time.perf_counter() - begin

    measure.forget_peak()
    state, seconds, losses = train(step, state, data, steps)
    step_rss = measure.peak_since() - base

    state = state.replace(step=jnp.int32(EVERY))
    measure.forget_peak()
    begin = time.perf_counter()
    state, told = jax.block_until_ready(rewire(state, next(data), {}))
    rewiring = time.perf_counter() - begin
    rewire_rss = measure.peak_since() - base
    state, _, after = train(step, state, data, 5)
    return {
        "seconds_to_make": made,
        "step": measure.summary(seconds),
        "step_bytes": {"xla": measure.xla_peak(step), "rss": step_rss},
        "losses": losses,
        "rewire_seconds": rewiring,
        "rewire_bytes": {"xla": measure.xla_peak(rewire), "rss": rewire_rss},
        "rewired": {
            k: int(told[k]) for k in ("pruned", "grown", "subset_asked", "subset_realised")
        },
        "losses_after": after,
        "active": {path: int(n) for path, n in active_counts(state.masks).items()},
    }


def cell(hidden: int, steps: int) -> dict[str, Any]:
    """A line for a network."""
    task = TASKS[hidden]
    net = tools(task, VARIANT)[0]
    found = measure.alone("experiments.benchmarks.huge", "--alone", hidden, "--steps", steps)
    share = found["rewire_seconds"] / (EVERY * found["step"]["median_seconds"])
    return {
        **task._asdict(),
        "possible": net.possible,
        "connections": active_count(net.possible, task.sparsity),
        "dense_bytes": 12 * net.possible,
        "activation_bytes": task.activations,
        **found,
        "rewire_share_of_time": share,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""

    def row(line):
        yield f"1024-{line['hidden']}-{line['hidden']}-10, batch {line['batch']}"
        yield f"{line['connections'] / 1e6:.1f} M of {line['possible']:.2g}"
        yield f"{line['dense_bytes'] / 1e9:.4g}"
        yield f"{line['step']['median_seconds']:.2f}"
        yield " / ".join(f"{line['step_bytes'][w] / 2**30:.2f}" for w in ("xla", "rss"))
        yield f"{line['rewire_seconds']:.0f} ({line['rewire_share_of_time']:.1%})"
        yield " / ".join(f"{line['rewire_bytes'][w] / 2**30:.2f}" for w in ("xla", "rss"))
        last = statistics.mean(line["losses"][-5:])
        yield f"{line['losses'][0]:.2f} → {last:.2f} in {len(line['losses'])} steps"

    head = ("network", "connections", "dense w + g + m, GB", "s a step", "GiB, XLA / RSS")
    more = ("s a rewire (of 1000 steps)", "GiB, XLA / RSS", "loss")
    return measure.table((*head, *more), map(row, lines))


def main() -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--networks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(live(TASKS[int(options.alone)], options.steps)))
        return
    lines = measure.Lines(options.out)
    lines.add(measure.header("huge", dtype="float32", tier=tier()))
    for hidden in options.networks:
        lines.add(cell(hidden, options.steps))
    print(table(lines.lines[1:]))


if __name__ == "__main__":
    main()
