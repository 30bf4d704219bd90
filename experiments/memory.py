"""What a process takes while it trains, masked and truly sparse, against the size of the network.

Each run trains an MLP of two hidden layers on the digits and rewires as it goes; its peak is the
resident memory of the whole process. The smallest network, 64-64, tells what Python, JAX and the
data take. The counted words are those of `dst.training.cost`, weights and what is kept beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from experiments import sweep
from experiments.runs import Finished, Run
from experiments.scales import run_of
from experiments.tables import grouped, interval, markdown, panels

# Execution, method and what else: dense arrays first.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "RigL, masked": {"method": "rigl"},
    "GSE, masked": {"method": "gse"},
    "RigL, streamed, sparse": {
        "method": "rigl",
        "growth_memory": "streamed",
        "execution": "sparse",
    },
    "SET, sparse": {"method": "set", "execution": "sparse"},
    "GSE, sparse": {"method": "gse", "execution": "sparse"},
}
SMALLEST = 64
HIDDEN = {"smoke": (64, 256), "short": (64, 1024, 4096), "paper": (64, 1024, 4096, 16384)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which networks, and on which kinds of connections."""
    parser.set_defaults(seeds=[0])  # memory hardly depends on it
    parser.add_argument("--hidden", type=int, nargs="+", help="units of each hidden layer")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT"
    )


def sizes(options: argparse.Namespace) -> list[int]:
    """Hidden units, the smallest network always first."""
    return sorted({SMALLEST, *(options.hidden or HIDDEN[options.scale])})


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Sizes x variants: one epoch of the digits, 44 steps, with four rewires."""
    for units in sizes(options):
        for variant in options.variants:
            fields = {
                "hidden": (units, units),
                "epochs": 1,
                "rewire_every": 10,
                "rewire_end_epoch": 1.0,
                "checkpoint_every": 1000,
            }
            if variant != "dense":
                fields["sparsity"] = 0.98
            yield run_of("paper", ("digits", "mlp"), **fields, **VARIANTS[variant])


def cell(result: Finished) -> tuple[str, int]:
    """(variant, hidden units)."""
    config = result.config
    of_log = (config["method"], config["execution"], config["growth_memory"])
    for name, fields in VARIANTS.items():
        usual = {"execution": "masked", "growth_memory": "dense", **fields}
        if of_log == (usual["method"], usual["execution"], usual["growth_memory"]):
            return name, config["hidden"][0]
    raise ValueError(f"{result.run.folder} is no variant of this experiment.")


def table(options: argparse.Namespace, results: list[Finished]) -> str:
    """A row a network, a column a variant: MiB above the smallest one's process."""
    cells = grouped(results, cell)
    peak = lambda at: interval(r.end["peak_rss_mib"] for r in cells[at])[0]  # noqa: E731
    rows = []
    for units in sizes(options)[1:]:
        some = next((cells[v, units][0] for v in options.variants if (v, units) in cells), None)
        row = [f"{units}-{units}", f"{some.possible:,}" if some else "–"]
        for variant in options.variants:
            both = (variant, units) in cells and (variant, SMALLEST) in cells
            above = peak((variant, units)) - peak((variant, SMALLEST)) if both else None
            words = cells[variant, units][0].end["cost"]["peak_words_per_weight"] if both else 0
            row.append(f"{max(above, 0):,.0f} ({words:.2g})" if above is not None else "–")
        rows.append(row)
    head = ["hidden layers", "|W|", *options.variants]
    return (
        "Peak resident memory of the process in MiB above that of a 64-64 network, digits, 98 % "
        "sparsity; in brackets the words of 4 bytes per possible weight that the method needs, "
        f"as counted.\n\n{markdown(head, rows)}"
    )


def figure(options: argparse.Namespace, results: list[Finished]) -> Any:
    """The whole process against |W|."""
    cells = grouped(results, cell)
    drawn, (one,) = panels(1, width=6, height=4.4)
    for variant in options.variants:
        at = [units for units in sizes(options) if (variant, units) in cells]
        x = [cells[variant, units][0].possible for units in at]
        y = [interval(r.end["peak_rss_mib"] for r in cells[variant, units])[0] for units in at]
        style = "-" if "sparse" in variant else "--"
        one.plot(x, y, style, marker="o", ms=4, label=variant)
    one.set(xscale="log", yscale="log", xlabel="possible connections |W|")
    one.set(ylabel="peak memory of the process, MiB", title="Training at 98 % sparsity")
    one.legend(frameon=False, fontsize=8)
    return drawn


EXPERIMENT = sweep.Experiment("memory", __doc__, arguments, runs, table, figure)

if __name__ == "__main__":
    sys.exit(sweep.main(EXPERIMENT))
