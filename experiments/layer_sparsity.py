"""Figure 4: the sparsity of each layer after training, method by method.

Its runs are those of Table 1, which are not run again.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from dst.training import figures
from experiments import sweep, table1
from experiments.runs import Finished
from experiments.tables import LABELS, grouped, markdown, named, panels

METHODS = ("pruning", "random", "snip", "grasp", "synflow", "set", "rigl", "gse")


def in_order(layers: dict[str, Any]) -> list[str]:
    """Conv_2 before Conv_10."""
    return sorted(layers, key=figures.numbers_by_value)


def sparsity(cell: list[Finished]) -> dict[str, float]:
    """Layer -> sparsity in %, the mean over seeds."""
    shares = [
        {layer: 100 * (1 - r.end["active"][layer] / n) for layer, n in r.end["possible"].items()}
        for r in cell
    ]
    return {layer: float(np.mean([s[layer] for s in shares])) for layer in shares[0]}


def panels_of(options: argparse.Namespace, results: list[Finished]) -> list[tuple]:
    """(setting, sparsity, {method: its runs}), those without a run left out."""
    cells = grouped(results, table1.cell)
    found = []
    for setting in options.settings:
        for s in options.sparsities:
            here = {m: cells.get((setting, m, s), []) for m in options.methods if m != "dense"}
            if here := {method: cell for method, cell in here.items() if cell}:
                found.append((setting, s, here))
    return found


def table(options: argparse.Namespace, results: list[Finished]) -> str:
    """A row a layer, a column a method."""
    parts = ["Sparsity of each layer after training in %, mean over seeds."]
    for setting, s, here in panels_of(options, results):
        lines = {method: sparsity(cell) for method, cell in here.items()}
        layers = in_order(next(iter(lines.values())))
        rows = [[layer, *(f"{line[layer]:.1f}" for line in lines.values())] for layer in layers]
        parts.append(f"**{named(setting)}, {s:.0%} sparsity**")
        parts.append(markdown(["layer", *(LABELS[method] for method in lines)], rows))
    return "\n\n".join(parts)


def figure(options: argparse.Namespace, results: list[Finished]) -> Any:
    """A panel a setting and sparsity, a line a method; 5th to 95th percentile as a band."""
    found = panels_of(options, results)
    drawn, axes = panels(len(found), width=6.4, height=4.2)
    for (setting, s, here), one in zip(found, axes, strict=True):
        layers = in_order(next(iter(here.values()))[0].end["possible"])
        for n, (method, cell) in enumerate(here.items()):
            ours = {"color": "#ee6677", "linewidth": 2.2, "zorder": 3} if method == "gse" else {}
            style = ours or {"color": f"C{n + (n >= 3)}", "linewidth": 1.2}
            mean = sparsity(cell)
            y = [mean[layer] for layer in layers]
            one.plot(layers, y, marker=".", label=LABELS[method], **style)
            seeds = [sparsity([result]) for result in cell]
            each = [[seed[layer] for layer in layers] for seed in seeds]
            low, high = np.percentile(each, [5, 95], axis=0)
            one.fill_between(layers, low, high, color=style["color"], alpha=0.12, linewidth=0)
        one.axhline(100 * s, color="0.4", linewidth=1, linestyle="--")
        one.tick_params(axis="x", rotation=90, labelsize=7)
        one.set(title=f"{named(setting)}, {s:.0%}", ylabel="sparsity of the layer, %")
        one.legend(frameon=False, fontsize=8, ncols=2)
    return drawn


EXPERIMENT = sweep.Experiment(
    "layer_sparsity",
    __doc__,
    lambda parser: table1.arguments(parser, METHODS),
    table1.runs,
    table,
    figure,
)

if __name__ == "__main__":
    sys.exit(sweep.main(EXPERIMENT))
