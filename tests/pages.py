"""The code on the page of a room, such as "A data set of your own" in `dst.data`'s docstring."""

from __future__ import annotations

import inspect
import re
from types import ModuleType


def code(room: ModuleType) -> str:
    """What the page indents, as the file that it says to write."""
    doc = inspect.getdoc(room)
    assert doc is not None
    found = re.search(r"(?:^    .*\n|^\n(?=(?:\n)*    ))+", doc, re.MULTILINE)
    assert found is not None
    return inspect.cleandoc("\n" + found[0]) + "\n"
