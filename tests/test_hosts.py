"""Several processes are one run: they find each other, agree, and end with the bits of one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dst import hosts, main
from dst.errors import ConfigError
from dst.training import launch, train
from tests.test_train import result, small

ROOT = Path(__file__).parents[1]

# dst.main, in which a signal comes during the rewire of a step.
PROGRAM = """
import os, sys
from dst import main
from dst.training import loop
number, at, *argv = sys.argv[1:]
go = loop.rewire
def rewire(run, state, step):
    if step == int(at): os.kill(os.getpid(), int(number))
    return go(run, state, step)
loop.rewire = rewire
sys.exit(main.main(["dst", *argv]))
"""
RUN = [
    *(f"--config={ROOT}/configs/digits_mlp.py", "--config.hidden=(32,)", "--config.epochs=2"),
    *("--config.rewire_every=10", "--config.rewire_end_epoch=1.5", "--config.lr_drop_epochs=(1,)"),
    *("--config.sparsity=0.9", "--config.checkpoint_every=15"),
]
STEPS = 88


def start(*args: str, sent: int = 0, at: int = -1) -> subprocess.Popen:
    """A process with a device of its own, to which a signal is sent at a step."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    program = [sys.executable, "-c", PROGRAM, str(sent), str(at), *RUN, *args]
    return subprocess.Popen(program, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def end(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """(exit code, stderr) of each."""
    try:
        return [(p.wait(), err) for p in processes for _, err in [p.communicate(timeout=240)]]
    finally:
        for process in processes:
            process.kill()


def two(first: str, second: str, **signals: int) -> list[tuple[int, str]]:
    """Two processes with one device and one more flag each; the second gets the signal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    return end(start(first, *flags, "--process=0"), start(second, *flags, "--process=1", **signals))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, this one, with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    assert main.main(["dst", *RUN, "--config.devices=2", f"--workdir={workdir}"]) == 0
    return workdir


def test_two_processes_killed_and_stopped_end_with_the_bits_of_one(one, tmp_path):
    """All of the state, masks included, and the log; each process adds one device of two."""
    workdirs = [f"--workdir={tmp_path}"] * 2
    # The second is killed at step 20, and the first does not wait for it.
    (code, _), (killed, _) = two(*workdirs, sent=signal.SIGKILL, at=20)
    assert code not in (0, -signal.SIGKILL) and killed == -signal.SIGKILL
    # The second is asked to stop at step 50: both do after the update of that step.
    (code, said), (other, quiet) = two(*workdirs, sent=signal.SIGTERM, at=50)
    assert (code, other) == (0, 0), said + quiet
    assert "at step 15.\n" in said and "Stopped at step 51 and saved" in said
    assert "step" not in quiet
    (code, said), (other, quiet) = two(*workdirs)
    assert (code, other) == (0, 0), said + quiet
    config = small(checkpoints_kept=2)
    digest, events = result(tmp_path, config)
    assert (digest, events) == result(one, config)
    assert events[-1]["step"] == STEPS
    assert [event["step"] for event in events if event["event"] == "rewire"] == [*range(10, 67, 10)]
    assert (tmp_path / "curves.png").exists()


def test_processes_must_have_one_config_and_one_workdir(monkeypatch, tmp_path):
    """Else one sentence, in each of them, with what differs."""
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, {**mine, "seed": 4}])
    with pytest.raises(ConfigError, match=r"seed is 3 in process 0 and 4 in process 1\.$"):
        train.train(small(), tmp_path)
    # How often to evaluate may change at a resume, but all processes must do it together.
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, {**mine, "eval_every": 4}])
    with pytest.raises(ConfigError, match=r"eval_every is 1 in process 0 and 4 in process 1\.$"):
        train.check_alike(small())
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, {**mine, "data_dir": "/there"}])
    train.check_alike(small())
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, -1])
    with pytest.raises(ConfigError, match=r"newest checkpoints differ: step 20, none\.$"):
        train.check_step(20, tmp_path)


def test_a_mistake_in_one_process_ends_all(monkeypatch):
    """Its own error there, in the others a sentence with it."""
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, "No such file."])
    theirs = r"^Process 1 cannot start: No such file\.$"
    with pytest.raises(ConfigError, match=theirs), hosts.in_step():
        pass
    with pytest.raises(OSError, match="own"), hosts.in_step():
        raise OSError("own")


def test_a_port_in_use_is_said():
    """JAX itself would crash."""
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        refused = f"cannot listen at --coordinator={address}: Address already in use"
        with pytest.raises(ConfigError, match=refused), launch.joined(launch.Place(address, 2, 0)):
            pass
