"""The committed runs as a Markdown table, for the README.

python -m experiments.summary [FOLDER ...]      (default: all of experiments/results)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dst.training.log import read

RESULTS = Path(__file__).parent / "results"
HEADER = """\
| data set | network | execution | method | sparsity | epochs | seed | test accuracy | log |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def row(log: Path) -> str:
    """One run: its configuration and its last accuracy."""
    header, events = read(log)
    config = header["config"]
    end = next(e for e in reversed(events) if "test_accuracy" in e)
    method = config["method"] + (f" ({config['heuristic']})" if config["method"] == "gse" else "")
    size = {"resnet": f"-{config['depth']}", "mlp": f" {'-'.join(map(str, config['hidden']))}"}
    network = config["model"] + size.get(config["model"], "")
    execution = config.get("execution", "masked")  # the first logs know no other
    return (
        f"| {config['dataset']} | {network} | {execution} | {method} | {end['sparsity']:.2%} "
        f"| {end['epoch']} | {config['seed']} | {end['test_accuracy']:.2%} "
        f"| `{log.relative_to(RESULTS)}` |"
    )


def table(folders: Sequence[Path] = ()) -> str:
    """The runs of these folders, of all if none is named, in the order of their names."""
    folders = folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    logs = [log for folder in folders for log in sorted(folder.glob("*.jsonl"))]
    return "\n".join([HEADER, *(row(log) for log in logs)])


if __name__ == "__main__":
    print(table([Path(folder).resolve() for folder in sys.argv[1:]]))
