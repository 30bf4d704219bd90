"""Every method with its source, memory and our choices, as a Markdown table, for the README.

python -m experiments.methods
"""

from __future__ import annotations

import dst
from dst.methods import METHODS, Row
from dst.training import cost
from experiments.cost import network_of
from experiments.tables import markdown

HEADER = ["method", "source", "peak", "extra passes", "our choice where sources differ"]


def table() -> str:
    """Peak words per possible weight are those of VGG-16 on CIFAR-100 at 98 %."""
    net, lines = network_of("cifar100", "vgg", 56, 1.0, (1024, 1024)), []

    def line(name: str, row: Row, called: str, **options: str) -> list[str]:
        words = cost.peak_words(dst.method(name, **options), net)
        return [called, row.source, f"{words:.3g}", row.passes, row.choice]

    for name, row in METHODS.items():
        lines.append(line(name, row, f"`{name}`"))
        if name == "rigl":
            streamed = Row(row.label, "", row.fields, "the same, a block at a time", STREAMED)
            called = "`rigl`, `growth_memory=streamed`"
            lines.append(line(name, streamed, called, growth_memory="streamed"))
    return markdown(HEADER, lines)


STREAMED = "the same connections without the dense gradient"

if __name__ == "__main__":
    print(table())
