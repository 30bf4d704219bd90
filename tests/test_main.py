"""The command line: every mistake is one sentence and exit code 2, before anything is built."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dst import main as main_lib
from dst.errors import ConfigError

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits_mlp.py"


class StoppedForTest(RuntimeError):
    """Stands for dst.training.loop.Stopped."""


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replaces the training by a list of its calls; the current folder is an empty one."""
    calls = []
    fake = types.SimpleNamespace(train=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "dst.training.train", fake)
    loop = types.SimpleNamespace(Stopped=StoppedForTest)
    monkeypatch.setitem(sys.modules, "dst.training.loop", loop)
    monkeypatch.chdir(tmp_path)
    return calls


AT, PLACE = "--coordinator=localhost:4000", ["--processes=2", "--process=0"]
BAD_FLAGS = [
    ([], "--config must name a file such as configs/digits_mlp.py", "missing"),
    (
        ["--config="],
        "missing",
    ),
    (["--config"], "Missing value for flag --config"),
    (["--config=nope.py"], "there is no file 'nope.py'"),
    (["--config=."], "there is no file '.'"),
    (["--config.sparsity=0.9"], "--config must name a file", "missing"),
    ([DIGITS, "--config.sparsty=1"], '"sparsty"', 'did you mean "sparsity"?'),
    ([DIGITS, "--config.every=9"], '"every"', 'did you mean "rewire_every"?'),
    ([DIGITS, "--config.gain=2"], '"gain"', 'did you mean "init_gain"?'),
    ([DIGITS, "--config.keys=1"], 'no field "keys"'),
    ([DIGITS, "--config.sparsity.x=1"], 'no field "sparsity.x"'),
    ([DIGITS, "--config.=1"], 'no field ""'),
    ([DIGITS, "--noconfig.sparsty"], '"sparsty"'),
    ([DIGITS, "--noconfig.sparsity"], "noconfig.sparsity"),
    ([DIGITS, "--config.sparsity"], "Missing value for flag --config.sparsity"),
    ([DIGITS, "--config.sparsity=1.2"], "sparsity must be a number in [0, 1), not 1.2"),
    ([DIGITS, "--config.sparsity=nan"], "sparsity must be a number in [0, 1), not nan"),
    ([DIGITS, "--config.sparsity=high"], "sparsity must be a number in [0, 1), not 'high'"),
    ([DIGITS, "--config.epochs=1.5"], "epochs must be an integer >= 1, not '1.5'"),
    ([DIGITS, "--config.seed=True"], "seed must be an integer", "not 'True'"),
    ([DIGITS, "--config.hidden=many"], "hidden must be a tuple", "not ('many',)"),
    (
        [DIGITS, "--config.heuristic=nope"],
        "heuristic must be 'uniform', 'grabo', 'synflow' or 'graest'",
    ),
    ([DIGITS, "--wrkdir=x"], "'wrkdir'", "Did you mean: workdir"),
    ([DIGITS, "stray"], "not 'stray'"),
    ([DIGITS, "--", "--config.epochs=3"], "not '--config.epochs=3'"),
    ([DIGITS, "--flagfile=nope"], "nope"),
    ([DIGITS, "--processes=2", "--process=0"], "--processes also needs --coordinator; it is miss"),
    ([DIGITS, "--coordinator=a:1", "--processes=2"], "--coordinator also needs --process; it is"),
    ([DIGITS, "--coordinator=", *PLACE], "--coordinator must be HOST:PORT", "not ''"),
    ([DIGITS, "--coordinator=host", *PLACE], "must be HOST:PORT of process 0, not 'host'"),
    ([DIGITS, "--coordinator=host:70000", *PLACE], "must be HOST:PORT", "not 'host:70000'"),
    ([DIGITS, *PLACE, AT, "--processes=0"], "--processes must be an integer >= 1, not 0."),
    ([DIGITS, *PLACE, AT, "--processes=two"], "--processes must be an integer >= 1, not 'two'."),
    ([DIGITS, *PLACE, AT, "--process=2"], "--process must be an integer from 0 to 1, not 2."),
    ([DIGITS, *PLACE, AT, "--process=-1"], "--process must be an integer from 0 to 1, not -1."),
    ([DIGITS, "--distributed", AT], "must stand without --coordinator"),
    ([DIGITS, "--distributed=maybe"], "--distributed=maybe", "Non-boolean"),
    ([DIGITS, "--workdir=/dev/null"], "Cannot write into --workdir=/dev/null"),
    ([DIGITS, "--workdir=/dev/null/x"], "Cannot write into --workdir=/dev/null/x"),
    ([DIGITS, "--workdir=/proc/x"], "Cannot write into --workdir=/proc/x"),
]


