"""The README's table of what sparse execution saves, from the committed logs of `mlp` and `huge`.

python -m experiments.benchmarks.table
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import table

RESULTS = Path(__file__).parents[1] / "results"
HEAD = (
    "network and its sparsity",
    "connections",
    "masked: a step",
    "peak",
    "truly sparse: a step",
    "peak",
    "faster",
    "smaller",
)


def lines(name: str) -> Iterator[dict[str, Any]]:
    """The cells of a benchmark's log, without its headers."""
    for text in (RESULTS / name).read_text().splitlines():
        line = json.loads(text)
        if "hidden" in line:
            yield line


def size(number: float) -> str:
    """Bytes in words."""
    for unit, power in (("TB", 1e12), ("GB", 1e9)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number / 1e6:.3g} MB"


def seconds(number: float) -> str:
    """Seconds in words."""
    return f"{number:.2g} s" if number >= 1 else f"{number * 1e3:.0f} ms"


def fits() -> Iterator[list[str]]:
    """Rows of the networks that masked execution can hold, with both measured."""
    cells = {(c["hidden"], c["variant"], c["what"]): c for c in lines("mlp.jsonl")}
    for hidden in sorted({hidden for hidden, *_ in cells}):
        masked, sparse = (cells[hidden, v, "step"] for v in ("masked", "kernels"))
        times, peaks = (
            [c["median_seconds"] for c in (masked, sparse)],
            [c["peak_bytes"]["rss"] for c in (masked, sparse)],
        )
        yield [
            f"{masked['inputs']}-{hidden}-{hidden}-10, {100 * masked['sparsity']:.6g} %",
            f"{masked['connections'] / 1e6:.2f} M",
            *(text for t, p in zip(times, peaks, strict=True) for text in (seconds(t), size(p))),
            f"{times[0] / times[1]:.0f} ×",
            f"{peaks[0] / peaks[1]:.0f} ×",
        ]


def does_not_fit() -> Iterator[list[str]]:
    """Rows of networks of which masked execution could not even hold weights and moments."""
    for cell in {c["hidden"]: c for c in lines("huge.jsonl")}.values():
        peak = cell["step_bytes"]["rss"]
        network = f"{cell['inputs']}-{cell['hidden']}-{cell['hidden']}-10"
        yield [
            f"{network}, {100 * cell['sparsity']:.6g} %",
            f"{cell['connections'] / 1e6:.3g} M",
            "–",
            f"{size(cell['dense_bytes'])} of state alone",
            seconds(cell["step"]["median_seconds"]),
            size(peak),
            "–",
            f"{cell['dense_bytes'] / peak:.0f} ×",
        ]


if __name__ == "__main__":
    print(table(HEAD, [*fits(), *does_not_fit()]))
