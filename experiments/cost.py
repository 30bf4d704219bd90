"""What every method costs, as one Markdown table: memory, arithmetic, and what XLA plans for it.

    python -m experiments.cost [--model vgg|resnet|mlp] [--sparsity 0.9 0.95 0.98] [--methods ...]
                               [--logs FOLDER ...] [--measure]

Peak words and FLOPs are counted, see `dst.training.cost`: words of 4 bytes per possible weight, and
training over dense training. These FLOPs are those of the paper's schedule on CIFAR-100, as if
layers kept their first shares of the connections. With --logs those of real runs of this kind of
model, counted from their masks, stand beside them. --measure adds what XLA plans for a jitted step
and a jitted rewire on one 2048 x 2048 layer at the highest sparsity, in words per possible weight:
arguments, results and temporaries (SynFlow's float64 pass is a program of its own, and not in it).
Masked execution holds dense arrays for every method, so its number says little of the method.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import dst
from dst import models
from dst.data import DATASETS
from dst.data import pipeline as data
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.methods.distributions import active_count, first_counts
from dst.methods.grow import subset_sizes
from dst.methods.heuristics import HEURISTICS
from dst.methods.memory import begun
from dst.methods.plan import due, plan
from dst.methods.schedules import largest_remainder
from dst.methods.settings import method_of
from dst.methods.table import METHODS
from dst.network import Network
from dst.rewire import on_host, rewire_body
from dst.training import cost, log
from dst.update import parallel, update_body
from experiments.benchmarks import measure
from experiments.runs import configured, training_steps, trainings
from experiments.runs import logged as config_of

WIDE, BATCH = 2048, 8  # the layer of --measure, and a batch whose activations are nothing beside it
EXECUTIONS = ("masked", "sparse")


# ----------------------------------------------------------------------------------------- the rows
def rows(methods: list[str]) -> Iterator[dict[str, Any]]:
    """What the config of each row has of its own."""
    for name in methods:
        if name == "gse":
            yield from ({"method": name, "heuristic": heuristic} for heuristic in HEURISTICS)
        else:
            yield {"method": name}
        if name == "rigl":
            yield {"method": name, "growth_memory": "streamed"}


def label(config: ConfigDict) -> str:
    """The row that a run belongs to."""
    if config.method == "gse":
        return f"gse ({config.heuristic})"
    return config.method + (" (streamed)" if config.growth_memory == "streamed" else "")


def order(method: Method) -> str:
    """Of which size its memory is, and when."""
    if method.before:
        return "dense, once"
    if method.score == "dense gradient" and method.growth_memory == "dense":
        return "dense at every rewire"
    return "dense" if method.first_sparsity == 0 or method.score == "momentum" else "sparse"


# ----------------------------------------------------------------------- counted, from the schedule
@functools.cache
def network_of(dataset: str, model: str, depth: int, width: float, hidden: tuple) -> Network:
    """A run's network."""
    config = configured(dataset=dataset, model=model, depth=depth, width=width, hidden=hidden)
    source = DATASETS[dataset]
    example = jax.ShapeDtypeStruct((1, *source.image), jnp.float32)
    return dst.network(models.build(config, source.num_classes), example, train=False)


class Run:
    """What a config says of a run before it starts."""

    def __init__(self, config: ConfigDict):
        images = DATASETS[config.dataset].train_images - config.validation_size
        per_epoch = data.steps_per_epoch(images, config.batch_size)
        self.net = network_of(
            config.dataset, config.model, config.depth, config.width, config.hidden
        )
        self.method, self.batch_size = method_of(config, per_epoch), config.batch_size
        self.examples = config.score_batches * config.batch_size or images
        self.levels = trainings(config)
        self.steps = training_steps(config)  # of one training

    def cost(self, events: list[dict[str, Any]], steps: int) -> dict[str, float]:
        """`dst.training.cost.run_cost` of these events."""
        first, rounds = first_counts(self.net, self.method), len(self.levels)
        numbers = (steps, self.batch_size, self.examples, rounds)
        return cost.run_cost(self.net, self.method, first, events, *numbers)

    def planned(self) -> dict[str, float]:
        """The cost if every layer keeps its first share of the connections."""
        return self.cost(list(self.events()), self.steps * len(self.levels))

    def events(self) -> Iterator[dict[str, Any]]:
        """As they would be logged."""
        method, first = self.method, [*first_counts(self.net, self.method).values()]
        sizes = [layer.size for layer in self.net.layers.values()]

        def event(name: str, step: int, active: int, S: int = 0) -> dict[str, Any]:
            shares = largest_remainder(active, first, sizes)
            counts = dict(zip(self.net.layers, shares.tolist(), strict=True))
            return {"event": name, "step": step, "active": counts, "subset_realised": S}

        if method.before:
            yield event("prune", 0, active_count(self.net.possible, method.sparsity))
        for i, sparsity in enumerate(self.levels[1:], 1):
            yield event("prune", i * self.steps, active_count(self.net.possible, sparsity))
        planned = plan(self.net, method)
        asked = subset_sizes(method, planned).tolist()
        for step, active, S in zip(planned.steps.tolist(), planned.active, asked, strict=True):
            if step < self.steps and due(method, step):
                yield event("rewire", step, int(active), S)