def check_sentence(code: int, out: str, err: str, *parts: str) -> None:
    assert (code, out) == (2, "")
    assert err.startswith("dst: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(("args", "parts"), [(args, parts) for args, *parts in BAD_FLAGS])
def test_bad_flags(args, parts, runs, capsys, tmp_path):
    code = main_lib.main(["dst", *args])
    check_sentence(code, *capsys.readouterr(), *parts)
    assert not runs and not list(tmp_path.iterdir())


BODY = "from dst.config import default\ndef get_config():\n    config = default()\n    "
BAD_FILES = [
    ("def get_config(:", "SyntaxError"),
    ("", "must have a get_config()"),
    ("get_config = 3", "must have a get_config()"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("def get_config(): pass", "must have a get_config()"),
    ("def get_config(): return {}", "must have a get_config()"),
    ("def get_config(needed): return needed", "TypeError"),
    ("raise ValueError('first\\nsecond')", "ValueError: second"),
    (BODY + "config.sparsty = 1", ': Did you mean "sparsity" instead of "sparsty"?\n'),
    (BODY + "return config.sparsty", ': Did you mean "sparsity" instead of "sparsty"?\n'),
    (BODY + "config.sparsity = 'x'", "sparsity", "x", "float"),
    (BODY + "config.epochs = 1.5", "epochs", "1.5", "int"),
    (BODY + "config.epochs = 0\n    return config", "epochs must be an integer >= 1, not 0."),
    (BODY + "config.epochs = None\n    return config", "epochs must be", "not None."),
    (BODY + "config.unlock()\n    config.a = 1\n    return config", 'no field "a"'),
]


@pytest.mark.parametrize(("text", "parts"), [(text, parts) for text, *parts in BAD_FILES])
@pytest.mark.parametrize("override", [[], ["--config.epochs=3"]], ids=["", "override"])
def test_bad_config_files(text, parts, override, runs, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    code = main_lib.main(["dst", "--config=mine.py", *override])
    check_sentence(code, *capsys.readouterr(), *parts)
    assert not runs and len(list(tmp_path.iterdir())) == 1


def test_overrides_workdir_and_dense_reach_the_training(runs):
    assert main_lib.main(["dst", DIGITS]) == 0
    args = ["--config.method=dense", "--config.hidden=8,9", "--config.lr_drop_epochs=(1,2)"]
    # An override may come first, and with a space.
    code = main_lib.main(["dst", "--config.epochs", "3", *args, DIGITS, "--workdir", "a/b"])
    assert code == 0
    (default, first), (config, second) = runs
    assert (first, second) == (Path("runs/digits_mlp"), Path("a/b"))
    assert first.is_dir() and second.is_dir() and not list(first.iterdir())
    assert (default.method, default.sparsity) == ("gse", 0.98)
    assert (config.method, config.sparsity, config.epochs) == ("dense", 0.0, 3)
    assert (config.hidden, config.lr_drop_epochs) == ((8, 9), (1, 2))


@pytest.mark.parametrize(
    ("error", "expected", "sentence"),
    [
        (ConfigError, 2, "A sentence."),
        (StoppedForTest, 1, "A sentence."),
        (KeyboardInterrupt, 130, "interrupted; the same command goes on from its last checkpoint."),
    ],
)
def test_what_the_training_raises_is_a_sentence(
    error, expected, sentence, runs, capsys, monkeypatch
):
    def fail(*_):
        raise error("A sentence.")

    monkeypatch.setattr(sys.modules["dst.training.train"], "train", fail)
    assert main_lib.main(["dst", DIGITS]) == expected
    assert capsys.readouterr() == ("", f"dst: {sentence}\n")
    assert Path("runs").exists() == (error is not ConfigError)


def test_a_refused_run_leaves_what_was_there(runs, capsys, monkeypatch):
    def fail(*_):
        raise ConfigError("A sentence.")

    monkeypatch.setattr(sys.modules["dst.training.train"], "train", fail)
    Path("mine").mkdir()
    assert main_lib.main(["dst", DIGITS, "--workdir=mine"]) == 2 and Path("mine").is_dir()
    assert main_lib.main(["dst", DIGITS, "--workdir=mine/a/b"]) == 2 and not Path("mine/a").exists()


def test_help_is_short(runs, capsys):
    assert main_lib.main(["dst", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config=" in out and "--workdir" in out and out.count("\n") < 20


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ([DIGITS, "--config.sparsty=1"], 2, "dst: "),
        ([DIGITS, "--config.batch_size=1.5"], 2, "dst: "),
        (["--help"], 0, ""),
    ],
)
def test_as_a_program(args, code, text, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "dst.main", *args]
    done = subprocess.run(
        program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr.startswith(text) and done.stderr.count("\n") == (code != 0)
    assert not list(tmp_path.iterdir())
