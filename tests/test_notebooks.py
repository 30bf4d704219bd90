"""Every notebook runs: what is small is made here and now, what is large is read from logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted(path.name for path in EXPERIMENTS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One folder for all notebooks, so that no run is made twice."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, smoke, tmp_path):
    """From the first cell to the last, without an error, and with something to see."""
    command = [sys.executable, "-m", "papermill", str(EXPERIMENTS / name), str(tmp_path / name)]
    command += ["-p", "smoke", str(smoke), "--kernel", "python3", "--no-progress-bar"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXPERIMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [
        output.get("data", {})
        for cell in json.loads((tmp_path / name).read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    assert any("image/png" in data for data in shown), "no figure"
    assert any("text/markdown" in data for data in shown), "no table"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_as_it_was_run(name):
    """Figures and tables can be read without running anything."""
    cells = json.loads((EXPERIMENTS / name).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    kinds = {kind for cell in code for out in cell["outputs"] for kind in out.get("data", ())}
    assert {"image/png", "text/markdown"} <= kinds
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
