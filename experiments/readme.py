"""The tables of README.md and experiments/results/README.md, each below the command that prints it.

python -m experiments.readme      (writes them anew from the committed logs, and the figure)
"""

from __future__ import annotations

import importlib
import re
import shlex

from dst.training import figures
from experiments import full_length, sweep
from experiments.runs import ROOT
from experiments.summary import RESULTS

PAGES = (ROOT / "README.md", RESULTS / "README.md")
MARKED = re.compile(r"<!-- (python -m experiments\.[^\n]*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def printed(command: str) -> str:
    """What `python -m MODULE [TABLE | ARGUMENTS]` prints, without a process of its own."""
    _, _, name, *arguments = shlex.split(command)
    module = importlib.import_module(name)
    if not hasattr(module, "EXPERIMENT"):
        return getattr(module, *arguments or ["table"])()
    options, found = sweep.results(module.EXPERIMENT, arguments)
    return module.EXPERIMENT.table(options, found)


def renewed(page: str) -> str:
    """A page with every marked table as its command prints it now."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{printed(found[1])}\n<!-- end -->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(renewed(path.read_text()))
    (RESULTS / "full_length.png").write_bytes(figures.png(full_length.figure()))