# ------------------------------------------------------------------------- counted, from real masks
def logged(folders: list[Path], model: str) -> dict[tuple[str, float], list[float]]:
    """Training FLOPs over dense of the logs of this model: {(row, sparsity): one a run}."""
    found: dict[tuple[str, float], list[float]] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.jsonl")):
        header, events = log.read(path)
        fields = header.get("config", {})
        if fields.get("model") == model and events:
            config = config_of(header)
            spent = Run(config).cost(events, events[-1]["step"])["training_flops_vs_dense"]
            found.setdefault((label(config), config.sparsity), []).append(spent)
    return found


def told(runs: dict[tuple[str, float], list[float]], row: str) -> str:
    """'98 %: 0.0201 (3)' for each sparsity: the mean of 3 runs."""
    mine = {sparsity: each for (name, sparsity), each in sorted(runs.items()) if name == row}
    said = (f"{percent(s)}: {number(np.mean(each))} ({len(each)})" for s, each in mine.items())
    return ", ".join(said) or "–"


# ----------------------------------------------------------------------------------------- measured
class Wide(nn.Module):
    """One square layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDE, use_bias=False)(x)


def square(apply, x):
    """A loss whose gradient needs the outputs."""
    return jnp.square(apply(x)).mean(), {}


def xla_words(config: ConfigDict) -> tuple[float | None, float | None]:
    """Words per possible weight that XLA plans for a step and for a rewire, if there is one."""
    x = jax.ShapeDtypeStruct((1, WIDE), jnp.float32)
    net = dst.network(Wide(), x, execution=config.execution)
    method, tx, one = method_of(config, 390), optax.sgd(0.1, 0.9), jax.local_devices()[:1]
    state = begun(dst.init_state(net, tx, method, jax.random.key(0)))  # its shapes are all the same
    batch = jnp.ones((1, BATCH, WIDE))

    def words(body: Any, axes: tuple, *arguments: Any) -> float:
        shapes = measure.shapes(arguments)
        program = parallel(body, axes, one, donate=(0,)).lower(*shapes).compile()
        return measure.xla_peak(program) / 4 / net.possible

    step = words(update_body(net, tx, square), (None, 0), state, batch)
    if not method.moves:
        return step, None
    state = state.replace(step=jnp.int32(method.every))
    fg = on_host(net, method)(state)
    body = rewire_body(net, tx, method, square)
    return step, words(body, (None, 0, None), state, batch, fg)


def measured(row: dict[str, Any], sparsity: float) -> Iterator[str]:
    """A step and a rewire, masked and, where the method runs so, sparse."""
    for execution in EXECUTIONS:
        try:
            config = configured(**row, sparsity=sparsity, execution=execution)
        except ConfigError:  # this method is not truly sparse
            yield from ("–", "–")
        else:
            yield from ("–" if n is None else number(n) for n in xla_words(config))


# ---------------------------------------------------------------------------------------- the table
def number(value: Any) -> str:
    """Three digits."""
    return f"{value:.3g}"


def percent(sparsity: float) -> str:
    """0.98 -> '98 %'."""
    return f"{100 * sparsity:.4g} %"


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    runs = logged(options.logs, options.model)
    head = ["method", "memory", *(f"peak words, {percent(s)}" for s in options.sparsity)]
    head += [f"training FLOPs / dense, {percent(s)}" for s in options.sparsity]
    head += ["counted from masks (runs)"] * bool(options.logs)
    if options.measure:
        head += [f"XLA: {what}, {e}" for e in EXECUTIONS for what in ("step", "rewire")]
    body = []
    for row in rows(options.methods):
        configs = [
            configured(**row, model=options.model, dataset="cifar100", sparsity=s)
            for s in options.sparsity
        ]
        costs = [Run(config).planned() for config in configs]
        line = [label(configs[0]), order(method_of(configs[0], 390))]
        line += [number(c["peak_words_per_weight"]) for c in costs]
        line += [number(c["training_flops_vs_dense"]) for c in costs]
        line += [told(runs, line[0])] * bool(options.logs)
        if options.measure:
            line += measured(row, max(options.sparsity))
        body.append(line)
    return measure.table(head, body)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vgg", "resnet", "mlp"), default="vgg")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--logs", type=Path, nargs="+", default=[])
    parser.add_argument("--measure", action="store_true")
    print(table(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
