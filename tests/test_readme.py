"""The README's example is run to the letter."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "experiments/results/README.md").read_text()


def test_fifteen_lines_train_an_unknown_model(monkeypatch):
    """At most fifteen lines below the model; it learns and is as sparse as they say."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    _, below = re.split(r"class Transformer\(nn\.Module\):\n(?:    .*\n)+", example)
    assert len([line for line in below.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(example, "README example", "exec"), names)
    state, net = names["state"], names["net"]
    active = sum(int(mask.sum()) for mask in state.masks.values())
    assert active == net.possible - round(0.95 * net.possible)
    attention = {f"MultiHeadDotProductAttention_0/{n}" for n in ("key", "out", "query", "value")}
    assert net.layers.keys() == attention | {f"Dense_{n}" for n in range(4)} and not net.dense
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


TABLES = readme.MARKED.findall(README + RESULTS)


def test_every_table_is_marked_once():
    """No marker is misspelt or doubled, so that no table can go unchecked."""
    commands = [command for command, _ in TABLES]
    assert len(set(commands)) == len(commands) == (README + RESULTS).count("<!-- python")
    modules = {command.split()[2].removeprefix("experiments.") for command in commands}
    assert modules >= {"benchmarks.table", "full_length", "methods", "provenance", "summary"}


@pytest.mark.parametrize(("command", "table"), TABLES)
def test_the_tables_are_those_of_the_committed_logs(command, table, monkeypatch):
    """What the command over each table prints."""
    monkeypatch.chdir(ROOT)
    assert readme.printed(command) + "\n" == table
