"""The committed runs of the examples, as a table.

python -m experiments.examples.table      (of experiments/results/examples)
"""

from __future__ import annotations

from pathlib import Path

from dst.training import log
from experiments.summary import RESULTS
from experiments.tables import markdown

HEADER = ["run", "method", "data", "steps", "sparsity overall", "result"]
FOLDER = RESULTS / "examples"
TEXT = "Python's help"


def table() -> str:
    """A line a run, in the order of their names."""
    return markdown(HEADER, [row(path) for path in sorted(FOLDER.rglob("*.jsonl"))])


def row(path: Path) -> list[str]:
    """What was run, and what it had come to at the end."""
    header, events = log.read(path)
    config, end = header["config"], events[-1]
    if "held_out_bits" in end:
        result = f"{end['held_out_bits']:.3f} bits a byte, {config['weights'] / 1e6:.2f} M weights"
    else:
        result = f"{end['test_accuracy']:.2%}"
    return [
        f"`{path.relative_to(FOLDER).with_suffix('')}`",
        config.get("method", "dense" if config.get("run") == "dense" else "gse"),
        config.get("dataset", TEXT),
        str(end["step"]),
        f"{end['overall_sparsity']:.2%}",
        result,
    ]


if __name__ == "__main__":
    print(table())
