"""Ours beside the paper's: means over seeds, their spread, Markdown, the look of figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np

from dst.methods.table import METHODS
from dst.training import figures
from experiments import paper
from experiments.benchmarks import measure
from experiments.runs import Finished
from experiments.scales import SCALES

markdown = measure.table
LABELS = {name: row.label for name, row in METHODS.items()}
WORDS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "vgg": "VGG-16",
    "vgg_dropout": "VGG-16 with dropout",
    "resnet": "ResNet-56",
}
COLORS = {"uniform": "#4477aa", "grabo": "#ee6677", "synflow": "#228833", "graest": "#aa3377"}


def grouped(
    results: Iterable[Finished], key: Callable[[Finished], Hashable]
) -> dict[Any, list[Finished]]:
    """The runs of each cell, over seeds."""
    cells: dict[Any, list[Finished]] = defaultdict(list)
    for result in results:
        cells[key(result)].append(result)
    return cells


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean, and the 5th and the 95th percentile, between which nine tenths of the seeds lie."""
    values = np.asarray(list(values), float)
    low, high = np.percentile(values, [5, 95])
    return float(values.mean()), float(low), float(high)


def ours(cell: list[Finished]) -> str:
    """`mean (5th to 95th percentile, n seeds)` of the accuracy in %, or a dash."""
    if not cell:
        return "–"
    mean, low, high = interval(result.accuracy for result in cell)
    if len(cell) == 1:
        return f"{mean:.2f} (1 seed)"
    return f"{mean:.2f} ({low:.2f} to {high:.2f}, {len(cell)} seeds)"


def theirs(value: float | None) -> str:
    """A number of the paper's, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def schedule(scale: str) -> str:
    """What the numbers of ours are, in one line that stands over a table."""
    if scale == "smoke":
        return "Smoke scale: a small MLP on digits, to see that everything runs."
    by = {"paper": "the paper's schedule"}.get(
        scale, f"the paper's schedule made {SCALES[scale].divisor} times shorter"
    )
    return (
        f"Top-1 test accuracy in %: ours after {by}, mean (5th to 95th percentile over seeds); "
        "the paper's after 200 epochs, mean of 3 seeds."
    )


def named(setting: tuple[str, str]) -> str:
    """(data set, model) in words."""
    return ", ".join(WORDS.get(part, part) for part in setting)


def of(result: Finished) -> tuple[str, str]:
    """The run's (data set, model), as the paper calls it."""
    return paper.setting_of(result.config["dataset"], result.config["model"])


def curve(axes: Any, x: Iterable[float], cells: Iterable[list[Finished]], **style: Any) -> None:
    """Mean accuracies at x, with bars from the 5th to the 95th percentile."""
    mean, low, high = np.transpose([interval(r.accuracy for r in cell) for cell in cells])
    axes.errorbar(x, mean, [mean - low, high - mean], marker="o", capsize=3, **style)


def panels(count: int, width: float = 4.6, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure of `count` panels in rows of two."""
    columns = min(2, count)
    rows = -(-count // columns)
    drawn = figures.figure(width * columns, height * rows)
    axes = [drawn.add_subplot(rows, columns, n + 1) for n in range(count)]
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return drawn, axes
