"""The README's table of what sparse execution saves, from the logs of `convnets`, `mlp`, `huge`.

python -m experiments.benchmarks.table
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks import measure
from experiments.benchmarks.convnet_steps import NAMES

RESULTS = Path(__file__).parents[1] / "results"
HEAD = (
    "network and its sparsity",
    "connections",
    "dense step: Flax, PyTorch",
    "masked: a step",
    "peak",
    "truly sparse: a step",
    "peak",
    "faster",
    "smaller",
)


def lines(name: str) -> Iterator[dict[str, Any]]:
    """The cells of a benchmark's log, without its headers."""
    for text in (RESULTS / name).read_text().splitlines():
        line = json.loads(text)
        if "benchmark" not in line:
            yield line


def size(number: float) -> str:
    """Bytes in words."""
    for unit, power in (("TB", 1e12), ("GB", 1e9)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number / 1e6:.3g} MB"


def seconds(number: float) -> str:
    """Seconds in words."""
    return f"{number:.2g} s" if number >= 1 else f"{number * 1e3:.0f} ms"


def pair(
    network: str, connections: int, times: list[float], peaks: list[float], dense: str = "–"
) -> list[str]:
    """A row with both executions measured, masked first."""
    return [
        network,
        f"{connections / 1e6:.2g} M",
        dense,
        *(text for t, p in zip(times, peaks, strict=True) for text in (seconds(t), size(p))),
        f"{times[0] / times[1]:.1f} ×",
        f"{peaks[0] / peaks[1]:.1f} ×",
    ]


def convolutional(log: str) -> Iterator[list[str]]:
    """Rows of a log of `convnets`: times with the malloc of `dst.main`, peaks of GraBo."""
    cells = [c for c in lines(log) if c["model"] != "mlp"]
    timed = {
        (c["model"], c["variant"], c["sparsity"]): c
        for c in cells
        if c["what"] == "step" and c["malloc"] == "kept" and "median_seconds" in c
    }
    held: dict[tuple[str, str, float], int] = {}
    for c in cells:
        if c["malloc"] == "at once" and c.get("method", "GSE-GraBo") == "GSE-GraBo":
            key = c["model"], c["variant"], c["sparsity"]
            held[key] = max(held.get(key, 0), c["peak_bytes"]["rss"])
    for model, sparsity in [(m, s) for m, variant, s in timed if variant == "masked"]:
        keys = [(model, variant, sparsity) for variant in ("masked", "sparse")]
        dense = [timed.get((model, v, 0.0)) for v in ("plain", "torch, channels last")]
        yield pair(
            f"{NAMES[model]}, {100 * sparsity:.6g} %",
            timed[keys[1]]["layer_parameters"],
            [timed[key]["median_seconds"] for key in keys],
            [held[key] for key in keys],
            ", ".join(seconds(c["median_seconds"]) for c in dense if c) or "–",
        )


def fits() -> Iterator[list[str]]:
    """Rows of the MLPs that masked execution can hold."""
    cells = {(c["hidden"], c["variant"], c["what"]): c for c in lines("mlp.jsonl")}
    for hidden in sorted({hidden for hidden, *_ in cells}):
        masked, sparse = (cells[hidden, v, "step"] for v in ("masked", "kernels"))
        rewire = cells[hidden, "kernels", "rewire"]["peak_bytes"]["rss"]  # masked: not measured
        yield pair(
            f"{masked['inputs']}-{hidden}-{hidden}-10, {100 * masked['sparsity']:.6g} %",
            masked["connections"],
            [c["median_seconds"] for c in (masked, sparse)],
            [masked["peak_bytes"]["rss"], max(sparse["peak_bytes"]["rss"], rewire)],
        )


def does_not_fit() -> Iterator[list[str]]:
    """Rows of networks of which masked execution could not even hold weights and moments."""
    for cell in {c["hidden"]: c for c in lines("huge.jsonl")}.values():
        peak = max(cell[what]["rss"] for what in ("step_bytes", "rewire_bytes"))
        network = f"{cell['inputs']}-{cell['hidden']}-{cell['hidden']}-10"
        yield [
            f"{network}, {100 * cell['sparsity']:.6g} %",
            f"{cell['connections'] / 1e6:.3g} M",
            "–",
            "–",
            f"{size(cell['dense_bytes'])} of state alone",
            seconds(cell["step"]["median_seconds"]),
            size(peak),
            "–",
            f"{cell['dense_bytes'] / peak:.0f} ×",
        ]


def table() -> str:
    """A row a network; a peak is that of a step or a rewire, whichever is larger."""
    return measure.table(HEAD, [*convolutional("convnets.jsonl"), *fits(), *does_not_fit()])


def kinds() -> str:
    """Convolutions of groups, on each channel alone and over volumes."""
    return measure.table(HEAD, [*convolutional("kinds.jsonl")])


GPU_HEAD = ("VGG-16 on", "steps a second: float32", "bfloat16", "peak: float32", "bfloat16")
GPU_NAMES = {
    "masked": "`dst`, masked",
    "sparse": "`dst`, truly sparse (pure JAX)",
    "plain": "dense Flax",
    "torch": "dense PyTorch",
    "torch, compiled": "dense PyTorch, compiled",
}


def gpu() -> str:
    """Ways to take a step of VGG-16 on a GPU; more than one round is shown as from - to."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines("gpu.jsonl"):
        found.setdefault((line["variant"], line["precision"]), []).append(line)
    rows = []
    for variant, name in GPU_NAMES.items():
        cells = [found.get((variant, p), []) for p in ("float32", "bfloat16")]
        speeds = [sorted({round(c["steps_a_second"]) for c in cell}) for cell in cells]
        texts = [" to ".join(map(str, (s[0], s[-1])[: len(s)])) if s else "–" for s in speeds]
        rows.append([name, *texts, *(size(c[0]["peak_bytes"]) if c else "–" for c in cells)])
    return measure.table(GPU_HEAD, rows)


if __name__ == "__main__":
    print(table())
