"""The log: strict JSON, cut back at a resume, readable TensorBoard files, a plot, a quiet bar."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dst.errors import ConfigError
from dst.training import figures, log

CONFIG = {
    "dataset": "digits",
    "model": "mlp",
    "method": "gse",
    "heuristic": "grabo",
    "sparsity": 0.9,
}
CONFIG["a"] = (1, 2)
HEADER = {"config": CONFIG, "versions": {}}
POSSIBLE = {"Dense_0": 100, "Dense_1": 400}
ACTIVE = {"Dense_0": 5, "Dense_1": 5}


def write_steps(workdir: Path, start: int, stop: int) -> None:
    """The events of steps start+1 to stop, as a run resumed at `start` writes them."""
    with log.open_log(workdir, HEADER, start) as out:
        for k in range(start + 1, stop + 1):
            out.write("train", k, epoch=k, loss=jnp.float32(2 / k), accuracy=np.float32(1 - 1 / k))
            if k % 2 == 0:
                out.write("eval", k, epoch=k, test_accuracy=0.9, test_loss=2.5 / k, sparsity=0.98)
                out.write("rewire", k, pruned=np.int64(3), active={"Dense_0": jnp.int32(5)})
        out.write("end", stop, epoch=stop, active=ACTIVE, possible=POSSIBLE, reason="epochs")


def strict(text: str) -> Any:
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_lines_are_strict_json_of_plain_values(tmp_path):
    with log.open_log(tmp_path, {"config": {"x": math.nan}}, 0) as out:
        out.write(
            "rewire", np.int32(7), loss=jnp.float32(jnp.nan), peak=-math.inf, flag=np.bool_(True),
            counts=np.arange(3), nested={"a": jnp.array([1.5, jnp.inf]), 2: (1, None)},
            name="é\u2028",
        )  # fmt: skip
        text = (tmp_path / "metrics.jsonl").read_text()  # flushed already
    header, event = map(strict, text.splitlines())
    assert header == {"config": {"x": None}}
    assert event == {
        "event": "rewire", "step": 7, "loss": None, "peak": None, "flag": True,
        "counts": [0, 1, 2], "nested": {"a": [1.5, None], "2": [1, None]}, "name": "é\u2028",
    }  # fmt: skip
    assert log.read(tmp_path / "metrics.jsonl") == (header, [event])


@pytest.mark.parametrize("killed_at", [0, 4, 5])
@pytest.mark.parametrize("torn", ["", '{"event": "tra', '{"event": "train", "step": 8}\n{"ev'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, killed_at, torn):
    write_steps(tmp_path / "straight", 0, 6)
    write_steps(tmp_path / "resumed", 0, 5)
    with open(tmp_path / "resumed/metrics.jsonl", "a") as file:
        file.write(torn)
    write_steps(tmp_path / "resumed", killed_at, 6)
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("straight", "resumed")]
    assert logs[0] == logs[1]
    events = log.read(tmp_path / "resumed/metrics.jsonl")[1]
    assert [e["event"] for e in events].count("end") == 1


def test_the_header_stays_and_a_torn_one_is_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 0, 2)
    with log.open_log(tmp_path, {**HEADER, "versions": {"jax": "other"}}, 2):
        assert log.read(path)[0]["versions"] == {}
    path.write_text('{"config": {"dat')
    with log.open_log(tmp_path, HEADER, 0):
        assert log.read(path)[0] == strict(json.dumps(HEADER))


def test_the_log_of_another_config_is_refused_and_kept(tmp_path):
    write_steps(tmp_path, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = {"config": {**CONFIG, "method": "set"}}
    with (
        pytest.raises(ConfigError, match="method = 'gse', but method is 'set' now"),
        log.open_log(tmp_path, other, 0),
    ):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_a_resume_changes_is_told_once(tmp_path, capsys):
    """Settings that change nothing that is computed, and the machine; all else is refused."""
    path = tmp_path / "metrics.jsonl"
    first = {**HEADER, "config": {**CONFIG, "eval_every": 1, "width": 1.0}}
    other = {**first, "config": {**first["config"], "eval_every": 2, "width": 2.0, "devices": 4}}
    other["git_revision"] = "b"

    def go_on(header, start, stop):
        with log.open_log(tmp_path, header, start) as out:
            for k in range(max(start, 0) + 1, stop + 1):
                out.write("train", k, epoch=k, loss=2 / k)
        return log.read(path)

    go_on(first, -1, 4)
    assert not capsys.readouterr().err
    header, events = go_on(other, 2, 6)
    changed = {"eval_every": 2, "width": 2.0, "devices": 4}  # an MLP has no width
    assert events[2] == {
        "event": "resume", "step": 2, "changed": {"git_revision": "b", "config": changed}
    }  # fmt: skip
    assert header == strict(json.dumps(first))  # the first start's
    assert log.headers(header, events)[-1] == strict(json.dumps(other))
    said = capsys.readouterr().err
    assert "goes on with eval_every = 2 (was 1)" in said and "other git_revision." in said
    whole = path.read_bytes()
    go_on(other, 2, 6)
    assert path.read_bytes() == whole and not capsys.readouterr().err
    # From a checkpoint before the change it is as if that had not been.
    assert [e["event"] for e in go_on(first, 1, 3)[1]] == ["train"] * 3
    # Before the first checkpoint nothing is resumed: the log is new.
    assert log.headers(*go_on(other, -1, 1)) == [strict(json.dumps(other))]
    with pytest.raises(ConfigError, match="heuristic = 'grabo', but heuristic is 'uniform' now"):
        go_on({"config": {**other["config"], "heuristic": "uniform"}}, 1, 2)


def test_a_torn_last_line_is_not_read(tmp_path):
    write_steps(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    count = len(log.read(path)[1])
    path.write_bytes(path.read_bytes()[:-5])
    assert len(log.read(path)[1]) == count - 1


def test_the_header_names_what_a_run_depends_on():
    header = log.header(CONFIG)
    assert header["config"] == CONFIG
    for package in ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        assert header["versions"][package][0].isdigit()
    assert header["devices"]["platform"] == "cpu"
    assert header["devices"]["count"] >= 1
    strict(json.dumps(header))


def test_the_git_revision_is_of_the_checkout_the_package_lies_in(tmp_path, monkeypatch):
    def git(*args):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "dst"
    package.mkdir()
    (package / "log.py").write_text("")
    monkeypatch.setattr(log, "__file__", str(package / "log.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert log.header({})["git_revision"] is None  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "a")
    assert log.header({})["git_revision"] is None  # a checkout that does not hold the package
    git("add", ".")
    git("commit", "-q", "-m", "b")
    revision = git("rev-parse", "HEAD")
    assert log.header({})["git_revision"] == revision
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/metrics.jsonl").write_text("")
    assert log.header({})["git_revision"] == revision  # a run is not a change of the package
    (package / "masks.py").write_text("")
    assert log.header({})["git_revision"] == f"{revision}+dirty"
    monkeypatch.setenv("PATH", "")
    assert log.header({})["git_revision"] is None  # no git


def tensorboard_events(workdir: Path) -> list[Event]:
    """All events, oldest file first: records of uint64 length, its crc, the event, its crc."""
    events = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_files_hold_the_scalars(tmp_path):
    write_steps(tmp_path, 0, 4)
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    }
    for k in range(1, 5):
        assert scalars["train/loss", k] == np.float32(2 / k)
    assert scalars["eval/test_accuracy", 4] == np.float32(0.9)
    assert {tag.split("/")[0] for tag, _ in scalars} == {"train", "eval", "rewire", "end"}
    assert not any("active" in tag for tag, _ in scalars)


def test_tensorboard_purges_what_a_resume_repeats(tmp_path):
    write_steps(tmp_path, 0, 4)
    first = {f.name for f in (tmp_path / "tensorboard").iterdir()}
    write_steps(tmp_path, 3, 6)
    assert len({f.name for f in (tmp_path / "tensorboard").iterdir()} - first) == 1
    starts = [e.step for e in tensorboard_events(tmp_path) if e.HasField("session_log")]
    assert starts == [4]


@pytest.mark.parametrize("layers", [2, 60])
def test_plot_is_a_png_with_a_bar_a_layer(tmp_path, layers):
    write_steps(tmp_path, 0, 6)
    possible = {f"Block_{i}/Conv_0": 100 for i in range(layers)}
    with log.open_log(tmp_path, HEADER, 6) as out:
        active = {layer: 1 + i % 5 for i, layer in enumerate(possible)}
        out.write("end", 6, epoch=6, active=active, possible=possible)
    path = figures.plot(tmp_path)
    assert path == tmp_path / "curves.png"
    image = matplotlib.image.imread(path)
    lower = image[image.shape[0] // 2 :, :, :3]
    blue = np.isclose(lower, [0x1F / 255, 0x5F / 255, 0xA8 / 255], atol=0.01).all(-1).any(0)
    assert np.count_nonzero(np.diff(blue.astype(int)) == 1) == layers


def test_plot_of_a_run_without_events(tmp_path):
    with log.open_log(tmp_path, HEADER, 0):
        pass
    assert matplotlib.image.imread(figures.plot(tmp_path)).std() > 0


def test_nothing_is_written_outside_the_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_steps(tmp_path / "a" / "run", 0, 2)
    figures.plot(tmp_path / "a" / "run")
    assert os.listdir(tmp_path) == ["a"]
    names = sorted(p.name for p in (tmp_path / "a/run").iterdir())
    assert names == ["curves.png", "metrics.jsonl", "tensorboard"]


class Terminal:
    """A stream that is, or is not, a terminal."""

    encoding = "utf-8"

    def __init__(self, tty: bool):
        self.tty, self.text = tty, ""

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_without_a_terminal_is_a_few_plain_lines(monkeypatch):
    stream = Terminal(tty=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with log.progress(2000, 1000) as bar:
        for k in range(1001, 2001):
            bar.show(k, loss=0.5, accuracy=0.75, sparsity=0.98)
        log.say("A sentence.")
    lines = stream.text.splitlines()
    assert "\r" not in stream.text and stream.text.endswith("\n") and "" not in lines
    assert len(lines) == 3  # first, sentence, last
    assert "1000/2000" in lines[0] and "A sentence." in lines
    for part in ("100%", "2000/2000", "loss 0.5", "accuracy 0.75", "sparsity 0.98"):
        assert part in lines[-1]


def test_progress_on_a_terminal_is_one_bar(monkeypatch):
    stream = Terminal(tty=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with log.progress(10, 0) as bar:
        bar.show(5, loss=0.5)
        log.say("A sentence.")
        bar.show(10, loss=0.25)
    assert "A sentence.\n" in stream.text
    assert stream.text.endswith("\n") and stream.text.count("\n") == 2
    last = stream.text.split("\r")[-1]
    assert "100%" in last and "loss 0.25" in last
