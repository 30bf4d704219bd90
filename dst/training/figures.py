"""Figures: a run's `curves.png`; Matplotlib without pyplot, for experiments too."""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dst.training.log import read, replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f5fa8", "#d9772b")


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    with tempfile.TemporaryDirectory() as cache:
        # Matplotlib would write its font cache into the home directory.
        ours = os.environ.setdefault("MPLCONFIGDIR", cache) == cache
        from matplotlib.figure import Figure

        if ours:
            del os.environ["MPLCONFIGDIR"]
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def plot(workdir: str | os.PathLike) -> Path:
    """`<workdir>/curves.png` from its `metrics.jsonl`: loss, accuracy, sparsity of each layer."""
    head, events = read(Path(workdir) / "metrics.jsonl")
    config = head["config"]
    drawn = figure(12, 8.5)
    title = [config.get(k) for k in ("dataset", "model", "method", "heuristic")]
    if config.get("method") != "gse":
        title.pop()
    drawn.suptitle(" · ".join(str(part) for part in title if part is not None))
    grid = drawn.add_gridspec(2, 2, height_ratios=(1, 0.9))
    _curves(drawn.add_subplot(grid[0, 0]), events, ("loss", "test_loss"), "loss")
    _curves(drawn.add_subplot(grid[0, 1]), events, ("accuracy", "test_accuracy"), "accuracy")
    _layers(drawn.add_subplot(grid[1, :]), events)
    path = Path(workdir) / "curves.png"
    replace(path, png(drawn))
    return path


def _curves(axes: Any, events: list[dict], names: tuple[str, str], title: str) -> None:
    for name, label, color in zip(names, ("training", "test"), _COLORS, strict=True):
        points = [(e["epoch"], e[name]) for e in events if e.get(name) is not None]
        if points:
            marker = "." if len(points) <= 60 else None
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    if title == "loss":
        axes.set_yscale("log")
    elif axes.lines:
        last = axes.lines[-1]
        text = f"{last.get_label()}: {100 * last.get_ydata()[-1]:.2f} % at the end"
        axes.set_title(text, loc="right", fontsize=9)
    axes.set(xlabel="epoch")
    axes.set_title(title, loc="left", weight="bold")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)


def _layers(axes: Any, events: list[dict]) -> None:
    # At 98 % bars of the sparsity would all look alike.
    title = "each layer at the end: active connections (bars), sparsity (numbers)"
    axes.set_title(title, loc="left", weight="bold")
    axes.set(ylabel="active connections, %")
    axes.spines[["top", "right"]].set_visible(False)
    end = next((e for e in reversed(events) if "active" in e and "possible" in e), None)
    if end is None:
        return
    layers = sorted(end["possible"], key=numbers_by_value)  # Conv_2 before Conv_10
    share = np.array([100 * end["active"][layer] / end["possible"][layer] for layer in layers])
    total = 100 * sum(end["active"].values()) / sum(end["possible"].values())
    bars = axes.bar(range(len(layers)), share, color=_COLORS[0])
    axes.axhline(total, color="0.35", linewidth=1, linestyle="--")
    axes.set_title(f"{100 - total:.2f} % in all (dashed)", loc="right", fontsize=9)
    many = len(layers) > 16
    text: dict[str, Any] = {"rotation": 90, "fontsize": 7} if many else {"fontsize": 9}
    axes.bar_label(bars, [f"{100 - s:.1f} %" for s in share], padding=2, **text)
    axes.set_xticks(range(len(layers)), layers, **text)
    axes.margins(x=0.01, y=0.2 if many else 0.1)


def numbers_by_value(name: str) -> list:
    """A key to sort by that has Conv_2 before Conv_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
