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

from experiments import full_length, methods, provenance, sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "experiments/results/README.md").read_text()


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


def test_the_memory_claim_runs(capsys):
    """As it is written, on a layer 256 times narrower."""
    (claim,) = [
        code for code in re.findall(r"```py\n(.*?)```", README, re.DOTALL) if "rusage" in code
    ]
    exec(compile(claim.replace("65536", "256").replace("0.999", "0.9"), "README claim", "exec"), {})
    assert re.fullmatch(r"[\d.]+ GiB; dense .*: 0 GiB\n", capsys.readouterr().out)


@pytest.mark.parametrize("file", ["README.md", "experiments/results/README.md"])
def test_the_files_it_names_exist(file):
    """Links and configurations."""
    text = (ROOT / file).read_text()
    for link, config in re.findall(r"\]\(([\w/.-]+)\)|(configs/\w+\.py)", text):
        assert ((ROOT / file).parent / link if link else ROOT / config).exists(), (link, config)


def test_the_results_are_those_of_the_committed_logs():
    """The table of runs is what `experiments/summary.py` prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "summary.py"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    table = re.search(r"<!-- python experiments/summary.py -->\n(.*?)\n<!--", RESULTS, re.DOTALL)
    assert table and table[1] == done.stdout.strip()


MARKED = r"<!-- python -m experiments.(\w+) ([^\n]*?) -->\n(.*?)\n<!--"
EXPERIMENTS = re.findall(MARKED, README + RESULTS, re.DOTALL)


@pytest.mark.parametrize(("name", "arguments", "table"), EXPERIMENTS)
def test_the_tables_are_those_of_the_committed_logs(name, arguments, table, monkeypatch):
    """What the command over each table prints."""
    monkeypatch.chdir(ROOT)
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    options, results = sweep.results(experiment, shlex.split(arguments))
    assert results and experiment.table(options, results) == table


@pytest.mark.parametrize("module", [methods, full_length, provenance])
def test_the_tables_are_those_that_their_modules_print(module):
    """Every method; every run of the paper's length; every committed log, and how it was made."""
    marker = rf"<!-- python -m {module.__name__} -->\n(.*?)\n<!--"
    table = re.search(marker, README + RESULTS, re.DOTALL)
    assert table and table[1] == module.table()


def test_the_savings_are_those_of_the_committed_benchmarks():
    """The first screen's table is what `experiments/benchmarks/table.py` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.table"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    marker = r"<!-- python -m experiments.benchmarks.table -->\n(.*?)\n<!--"
    table = re.search(marker, README, re.DOTALL)
    assert table and table[1] == done.stdout.strip()
