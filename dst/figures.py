"""Matplotlib without pyplot: figures that belong to nobody, and their PNG bytes."""

from __future__ import annotations

import io
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
