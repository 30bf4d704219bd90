"""Public Linen models, unmodified: how much of each can be sparse, and what is refused, as a table.

python -m experiments.public_models      (of experiments/results/public_models.jsonl)

Each line of the log is a model in its published size: its weights of two axes or more, the share of
them that `dst.network` found sparse before attention, other dimensions and groups were (revision
25e5bbb) and since, and what a small configuration made of two steps and a rewire between them, with
GSE at 90 %, in each execution. Their code is not part of this repository: `source` names it.
"""

from __future__ import annotations

import json

from experiments.summary import RESULTS
from experiments.tables import markdown

HEADER = ["model", "source", "weights", "before", "now", "masked", "sparse", "stays dense"]


def table() -> str:
    """A line a model."""
    text = (RESULTS / "public_models.jsonl").read_text()
    return markdown(HEADER, [row(json.loads(line)) for line in text.splitlines()])


def row(model: dict) -> list[str]:
    """The columns of `HEADER`."""
    dense = sorted(model["dense"].items(), key=lambda item: -item[1])
    return [
        model["model"],
        model["source"],
        millions(model["weights"]),
        *(share(model[when]) for when in ("before", "after")),
        *(said(model[execution]) for execution in ("masked", "sparse")),
        "; ".join(f"{in_short(why)}: {millions(count)}" for why, count in dense[:2]),
    ]


def millions(count: int) -> str:
    """As '0.82 M' or '2,682 M'."""
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"


def in_short(why: str) -> str:
    """A reason of `Network.dense`."""
    return "of another kind" if why.startswith("not the kernel of") else why


def share(found: float | str) -> str:
    """In %, or that the model was refused, or what else happened."""
    if isinstance(found, float):
        return f"{found:.1%}"
    return "refused" if found.startswith("ConfigError") else found.partition(":")[0]


def said(outcome: str) -> str:
    """'ok', 'refused', or how an error is called."""
    if outcome.startswith("loss"):
        return "loss is NaN" if "nan" in outcome else outcome
    return outcome if outcome == "ok" else share(outcome)


if __name__ == "__main__":
    print(table())
