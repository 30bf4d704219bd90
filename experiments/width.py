"""Table 2: accuracy against width, the number of active connections held at |W| of width 1.

K = |W(1.0)| to the connection at every width; the paper prints sparsities rounded to a percent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from experiments import paper, sweep, table1
from experiments.cost import network_of
from experiments.runs import Finished, Run
from experiments.scales import SMALL, run_of
from experiments.tables import (
    curve,
    grouped,
    markdown,
    named,
    of,
    ours,
    panels,
    schedule,
    theirs,
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which networks."""
    sweep.settings(parser)
    parser.add_argument("--widths", type=float, nargs="+", default=list(paper.WIDTHS))


def possible(run: Run) -> int:
    """|W| of the run's network: all its kernels."""
    config = run.config()
    fields = (config.dataset, config.model, config.depth, config.width, config.hidden)
    return network_of(*fields).possible


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Widths, on CIFAR-100 alone as in the paper; width 1 is dense."""
    for setting in settings(options):
        fields = table1.own(options.scale, setting, "dense")
        dense = run_of(options.scale, setting, method="dense", **fields)
        for width in options.widths:
            if width == 1:
                yield dense
                continue
            wide = run_of(options.scale, setting, width=width, method="gse", **fields)
            sparsity = 1 - possible(dense) / possible(wide)
            yield wide._replace(overrides=(*wide.overrides, ("sparsity", sparsity)))


def width_of(result: Finished) -> float:
    """The factor on every layer's channels or units."""
    config = result.config
    if config["model"] == "mlp":
        return config["hidden"][0] / SMALL
    return config["width"]


def settings(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Those that the paper's table has, and the digits."""
    return [setting for setting in options.settings if setting[0] != "cifar10"]


def table(options: argparse.Namespace, results: list[Finished]) -> str:
    """A table a setting: the counts are those of the last masks."""
    cells = grouped(results, lambda result: (of(result), width_of(result)))
    head = ["width", "|W|", "active", "sparsity", "accuracy", "paper"]
    parts = [schedule(options.scale)]
    for setting in settings(options):
        rows = []
        for width in options.widths:
            cell = cells.get((setting, width), [])
            counts = ["–"] * 3
            if cell:
                total, active = cell[0].possible, cell[0].active
                counts = [f"{total:,}", f"{active:,}", f"{1 - active / total:.2%}"]
            rows.append([width, *counts, ours(cell), theirs(paper.table2(setting, width))])
        parts += [f"**{named(setting)}**", markdown(head, rows)]
    return "\n\n".join(parts)


def figure(options: argparse.Namespace, results: list[Finished]) -> Any:
    """A panel a setting, the paper's numbers on an axis of their own."""
    cells = grouped(results, lambda result: (of(result), width_of(result)))
    drawn, axes = panels(len(settings(options)))
    for setting, one in zip(settings(options), axes, strict=True):
        points = [(w, cells[setting, w]) for w in options.widths if (setting, w) in cells]
        if points:
            curve(one, *zip(*points, strict=True), color="#4477aa", label="ours")
        one.set(title=named(setting), xlabel="width", ylabel="test accuracy, %")
        numbers = [(w, n) for w in options.widths if (n := paper.table2(setting, w)) is not None]
        lines = list(one.get_legend_handles_labels()[0])
        if numbers:
            right = one.twinx()
            x, y = zip(*numbers, strict=True)
            lines += right.plot(x, y, "s--", color="0.5", label="paper, right")
            right.spines["top"].set_visible(False)
        one.legend(handles=lines, frameon=False, fontsize=8)
    return drawn


EXPERIMENT = sweep.Experiment("width", __doc__, arguments, runs, table, figure)

if __name__ == "__main__":
    sys.exit(sweep.main(EXPERIMENT))
