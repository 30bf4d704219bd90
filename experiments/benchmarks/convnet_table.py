"""The Markdown tables of a log of `convnets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.benchmarks import measure
from experiments.benchmarks.convnet_steps import DENSE, NAMES

Line = dict[str, Any]


def tables(lines: Iterable[Line]) -> str:
    """Times, first calls and memory of each network, and rewires by other methods."""
    cells = [line for line in lines if "model" in line and "unavailable" not in line]
    found = [table(cells) for table in (times, first, memory)]
    return "\n\n".join(found)


def label(line: Line) -> str:
    """The network and variant of a row."""
    share = "" if line["variant"] in DENSE else f", {100 * line['sparsity']:g} %"
    method = "" if line["method"] == "GSE-GraBo" else f", {line['method']}"
    return f"{NAMES[line['model']]}: {line['variant']}{share}{method}"


def rows(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Each row's label and lines, in the order of the log."""
    labels = [label(line) for line in lines]
    for row in dict.fromkeys(labels):
        yield row, [line for line, own in zip(lines, labels, strict=True) if own == row]


def number(value: float | None, scale: float = 1) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value * scale:#.3g}".rstrip(".")


def by(lines: list[Line], key: str, value: str) -> dict[tuple[str, str], Any]:
    """A value of a row's lines: {("step" or "rewire", what `key` is there): value}."""
    return {(line["what"], line[key]): line[value] for line in reversed(lines) if value in line}


def times(lines: list[Line]) -> str:
    """Milliseconds of steps and rewires under both mallocs."""
    body = []
    for row, own in rows([line for line in lines if "median_seconds" in line]):
        median, least = (by(own, "malloc", f"{which}_seconds") for which in ("median", "least"))
        step = [of.get(("step", m)) for m in ("default", "kept") for of in (median, least)]
        rewire = [median.get(("rewire", malloc)) for malloc in ("default", "kept")]
        body.append([row, *(number(seconds, 1e3) for seconds in step + rewire)])
    head = ("ms", "a step", "least", "kept memory: a step", "least")
    return measure.table((*head, "a rewire", "kept memory: a rewire"), body)


def first(lines: list[Line]) -> str:
    """Seconds before anything else can be done."""
    body = []
    for row, own in rows([line for line in lines if "first_seconds" in line]):
        found = by(own, "compiled", "first_seconds")
        keys = [(what, kind) for kind in ("cold", "cached") for what in ("step", "rewire")]
        body.append([row, *(number(found.get(key)) for key in keys)])
    head = ("s", "first step", "first rewire", "compiled before: first step", "first rewire")
    return measure.table(head, body)


def memory(lines: list[Line]) -> str:
    """MB: peaks, and the state of the weights between two steps."""
    body = []
    for row, own in rows(lines):
        state = next((n for line in own if (n := line.get("weight_state_bytes"))), None)
        peaks = by(own, "malloc", "peak_bytes")
        cells = [
            peaks.get((what, "at once"), {}).get(kind)
            for kind in ("rss", "xla")
            for what in ("step", "rewire")
        ]
        cells += [peaks.get(("step", "kept"), {}).get("rss"), state]
        body.append([row, *(number(cell, 1e-6) for cell in cells)])
    head = ("MB", "peak of a step", "of a rewire", "XLA plans: step", "rewire")
    return measure.table((*head, "kept memory: step", "weight state"), body)
