"""Figures 2 and 3: accuracy against the size of the subset S, three heuristics, SET and RigL.

At one sparsity, 98 %, it is Figure 2; --sparsities 0.9 0.95 0.98 makes Figure 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments import paper, sweep
from experiments.runs import Finished, Run
from experiments.scales import run_of
from experiments.tables import (
    COLORS,
    curve,
    grouped,
    interval,
    markdown,
    named,
    of,
    ours,
    panels,
    schedule,
    theirs,
)

RATIOS = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)  # |S| / |P|
HEURISTICS = ("uniform", "grabo", "synflow")
NAMES = {"uniform": "Random", "grabo": "GraBo", "synflow": "SynFlow", "graest": "GraEst"}
LINES = {"set": ("SET", "--"), "rigl": ("RigL", ":")}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which points."""
    sweep.settings(parser)
    sweep.sparsities(parser)
    parser.set_defaults(sparsities=[0.98])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="|S| / |P|")
    every = [*HEURISTICS, "graest"]
    parser.add_argument("--heuristics", nargs="+", choices=every, default=list(HEURISTICS))


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Heuristics x ratios, and the two lines."""
    for setting in options.settings:
        for sparsity in options.sparsities:
            here = {"scale": options.scale, "setting": setting, "sparsity": sparsity}
            for method in LINES:
                yield run_of(**here, method=method)
            for ratio in options.ratios:
                for heuristic in options.heuristics:
                    yield run_of(**here, method="gse", heuristic=heuristic, subset_ratio=ratio)


def cell(result: Finished) -> tuple:
    """The point or line that a run belongs to."""
    config = result.config
    if config["method"] in LINES:
        return of(result), config["sparsity"], config["method"], None
    return of(result), config["sparsity"], config["heuristic"], config["subset_ratio"]


def share(result: Finished) -> float:
    """|S| / |W| at the first rewire, in %: the axis of the paper's figure."""
    sizes = [event["subset_realised"] for event in result.events if event["event"] == "rewire"]
    return 100 * (sizes[0] if sizes else 0) / result.possible


def table(options: argparse.Namespace, results: list[Finished]) -> str:
    """A table a panel: a row a ratio, a column a heuristic."""
    cells = grouped(results, cell)
    parts = [schedule(options.scale)]
    for setting in options.settings:
        for sparsity in options.sparsities:
            at = lambda *rest: ours(cells.get((setting, sparsity, *rest), []))  # noqa: B023, E731
            rows = []
            for ratio in options.ratios:
                shares = [
                    share(r)
                    for h in options.heuristics
                    for r in cells.get((setting, sparsity, h, ratio), [])
                ]
                size = f"{np.mean(shares):.1f} %" if shares else "–"
                row = [f"{ratio:g}", size, *(at(h, ratio) for h in options.heuristics)]
                number = paper.table1(setting, "gse", sparsity) if ratio == 10 else None
                rows.append([*row, theirs(number)])
            empty = ["–"] * (len(options.heuristics) - 1)
            for method, (name, _) in LINES.items():
                number = theirs(paper.table1(setting, method, sparsity))
                rows.append([name, "", at(method, None), *empty, number])
            head = ["|S| / |P|", "|S| / |W|", *(NAMES[h] for h in options.heuristics)]
            parts += [f"**{named(setting)}, {sparsity:.0%} sparsity**"]
            parts += [markdown([*head, "paper (GraBo)"], rows)]
    return "\n\n".join(parts)


def figure(options: argparse.Namespace, results: list[Finished]) -> Any:
    """A panel a setting and sparsity: means, and 5th to 95th percentile as bars and bands."""
    cells = grouped(results, cell)
    where = [(setting, s) for setting in options.settings for s in options.sparsities]
    drawn, axes = panels(len(where))
    for (setting, sparsity), one in zip(where, axes, strict=True):
        for heuristic in options.heuristics:
            points = [cells.get((setting, sparsity, heuristic, r), []) for r in options.ratios]
            points = [point for point in points if point]
            if points:
                x = [np.mean([share(r) for r in point]) for point in points]
                curve(one, x, points, color=COLORS[heuristic], ms=4, label=NAMES[heuristic])
        for method, (name, style) in LINES.items():
            if line := cells.get((setting, sparsity, method, None)):
                mean, low, high = interval(r.accuracy for r in line)
                one.axhline(mean, color="0.2", linestyle=style, label=name)
                one.axhspan(low, high, color="0.5", alpha=0.12, linewidth=0)
        title = f"{named(setting)}, {sparsity:.0%}"
        one.set(title=title, xlabel="|S| / |W|, %", ylabel="test accuracy, %")
        one.legend(frameon=False, fontsize=8)
    return drawn


EXPERIMENT = sweep.Experiment("subset_size", __doc__, arguments, runs, table, figure)

if __name__ == "__main__":
    sys.exit(sweep.main(EXPERIMENT))
