"""Table 1: every method at 90, 95 and 98 % sparsity, ResNet-56 and VGG-16, CIFAR-10 and -100."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from dst.methods.table import METHODS as KNOWN
from experiments import paper, sweep
from experiments.runs import Finished, Run
from experiments.scales import run_of
from experiments.tables import (
    COLORS,
    LABELS,
    grouped,
    markdown,
    named,
    of,
    ours,
    panels,
    schedule,
    theirs,
)

METHODS = (
    *("dense", "lottery", "pruning", "random", "snip", "grasp", "grasp_abs"),
    *("synflow", "set", "rigl", "gse"),
)
FROM_DENSE = ("dense", "lottery", "pruning")  # these train every connection at first


def arguments(parser: argparse.ArgumentParser, methods: tuple[str, ...]) -> None:
    """Which cells; `methods` if the user does not say."""
    sweep.settings(parser)
    sweep.sparsities(parser)
    parser.add_argument("--methods", nargs="+", choices=KNOWN, default=list(methods))


def own(scale: str, setting: tuple[str, str], method: str) -> dict[str, Any]:
    """What a row has of its own beside its name."""
    fields: dict[str, Any] = {}
    if scale == "short" and setting[1] == "vgg" and method in FROM_DENSE:
        fields["init_gain"] = 1.0  # 2, that scale's, dies within five steps at learning rate 0.1
    if scale == "short" and method in ("grasp", "grasp_abs"):
        fields["score_batches"] = 100  # of 391: scoring would take longer than training
    if method == "deepr":
        fields["l1"] = 1e-5
    if method == "itop":  # explores to the last epoch
        fields["rewire_end_epoch"] = float(run_of(scale, setting).config().epochs)
    return fields


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Settings x methods x sparsities; dense has no sparsity."""
    for setting in options.settings:
        for method in options.methods:
            for sparsity in options.sparsities[:1] if method == "dense" else options.sparsities:
                fields = own(options.scale, setting, method)
                fields |= {} if method == "dense" else {"sparsity": sparsity}
                yield run_of(options.scale, setting, method=method, **fields)


def cell(result: Finished) -> tuple:
    """The cell of the table that a run belongs to."""
    method = result.config["method"]
    return of(result), method, None if method == "dense" else result.config["sparsity"]


def table(options: argparse.Namespace, results: list[Finished]) -> str:
    """One table a setting, ours beside the paper's."""
    cells = grouped(results, cell)
    head = ["method"]
    for sparsity in options.sparsities:
        head += [f"{sparsity:.0%}", "paper"]
    parts = [schedule(options.scale)]
    for setting in options.settings:
        rows = []
        for method in options.methods:
            row = [LABELS[method]]
            for sparsity in options.sparsities:
                at = None if method == "dense" else sparsity
                row.append(ours(cells.get((setting, method, at), [])))
                row.append(theirs(paper.table1(setting, method, sparsity)))
            rows.append(row)
        parts += [f"**{named(setting)}**", markdown(head, rows)]
    return "\n\n".join(parts)


def figure(options: argparse.Namespace, results: list[Finished]) -> Any:
    """A panel a setting: each seed a dot, the mean a bar, the paper's number a ring."""
    drawn, axes = panels(len(options.settings), height=0.3 * len(options.methods) + 1.2)
    cells = grouped(results, cell)
    colors = tuple(COLORS.values())
    for setting, one in zip(options.settings, axes, strict=True):
        for n, sparsity in enumerate(options.sparsities):
            color = colors[n % len(colors)]
            for y, method in enumerate(options.methods):
                at = None if method == "dense" else sparsity
                values = [r.accuracy for r in cells.get((setting, method, at), [])]
                one.plot(values, [y] * len(values), ".", color=color, alpha=0.6)
                if values:
                    one.plot(sum(values) / len(values), y, "|", color=color, ms=12, mew=2)
                number = paper.table1(setting, method, sparsity)
                if number is not None:
                    one.plot(number, y, "o", color=color, mfc="none", alpha=0.7)
            one.plot([], [], "|", color=color, ms=12, mew=2, label=f"{sparsity:.0%}")
        if setting in paper.SETTINGS:
            one.plot([], [], "o", color="0.4", mfc="none", label="paper")
        one.set_yticks(range(len(options.methods)), [LABELS[m] for m in options.methods])
        one.invert_yaxis()
        one.set(title=named(setting), xlabel="test accuracy, %")
        one.legend(frameon=False, fontsize=8)
    return drawn


EXPERIMENT = sweep.Experiment(
    "table1", __doc__, lambda parser: arguments(parser, METHODS), runs, table, figure
)

if __name__ == "__main__":
    sys.exit(sweep.main(EXPERIMENT))
