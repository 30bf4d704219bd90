"""How each committed run was made, as a Markdown table, for experiments/results/README.md.

python -m experiments.provenance
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dst.config import load
from dst.training.log import headers, read
from experiments.paper import setting_of
from experiments.runs import ROOT, differing, flag, logged
from experiments.scales import BASES
from experiments.summary import RESULTS
from experiments.tables import markdown

MLP = "configs/cifar100_mlp.py"


def command(config: ConfigDict) -> str:
    """`python -m dst.main` with what the config has beyond its file, seed and folders left out."""
    base = BASES.get(setting_of(config.dataset, config.model), MLP)
    fields = {"method": config.method, **differing(config, load(str(ROOT / base)))}
    return shlex.join([f"--config={base}", *(flag(f, config[f]) for f in fields)])


def machine(header: Mapping[str, Any]) -> str:
    """Its kind, as the log's first line has it."""
    devices = header["devices"]
    if devices["platform"] == "cpu":
        return f"CPU, {devices['cpu_cores']} cores"
    return f"{devices['count']} x {devices['kind']}"


def logs() -> Iterator[Path]:
    """Every log of a run, those of experiments first."""
    yield from sorted(RESULTS.glob("runs/*/metrics.jsonl"))
    yield from sorted(path for path in RESULTS.glob("*/*.jsonl") if path.parent.name != "runs")


def table() -> str:
    """A row a command: where its logs are, seeds, kind of machine, revisions."""
    rows: dict[tuple[str, str], dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for path in logs():
        header, events = read(path)
        config = logged(header)
        where = path.parent.name.removesuffix(f"-seed{config.seed}")
        made = f"; {header['made']}" if "made" in header else ""  # by more than one command
        row = rows[where, f"`{command(config)}`{made}"]
        row["seeds"].add(config.seed)
        for part in headers(header, events):
            row["machines"].add(machine(part))
            row["revisions"].add((part["git_revision"] or "?")[:7])
    return markdown(
        ["folder", "`python -m dst.main ...`", "seeds", "machine", "revision"],
        (
            [
                f"`{where}`",
                line,
                ", ".join(map(str, sorted(row["seeds"]))),
                ", ".join(sorted(row["machines"])),
                ", ".join(sorted(row["revisions"])),
            ]
            for (where, line), row in rows.items()
        ),
    )


if __name__ == "__main__":
    print(table())
