"""Runs of the paper's length beside the paper's numbers: a table, and accuracy over the epochs.

python -m experiments.full_length [FIGURE.png]      (of the logs in experiments/results)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from dst.methods.table import row_of
from dst.training import figures, log
from experiments import paper
from experiments.summary import RESULTS
from experiments.tables import LABELS, WORDS, markdown, named, theirs

EPOCHS = 200
# Variances of first weights, times their unit's connections, that the paper may have had: that of
# the authors' later code, and PyTorch's default.
LIKELY = ("1", "1/3")
HEADER = ["network", "method", "sparsity", "ours", "seeds", "paper", "difference", "hours a run"]


class Cell(NamedTuple):
    """What is compared over seeds."""

    setting: tuple[str, str]  # (data set, model)
    variance: str  # of first weights, times their unit's connections
    method: str
    variant: str  # the heuristic of GSE; SynFlow's rounds, if they are not its own code's
    ratio: float  # |S| / |P|
    sparsity: float
    width: float = 1.0  # factor on every layer's channels

    @property
    def network(self) -> str:
        """Data set and model, and the variance of first weights if it is not 1."""
        variance = [] if self.variance == "1" else [f"variance {self.variance}"]
        return ", ".join([named(self.setting), *variance])

    @property
    def theirs(self) -> tuple[Any, ...]:
        """What the paper has one number for, however we set up its network."""
        return paper.setting_of(*self.setting), *self[2:]

    @property
    def likely(self) -> tuple[bool, int]:
        """Rises with what speaks for a set-up: their later network, then the variance."""
        variance = LIKELY.index(self.variance) if self.variance in LIKELY else -1
        return self.setting[1] in paper.VARIANTS, variance

    @property
    def name(self) -> str:
        """The method; what is not the paper's choice is said."""
        words = [self.variant] if self.variant not in ("", "grabo") else []
        words += [f"S = {self.ratio:g} P"] if self.method == "gse" and self.ratio != 10 else []
        words += [f"width {self.width:g}"] if self.width != 1 else []
        return ", ".join([LABELS[self.method], *words])

    @property
    def paper(self) -> float | None:
        """Theirs, of Table 1; of a wider network, which has the connections of width 1, Table 2."""
        if self.width != 1:
            return paper.table2(self.setting, self.width)
        as_theirs = self.name == LABELS[self.method] or self.method == "synflow"  # rounds: not said
        return paper.table1(self.setting, self.method, self.sparsity) if as_theirs else None


class Log(NamedTuple):
    """A finished run."""

    cell: Cell
    config: dict[str, Any]
    platform: str
    events: list[dict[str, Any]]


def logs() -> Iterator[Log]:
    """Every committed run of the paper's length."""
    for path in sorted(RESULTS.glob("*/*.jsonl")):
        header, events = log.read(path)
        config = header["config"]
        if config["epochs"] == EPOCHS and events[-1]["event"] == "end":
            yield Log(cell_of(config), config, header["devices"]["platform"], events)


def cell_of(config: dict[str, Any]) -> Cell:
    """Where a run belongs; the first logs do not have every field."""
    method, variant = config["method"], ""
    if method == "gse":
        variant = config["heuristic"]
    if method == "synflow" and (rounds := config.get("synflow_rounds")):
        variant = f"{rounds} rounds" if rounds != row_of(method).iterations else ""
    by_model = config.get("init") == "model"
    gain = Fraction(config["init_gain"]).limit_denominator(100)
    variance = "of the model's own" if by_model else str(gain)
    numbers = config["subset_ratio"], config["sparsity"], config["width"]
    return Cell((config["dataset"], config["model"]), variance, method, variant, *numbers)


def cells() -> dict[Cell, list[Log]]:
    """Best of the paper's first, then in the order of their names."""
    found: dict[Cell, list[Log]] = {}
    for one in logs():
        found.setdefault(one.cell, []).append(one)
    rank = lambda c: (c.setting, c.variance, c.sparsity, -(c.paper or 0), c.name)  # noqa: E731
    return {cell: found[cell] for cell in sorted(found, key=rank)}


def closest() -> dict[Cell, list[Log]]:
    """Of each of the paper's numbers, the runs of the set-up that is most likely the paper's."""
    found = cells()
    best: dict[tuple[Any, ...], Cell] = {}
    for cell in sorted(found, key=lambda cell: cell.likely):
        best[cell.theirs] = cell
    return {cell: runs for cell, runs in found.items() if cell in best.values()}


def table() -> str:
    """Of the likeliest set-up, the mean over the seeds in %, the paper's, and the difference."""
    return markdown(HEADER, [row(cell, runs) for cell, runs in closest().items()])


def every() -> str:
    """The same of every set-up."""
    return markdown(HEADER, [row(cell, runs) for cell, runs in cells().items()])


def row(cell: Cell, runs: list[Log]) -> list[str]:
    """One line of the table."""
    ours = 100 * sum(run.events[-1]["test_accuracy"] for run in runs) / len(runs)
    return [
        cell.network,
        cell.name,
        f"{cell.sparsity:.0%}",
        f"{ours:.2f}",
        ", ".join(sorted(str(run.config["seed"]) for run in runs)),
        theirs(cell.paper),
        "–" if cell.paper is None else f"{ours - cell.paper:+.2f}",
        hours(runs),
    ]


def hours(runs: list[Log]) -> str:
    """Of training on a shared machine, the mean of each kind."""
    found: dict[str, list[float]] = {}
    for run in runs:
        seconds = sum(event["seconds"] for event in run.events if event["event"] == "train")
        found.setdefault(run.platform.upper(), []).append(seconds / 3600)
    return ", ".join(f"{sum(h) / len(h):.1f} ({p})" for p, h in sorted(found.items()))


def figure() -> Any:
    """Test accuracy over the epochs, a line a run, and the paper's numbers as dotted lines."""
    drawn = figures.figure(9.6, 4.2)
    axes = drawn.add_subplot()
    found = closest()
    names = [*dict.fromkeys(cell.name for cell in found)]  # matplotlib has ten colors
    networks = [*dict.fromkeys(cell.network for cell in found)]
    for cell, runs in found.items():
        color = f"C{names.index(cell.name)}"
        style = ["--", "-", "-."][networks.index(cell.network) % 3]
        label = f"{cell.name}, {cell.network.partition(', ')[2]}"
        for run in runs:
            points = [
                (e["epoch"], 100 * e["test_accuracy"]) for e in run.events if "test_loss" in e
            ]
            axes.plot(*zip(*points, strict=True), color=color, ls=style, lw=1.2, label=label)
        if cell.paper is not None:
            axes.axhline(cell.paper, color=color, ls=":", lw=1)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=8, **beside)
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    data = dict.fromkeys(f"{WORDS[c.setting[0]]}, {c.sparsity:.0%}" for c in found if c.sparsity)
    axes.set_title("; ".join([*data, "dotted: the paper's, at the end"]), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return drawn


if __name__ == "__main__":
    print(table())
    if sys.argv[1:]:
        Path(sys.argv[1]).write_bytes(figures.png(figure()))
