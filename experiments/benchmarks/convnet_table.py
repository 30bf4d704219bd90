"""The Markdown tables of a log of `convnets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.benchmarks import measure
from experiments.benchmarks.convnet_steps import NAMES

Line = dict[str, Any]


def tables(lines: Iterable[Line]) -> str:
    """Times, first calls and memory of each network, and rewires by other methods."""
    cells = [line for line in lines if "model" in line and "unavailable" not in line]
    found = [table(cells) for table in (times, first, memory)]
    return "\n\n".join(found)


def label(line: Line) -> str:
    """The network and variant of a row."""
    sparse = line["variant"] in ("sparse", "masked")
    share = f", {100 * line['sparsity']:g} %" if sparse else ""
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


def under(lines: list[Line], malloc: str, key: str) -> Line:
    """What the line of this malloc has by this name."""
    return next((line[key] for line in lines if line["malloc"] == malloc and key in line), {})


def times(lines: list[Line]) -> str:
    """Milliseconds of steps and rewires under both mallocs."""
    body = []
    for row, own in rows([line for line in lines if "step" in line]):
        cells = [row]
        for malloc in ("default", "tuned"):
            step = under(own, malloc, "step")
            cells += [number(step.get(f"{what}_seconds"), 1e3) for what in ("median", "least")]
        for malloc in ("default", "tuned"):
            cells.append(number(under(own, malloc, "rewire").get("median_seconds"), 1e3))
        body.append(cells)
    head = ("ms", "a step", "least", "tuned malloc: a step", "least")
    return measure.table((*head, "a rewire", "tuned malloc: a rewire"), body)


def first(lines: list[Line]) -> str:
    """Seconds before anything else can be done."""
    body = []
    for row, own in rows([line for line in lines if "first_seconds" in line]):
        found = {line["compiled"]: line["first_seconds"] for line in reversed(own)}
        kinds = [(compiled, what) for compiled in ("cold", "cached") for what in ("step", "rewire")]
        body.append([row, *(number(found.get(c, {}).get(what)) for c, what in kinds)])
    head = ("s", "first step", "first rewire", "compiled before: first step", "first rewire")
    return measure.table(head, body)


def memory(lines: list[Line]) -> str:
    """MB: peaks, and the state of the weights between two steps."""
    body = []
    for row, own in rows(lines):
        state = next((n for line in own if (n := line.get("weight_state_bytes"))), None)
        peaks = {(x["malloc"], x["what"]): x["peak_bytes"] for x in own if "peak_bytes" in x}
        get = lambda *key, peaks=peaks: peaks.get(key, {})  # noqa: E731
        cells = [get("at once", what).get("rss") for what in ("step", "rewire")]
        planned = [get("at once", what).get("xla") for what in ("step", "rewire")]
        cells += [*planned, get("tuned", "step").get("rss"), state]
        body.append([row, *(number(cell, 1e-6) for cell in cells)])
    head = ("MB", "peak of a step", "of a rewire", "XLA plans: step", "rewire")
    return measure.table((*head, "tuned malloc: step", "weight state"), body)
