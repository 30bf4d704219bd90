"""Sweeps: what is finished is skipped, what broke off resumes, what fails is told; on one engine
after the other. Most runs here are played by a script, which takes no time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dst.training.log import read
from experiments import subset_size, sweep
from experiments.runs import ROOT, Run, finished, share_done
from experiments.scales import run_of

# Writes the log of a run: half of it, and the rest if MODE lets it.
ACTOR = """
import json, os, pathlib, sys, time
folder, config, mode = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
log = folder / "metrics.jsonl"
lines = log.read_text().splitlines() if log.exists() else [json.dumps({"config": config})]
(folder / "programs").write_text(os.environ["JAX_COMPILATION_CACHE_DIR"])
print("resuming" if log.exists() else "starting", flush=True)
lines.append(json.dumps({"event": "train", "step": 66}))
log.write_text("\\n".join(lines) + "\\n")
if mode == "hang":
    time.sleep(60)
if mode in ("fail", "refuse"):
    print("dst: it went wrong")
    sys.exit({"fail": 1, "refuse": 2}[mode])
end = {"event": "end", "step": 132, "test_accuracy": 0.5, "active": {"D": 1}, "possible": {"D": 2}}
log.write_text("\\n".join([*lines, json.dumps(end)]) + "\\n")
"""
ARGUMENTS = ["--scale=smoke", "--ratios", "1", "--heuristics", "uniform", "--seeds", "0"]


@pytest.fixture
def play(monkeypatch):
    """`play(method=mode, ...)` says how the runs of a method go; else they go well."""
    modes: dict[str, str] = {}

    def command(run, out):
        config = run.config().to_dict()
        mode = modes.get(config["method"], "")
        actor = [sys.executable, "-S", "-c", ACTOR]
        return [*actor, str(out / run.folder), json.dumps(config), mode]

    monkeypatch.setattr(Run, "command", command)

    def say(**new):
        modes.clear()
        modes.update(new)

    return say


def go(out, *more):
    """A small sweep of SET, RigL and GSE: exit code."""
    return sweep.main(subset_size.EXPERIMENT, [*ARGUMENTS, f"--out={out}", *more])


def outputs(out):
    """Method -> what its process wrote."""
    return {p.name.split("-")[2]: (p / "output.txt").read_text() for p in out.glob("digits*")}


def test_finished_runs_are_skipped(play, tmp_path, capsys):
    """The second time nothing runs; the table and the figure are there."""
    play()
    assert go(tmp_path) == 0
    assert outputs(tmp_path) == dict.fromkeys(("set", "rigl", "gse"), "starting\n")
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/metrics.jsonl")}
    assert go(tmp_path) == 0
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/metrics.jsonl")}
    assert outputs(tmp_path)["gse"] == "starting\n"
    text = capsys.readouterr()
    assert "3 runs, 3 of them finished" in text.err and "| SET |" in text.out
    assert (tmp_path / "subset_size-smoke.md").read_text() in text.out
    assert (tmp_path / "subset_size-smoke.png").read_bytes().startswith(b"\x89PNG")


def test_runs_share_what_they_compile_unless_the_user_says_where(play, tmp_path, monkeypatch):
    play(set="fail")
    run = run_of("smoke", ("digits", "mlp"), 0, method="set", sparsity=0.98)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for place in (str(tmp_path / "compiled"), "elsewhere"):
        sweep.perform(run, tmp_path)
        assert (tmp_path / run.folder / "programs").read_text() == place
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")


def test_a_failure_does_not_stop_the_others(play, tmp_path, capsys):
    """It is told with its last line; the same command tries it again, where it broke off."""
    play(set="fail")
    assert go(tmp_path) == 1
    err = capsys.readouterr().err
    assert "ended with code 1: dst: it went wrong" in err and "1 of the runs" in err
    assert set(outputs(tmp_path)) == {"set", "rigl", "gse"}
    play()
    assert go(tmp_path) == 0
    assert outputs(tmp_path)["set"] == "starting\ndst: it went wrong\nresuming\n"
    assert outputs(tmp_path)["rigl"] == "starting\n"


def test_bad_input_stops_the_sweep(play, tmp_path, capsys):
    """Data that are missing are missing for all runs."""
    play(set="refuse")
    assert go(tmp_path) == 1
    assert set(outputs(tmp_path)) == {"set"}
    assert "ended with code 2: dst: it went wrong" in capsys.readouterr().err


def test_a_stopped_sweep_stops_its_run(play, tmp_path, capsys):
    """SIGTERM goes on to the run, no other is started, and nothing is left behind."""
    play(set="hang")

    def stop():
        while not list(tmp_path.glob("*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert go(tmp_path) == 1
    assert set(outputs(tmp_path)) == {"set"}
    assert "the same command goes on" in capsys.readouterr().err


def test_no_two_processes_have_one_folder(play, tmp_path, capsys):
    """A run that another sweep has is left to it; its lock is its process's, not the sweep's."""
    play()
    run = run_of("smoke", ("digits", "mlp"), 0, method="set", sparsity=0.98)
    folder = tmp_path / run.folder
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        holder = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    try:
        assert go(tmp_path) == 1
        assert f"{run.folder} is being run by another process" in capsys.readouterr().err
        assert not (folder / "metrics.jsonl").exists()
    finally:
        holder.kill()
        holder.wait()
    assert go(tmp_path) == 0


def test_dry_run_prints_what_is_left(tmp_path, capsys):
    """Whole commands, and nothing is written."""
    assert go(tmp_path / "new", "--dry-run", "--config.learning_rate=0.02") == 0
    head, *commands = capsys.readouterr().out.splitlines()
    assert head == "# 3 runs: 0 finished, 0 broken off"
    assert len(commands) == 3 and not (tmp_path / "new").exists()
    for command in commands:
        assert command.startswith("python -m dst.main --config=configs/digits_mlp.py ")
        assert "--config.learning_rate=0.02" in command and "seed0" in command


# Whether JAX has taken hold of devices after what a sweep's own process does.
OWN = """
import sys
from dst.training import log
from experiments import table1, width, sweep
log.say("x")
log.progress(3, 0).close()
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
sys.argv[1:] = ["--scale=smoke", "--dry-run", "--seeds", "0"]
sweep.main(width.EXPERIMENT)
assert set(xla_bridge.backends()) == {"cpu"}
"""


def test_a_sweep_leaves_the_accelerators_to_its_runs():
    """They would find a GPU's memory taken: no device for progress, the CPU to count weights."""
    env = {**os.environ, "JAX_PLATFORMS": ""}
    command = [sys.executable, "-c", OWN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_collect_runs_nothing(play, tmp_path, capsys):
    """Only what is finished is in the table."""
    play(rigl="fail")
    go(tmp_path)
    play()
    before = outputs(tmp_path)
    assert go(tmp_path, "--collect") == 0
    assert outputs(tmp_path) == before
    out = capsys.readouterr().out
    assert "| SET |  | 50.00 (1 seed) |" in out and "| RigL |  | – |" in out


def test_progress_is_that_of_the_logs(play, tmp_path):
    """Half of the steps are half of the run; Lottery's rounds count."""
    run = run_of("smoke", ("digits", "mlp"), 0, method="set", sparsity=0.98)
    assert share_done(run, tmp_path) == 0
    play(set="fail")
    sweep.perform(run, tmp_path)
    assert share_done(run, tmp_path) == 0.5
    play()
    sweep.perform(run, tmp_path)
    assert share_done(run, tmp_path) == 1 and finished(run, tmp_path)
    chain = run_of("smoke", ("digits", "mlp"), 0, method="lottery", sparsity=0.5)
    folder = tmp_path / chain.folder / "rounds" / "0"
    folder.mkdir(parents=True)
    lines = [{"config": {}}, {"event": "end", "step": 132}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert share_done(chain, tmp_path) == 0.5


def test_a_real_run_that_was_stopped_resumes(tmp_path, capsys):
    """Asked to stop after its first epoch it saves; the same sweep finishes it."""
    run = run_of("smoke", ("digits", "mlp"), 0, method="random", sparsity=0.9, hidden=(8,))
    log = tmp_path / run.folder / "metrics.jsonl"
    epoch = lambda: log.exists() and '"train"' in log.read_text()  # noqa: E731
    assert sweep.perform(run, tmp_path, epoch) == 0  # saved and stopped
    assert finished(run, tmp_path) is None and 0 < share_done(run, tmp_path) < 1
    assert sweep.perform(run, tmp_path) == 0
    assert "Resuming" in (log.parent / "output.txt").read_text()
    end = read(log)[1][-1]
    assert end["event"] == "end" and end["active"].keys() == end["possible"].keys()


# A process of its own: Ray forks, which JAX, imported here, warns of.
ON_RAY = """
import ray, sys
from experiments import subset_size, sweep
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
assert sweep.main(subset_size.EXPERIMENT, sys.argv[1:]) == 0
refused = ["--config.devices=99", "--cpus-per-run=2", "--seeds", *"012345"]
refused += [sys.argv[-1] + "/refused"]
assert sweep.main(subset_size.EXPERIMENT, [*sys.argv[1:], *refused]) == 1
"""


def test_ray_runs_two_at_once(tmp_path):
    """The same sweep on one node with two workers: same folders, both finished.

    After bad input the rest is called off, here of six that follow each other; one more may have
    begun before the first was heard of.
    """
    # A real sweep of static networks on the digits; one epoch is enough.
    arguments = ["--scale=smoke", "--ratios", "1", "--heuristics", "uniform", "--engine=ray"]
    arguments += ["--config.hidden=(8,)", "--config.method=random", "--config.epochs=1"]
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, *arguments, f"--out={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_worker_niceness": "0"},  # else a busy machine lets them starve
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [path.read_text() for path in tmp_path.glob("refused/*/output.txt")]
    assert 1 <= sum("devices must be at most 1" in text for text in told) <= 3
    logs = sorted(tmp_path.glob("*/metrics.jsonl"))
    assert [path.parent.name[-5:] for path in logs] == ["seed0", "seed1"]
    assert all(read(log)[1][-1]["event"] == "end" for log in logs)
