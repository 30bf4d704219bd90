"""Every method with its source, what it needs and what we chose, as Markdown tables.

python -m experiments.methods            (all, for the results' README)
python -m experiments.methods needs      (what holds how much, for the front door)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import dst
from dst.errors import ConfigError
from dst.methods import METHODS, Row
from dst.methods.combinations import check_execution
from dst.training import cost
from experiments.cost import network_of
from experiments.tables import markdown

HEADER = ["method", "source", "peak", "truly sparse", "extra passes", "chosen where sources differ"]
STREAMED = "`rigl` with `growth_memory=streamed`"
HOLDS = {  # below how many words of 4 bytes a possible weight
    1: "the connections",
    3: "a dense gradient",
    9: "dense weights",
}


class Line(NamedTuple):
    """A method, or a variant of it, beside its row."""

    name: str
    row: Row
    words: float  # peak of 4 bytes per possible weight, of VGG-16 on CIFAR-100 at 98 %
    sparse: bool  # whether truly sparse execution runs it


def lines() -> Iterator[Line]:
    """Every row of `METHODS`, and RigL without its dense gradient."""
    net = network_of("cifar100", "vgg", 56, 1.0, (1024, 1024))

    def line(name: str, row: Row, called: str, **options: str) -> Line:
        method = dst.method(name, **options)
        return Line(called, row, cost.peak_words(method, net), runs_sparse(method))

    for name, row in METHODS.items():
        yield line(name, row, f"`{name}`")
        if name == "rigl":
            streamed = Row(row.label, "", row.fields, "the same, a block at a time")
            yield line(name, streamed, STREAMED, growth_memory="streamed")


def table() -> str:
    """A line a method."""
    return markdown(HEADER, [described(one) for one in lines()])


def described(line: Line) -> list[str]:
    """The columns of `HEADER`."""
    sparse = "yes" if line.sparse else ""
    return [
        line.name,
        line.row.source,
        f"{line.words:.3g}",
        sparse,
        line.row.passes,
        line.row.choice,
    ]


def needs() -> str:
    """A line for what is held at most, in either execution."""
    found: dict[tuple[int, bool], list[Line]] = {}
    for one in lines():
        bound = next(bound for bound in HOLDS if one.words < bound)
        found.setdefault((bound, one.sparse), []).append(one)
    rows = []
    for (bound, sparse), group in sorted(
        found.items(), key=lambda item: (item[0][0], not item[0][1])
    ):
        words = sorted(one.words for one in group)
        span = " to ".join(dict.fromkeys(f"{value:.2g}" for value in (words[0], words[-1])))
        names = ", ".join(one.name for one in group)
        rows.append([HOLDS[bound], span, "yes" if sparse else "no", names])
    return markdown(["holds", "peak", "truly sparse", "methods"], rows)


def runs_sparse(method: dst.Method) -> bool:
    """Whether sparse execution can run it."""
    try:
        check_execution(method, "sparse")
    except ConfigError:
        return False
    return True


if __name__ == "__main__":
    print(needs() if sys.argv[1:] == ["needs"] else table())
