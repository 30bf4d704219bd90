"""Runs of one schedule as a Markdown table, a row a method and sparsity, mean and range over seeds.

python -m experiments.compare experiments/results/cifar100_vgg16_methods
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from dst.log import read

HEADER = """\
| method | sparsity | n | test accuracy, mean | range over seeds | loss at the end |
| --- | --- | --- | --- | --- | --- |"""


def table(folder: Path) -> str:
    """The best mean first."""
    runs: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for log in sorted(folder.glob("*.jsonl")):
        header, events = read(log)
        end = events[-1]
        if end["event"] == "end":
            runs[header["config"]["method"], round(end["sparsity"], 4)].append(end)

    def row(key: tuple[str, float], ends: list[dict]) -> tuple[float, str]:
        accuracy = 100 * np.array([end["test_accuracy"] for end in ends])
        loss = np.mean([end["test_loss"] for end in ends])
        span = f"{accuracy.min():.2f} to {accuracy.max():.2f}" if len(ends) > 1 else "one seed"
        text = f"| {key[0]} | {key[1]:.0%} | {len(ends)} | {accuracy.mean():.2f} % | {span} "
        return -accuracy.mean(), text + f"| {loss:.3f} |"

    rows = sorted(row(key, ends) for key, ends in runs.items())
    return "\n".join([HEADER, *(text for _, text in rows)])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
