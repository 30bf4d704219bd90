"""The README's example is run to the letter."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import methods, provenance, sweep

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_fifteen_lines_train_an_unknown_model(monkeypatch):
    """At most fifteen lines of code; the model learns and is as sparse as they say."""
    model, example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(model, "README model", "exec"), names)
    exec(compile(example, "README example", "exec"), names)
    state, net = names["state"], names["net"]
    active = sum(int(mask.sum()) for mask in state.masks.values())
    assert active == net.possible - round(0.95 * net.possible)
    assert list(net.layers) == ["Conv_0", "Dense_0", "Dense_1"]
    logits = net.model.apply({"params": jax.device_get(state.params)}, names["x"])
    assert np.mean(np.argmax(logits, -1) == names["y"]) > 0.9


def test_the_files_it_names_exist():
    """Links and configurations."""
    root = Path(__file__).parents[1]
    for name in re.findall(r"\]\(([\w/.]+)\)|(configs/\w+\.py)", README):
        assert (root / (name[0] or name[1])).exists(), name


def test_the_results_are_those_of_the_committed_logs():
    """The README's table is what `experiments/summary.py` prints."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, root / "experiments" / "summary.py"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    table = re.search(r"<!-- python experiments/summary.py -->\n(.*?)\n<!--", README, re.DOTALL)
    assert table and table[1] == done.stdout.strip()


MARKED = r"<!-- python -m experiments.(\w+) ([^\n]*?) -->\n(.*?)\n<!--"
EXPERIMENTS = re.findall(MARKED, README, re.DOTALL)


@pytest.mark.parametrize(("name", "arguments", "table"), EXPERIMENTS)
def test_the_tables_are_those_of_the_committed_logs(name, arguments, table, monkeypatch):
    """What the command over each table prints."""
    monkeypatch.chdir(Path(__file__).parents[1])
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    options, results = sweep.results(experiment, shlex.split(arguments))
    assert results and experiment.table(options, results) == table


def test_the_methods_are_those_of_the_registry():
    """The table of methods is what `experiments/methods.py` prints."""
    table = re.search(r"<!-- python -m experiments.methods -->\n(.*?)\n<!--", README, re.DOTALL)
    assert table and table[1] == methods.table()


def test_it_is_told_how_each_run_was_made():
    """Every committed log, its command, seeds, machine and revision."""
    text = (Path(__file__).parents[1] / "experiments/results/README.md").read_text()
    table = re.search(r"<!-- python -m experiments.provenance -->\n(.*?)\n<!--", text, re.DOTALL)
    assert table and table[1] == provenance.table()


def test_the_savings_are_those_of_the_committed_benchmarks():
    """The first screen's table is what `experiments/benchmarks/table.py` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.table"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    marker = r"<!-- python -m experiments.benchmarks.table -->\n(.*?)\n<!--"
    table = re.search(marker, README, re.DOTALL)
    assert table and table[1] == done.stdout.strip()
