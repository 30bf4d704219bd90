"""Every notebook runs: what is small is made here and now, what is large is read from logs."""

from __future__ import annotations

from pathlib import Path

import nbclient
import pytest
from nbformat import read
from nbformat.v4 import new_code_cell, new_notebook
from papermill.parameterize import parameterize_notebook

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted(path.name for path in EXPERIMENTS.glob("*.ipynb"))

# Sweeps train in the kernel, one seed: that a run has a process of its own and what several seeds
# add is tests/test_sweep.py's and tests/test_tables.py's.
HERE = """
import sys
path = list(sys.path)
sys.path.insert(0, "..")
from experiments import scales, sweep
sys.path[:] = path
scales.SCALES["smoke"] = scales.SCALES["smoke"]._replace(seeds=(0,))
def perform(run, out, tick):
    from dst.training import figures
    from dst.training.train import train
    figures.plot = lambda workdir: None
    train(run.config(), out / run.folder)
    return 0
sweep.perform = perform
"""


def code(notebook):
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def committed(name):
    return read(EXPERIMENTS / name, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Name -> code cells; run by one kernel, which forgets the names of each notebook, and with
    one folder for the small runs, so that none is made twice."""
    smoke = {"smoke": str(tmp_path_factory.mktemp("runs"))}
    cells, found = [new_code_cell(HERE)], {}
    for name in NOTEBOOKS:
        book = code(parameterize_notebook(committed(name), smoke))
        found[name] = [new_code_cell(cell.source) for cell in book]
        cells += [new_code_cell("%reset -f"), *found[name]]
    book = new_notebook(cells=cells)
    nbclient.execute(book, str(EXPERIMENTS), kernel_name="python3", allow_errors=True)
    assert not (failed := errors(cells[:1])), failed[0]
    return found


def outputs(cells):
    return [output for cell in cells for output in cell.outputs]


def errors(cells):
    """Tracebacks."""
    return ["\n".join(out.traceback) for out in outputs(cells) if out.output_type == "error"]


def kinds(cells):
    """What there is to see."""
    return {kind for output in outputs(cells) for kind in output.get("data", ())}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, executed):
    """From the first cell to the last, without an error, and with something to see."""
    cells = executed[name]
    assert len(cells) == len(code(committed(name))) + 1  # that of the parameters
    assert not (failed := errors(cells)), failed[0]
    assert all(cell.execution_count for cell in cells)
    assert {"image/png", "text/markdown"} <= kinds(cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_as_it_was_run(name):
    """Figures and tables can be read without running anything."""
    cells = code(committed(name))
    assert all(cell.execution_count for cell in cells)
    assert {"image/png", "text/markdown"} <= kinds(cells)
    assert not errors(cells)
