"""Every method with its source and what it needs, as a Markdown table, for the README.

python -m experiments.methods
"""

from __future__ import annotations

import dst
from dst.errors import ConfigError
from dst.methods import METHODS, Row
from dst.methods.combinations import check_execution
from dst.training import cost
from experiments.cost import network_of
from experiments.tables import markdown

HEADER = ["method", "source", "peak", "truly sparse", "extra passes"]


def table() -> str:
    """Peak words per possible weight are those of VGG-16 on CIFAR-100 at 98 %."""
    net, lines = network_of("cifar100", "vgg", 56, 1.0, (1024, 1024)), []

    def line(name: str, row: Row, called: str, **options: str) -> list[str]:
        method = dst.method(name, **options)
        words = cost.peak_words(method, net)
        return [called, row.source, f"{words:.3g}", runs_sparse(method), row.passes]

    for name, row in METHODS.items():
        lines.append(line(name, row, f"`{name}`"))
        if name == "rigl":
            streamed = Row(row.label, "", row.fields, "the same, a block at a time")
            called = "`rigl`, `growth_memory=streamed`"
            lines.append(line(name, streamed, called, growth_memory="streamed"))
    return markdown(HEADER, lines)


def runs_sparse(method: dst.Method) -> str:
    """Whether sparse execution can run it."""
    try:
        check_execution(method, "sparse")
    except ConfigError:
        return ""
    return "yes"


if __name__ == "__main__":
    print(table())
