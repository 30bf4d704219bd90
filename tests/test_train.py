"""Whole runs on the digits: what is written, killed runs, signals, NaN, early stopping."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import dst
from dst import models
from dst.config import default, validate
from dst.data import load
from dst.data import pipeline as dst_data
from dst.errors import ConfigError
from dst.methods.settings import resolve
from dst.training import checkpoint, loop, train
from dst.training.log import read

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("compiled_once", "no_figures")


def small(**overrides):
    """A run of 44 steps with rewires at 10, 20 and 30, a few seconds long."""
    config = default()
    fields = dict(
        dataset="digits", model="mlp", hidden=(32,), epochs=4, rewire_every=10, devices=1,
        rewire_end_epoch=3, lr_drop_epochs=(2, 3), sparsity=0.9, checkpoint_every=7, seed=3,
    )  # fmt: skip
    config.update({**fields, **overrides})
    validate(config)
    return resolve(config)


def result(workdir, config):
    """(digest of the last checkpoint, log without wall-clock fields)."""
    manager = checkpoint.open_manager(workdir, config.checkpoints_kept)
    note = checkpoint._read_note(manager, manager.latest_step())
    _, events = read(Path(workdir) / "metrics.jsonl")
    for event in events:
        event.pop("seconds", None)
        event.pop("images_per_second", None)
        event.pop("peak_rss_mib", None)
    return note["sha256"], events


@pytest.fixture(scope="module", params=["masked", "sparse"])
def run(request):
    """`small` in both executions."""
    return functools.partial(small, execution=request.param)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The same run, never stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(run(), workdir)
    return workdir, result(workdir, run())


def test_a_run_shows_what_it_did(run, uninterrupted):
    """Header, one train and eval line an epoch, every rewire with its report, the end, a plot."""
    workdir, (_, events) = uninterrupted
    header, _ = read(workdir / "metrics.jsonl")
    assert header["config"]["sparsity"] == 0.9
    assert {"jax", "flax"} <= header["versions"].keys() and header["devices"]
    kinds = [event["event"] for event in events]
    assert kinds.count("train") == kinds.count("eval") == 4 and kinds.count("rewire") == 3
    possible = 64 * 32 + 32 * 10
    K = possible - round(0.9 * possible)
    for event in events:
        if event["event"] == "rewire":
            assert sum(event["active"].values()) == K
            assert event["pruned"] == event["grown"] > 0 or event["step"] == 30
            assert event["subset_asked"] == 10 * event["pruned"] >= event["subset_realised"]
            assert set(event["dead_units"]) == set(event["active"])
        if event["event"] in ("eval", "end"):
            assert 0 < event["test_accuracy"] <= 1
            assert event["sparsity"] == pytest.approx(1 - K / possible)
    assert kinds[-1] == "end" and sum(events[-1]["active"].values()) == K
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((workdir / "tensorboard").iterdir())


def test_a_run_leaves_its_network_for_plain_flax(uninterrupted):
    """The file's accuracy is that of the log's last line."""
    workdir, (_, events) = uninterrupted
    data = load("digits")
    model = models.build(small(), data.num_classes)
    images = dst_data.normalise(data.test_images, data.mean, data.std)
    logits = model.apply(dst.load(workdir / "network.npz"), images, train=False)
    right = np.mean(np.argmax(logits, -1) == data.test_labels)
    assert right == pytest.approx(events[-1]["test_accuracy"], abs=1e-6)


def test_a_finished_run_is_not_run_again(run, uninterrupted, capsys):
    """The same command says so and leaves the same result."""
    workdir, before = uninterrupted
    train.train(run(), workdir)
    assert result(workdir, run()) == before
    assert "step 44" in capsys.readouterr().err


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs, nothing is saved."""


def killed_in(name, at, config, workdir, after=False):
    """A run that is killed in the loop's function of this name at a step, or right after it."""
    go = getattr(loop, name)

    def dying(run, state, step, *rest):
        if step != at:
            return go(run, state, step, *rest)
        if after:
            go(run, state, step, *rest)
        raise Killed

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, name, dying)
        train.train(config, workdir)


def test_killed_runs_end_bitwise_the_same(run, uninterrupted, tmp_path):
    """In a rewire before its log; at an epoch's end, after its log and before its checkpoint."""
    killed_in("rewire", 20, run(), tmp_path)
    assert checkpoint.open_manager(tmp_path, 2).latest_step() == 14
    killed_in("end_epoch", 22, run(), tmp_path, after=True)
    assert checkpoint.open_manager(tmp_path, 2).latest_step() == 21
    train.train(run(), tmp_path)
    assert result(tmp_path, run()) == uninterrupted[1]


KILL = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
from dst.training import checkpoint, train
from tests.test_train import small
def die(): os.kill(os.getpid(), signal.SIGKILL)
go = checkpoint.save
def save(manager, state, record):
    if int(state.step) == 21: threading.Timer(0.02, die).start()
    go(manager, state, record)
checkpoint.save = save
train.train(small(execution={execution!r}), {workdir!r})
"""


@pytest.mark.parametrize("run", ["sparse"], indirect=True)
def test_sigkill_in_a_save_changes_no_bit(run, uninterrupted, tmp_path):
    """The process is gone while Orbax writes the checkpoint of step 21; another one goes on."""
    script = KILL.format(root=str(ROOT), workdir=str(tmp_path), **run.keywords)
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}  # the machine that the others have
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    train.train(run(), tmp_path)
    assert result(tmp_path, run()) == uninterrupted[1]


def interrupted_at(step, config, workdir, monkeypatch, number=signal.SIGTERM):
    """A run that gets a signal at the end of the epoch at this step."""
    go = loop.end_epoch

    def interrupt(run, state, now, clock):
        if now == step:
            os.kill(os.getpid(), number)
        return go(run, state, now, clock)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "end_epoch", interrupt)
        train.train(config, workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(run, uninterrupted, tmp_path, monkeypatch, number, capsys):
    """The step is finished and saved; the same command ends as if nothing had happened."""
    before = signal.getsignal(number)
    interrupted_at(11, run(), tmp_path, monkeypatch, number)
    assert signal.getsignal(number) is before
    assert "Stopped at step" in capsys.readouterr().err
    assert result(tmp_path, run())[1][-1]["event"] != "end"
    train.train(run(), tmp_path)
    assert result(tmp_path, run()) == uninterrupted[1]


def test_damage_is_repaired_from_the_step_before(run, uninterrupted, tmp_path, capsys):
    """Flipped bits in the last checkpoint: one sentence, the same result from the one before."""
    train.train(run(), tmp_path)
    for data in (tmp_path / "checkpoints" / "44" / "state").rglob("d/*"):
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
        data.write_bytes(raw)
    train.train(run(), tmp_path)
    assert (
        "The checkpoint of step 44 is damaged; taking that of step 42." in capsys.readouterr().err
    )
    assert result(tmp_path, run()) == uninterrupted[1]


def test_a_resume_may_change_what_is_not_computed(
    run, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Where and how often: the same bits in the end, said once and told in the log."""
    interrupted_at(11, run(), tmp_path, monkeypatch)
    others = dict(data_dir="/elsewhere", eval_every=3, eval_batch_size=90, checkpoint_every=9)
    config = run(**others, checkpoints_kept=3)
    train.train(config, tmp_path)
    said = capsys.readouterr().err
    assert said.count(" goes on with ") == said.count("eval_every = 3 (was 1)") == 1
    digest, events = result(tmp_path, config)
    assert digest == uninterrupted[1][0]
    (resume,) = (e for e in events if e["event"] == "resume")
    assert resume["step"] in (11, 12)
    assert resume["changed"] == {"config": {**others, "checkpoints_kept": 3}}
    assert [e["step"] for e in events if e["event"] == "eval"] == [11, 33, 44]
    theirs = [e for e in uninterrupted[1][1] if e["event"] in ("train", "rewire")]
    assert [e for e in events if e["event"] in ("train", "rewire")] == theirs
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="epochs = 4, but epochs is 5 now"):
        train.train(run(epochs=5), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused(run, uninterrupted):
    """The workdir of another run gives one sentence, and loses nothing."""
    workdir, before = uninterrupted
    with pytest.raises(ConfigError, match="sparsity"):
        train.train(run(sparsity=0.8), workdir)
    assert result(workdir, run()) == before


def test_nan_stops_before_anything_is_saved(tmp_path):
    """The sentence names the step and the last good checkpoint, which is finite."""
    config = small(learning_rate=1e20, checkpoint_every=1, method="random")
    with pytest.raises(
        train.Stopped, match=r"NaN or inf.* by step \d+.*(last good one is|no checkp)"
    ):
        train.train(config, tmp_path)
    manager = checkpoint.open_manager(tmp_path, 2)
    for step in manager.all_steps():
        arrays = ocp.args.Composite(state=ocp.args.StandardRestore())
        leaves = jax.tree.leaves(manager.restore(step, args=arrays).state)
        assert all(np.isfinite(leaf).all() for leaf in leaves if leaf.dtype.kind == "f")


def test_early_stop_looks_at_the_training_or_held_out_loss(tmp_path):
    """With patience 2 and a loss that cannot fall the run ends; the test set is never asked."""
    config = small(learning_rate=1e-30, patience=2, epochs=9, validation_size=200, method="random")
    train.train(config, tmp_path)
    _, events = read(tmp_path / "metrics.jsonl")
    assert events[-1]["reason"] == "no better loss for 2 epochs" and events[-1]["epoch"] == 3
    held_out = [e["validation_loss"] for e in events if e["event"] == "eval"]
    best = int(np.argmin(held_out))
    assert len(held_out) == best + 3


def test_the_test_set_is_asked_when_it_is_due_and_once_in_the_end(tmp_path, monkeypatch):
    """Every `eval_every` epochs and at the end; the validation set, which is watched, always."""
    asked = []
    go = train.make_evaluate

    def counted(config, dataset, net, devices, images, labels):
        evaluate = go(config, dataset, net, devices, images, labels)
        return lambda state: asked.append((len(labels), int(state.step))) or evaluate(state)

    monkeypatch.setattr(train, "make_evaluate", counted)
    config = small(method="random", epochs=5, eval_every=2, validation_size=200)
    train.train(config, tmp_path)
    whole = result(tmp_path, config)
    test, held_out = ([step for n, step in asked if n == size] for size in (360, 200))
    assert (test, held_out) == ([18, 36, 45], [9, 18, 27, 36, 45])
    events = whole[1]
    lines = [event for event in events if event["event"] == "eval"]
    assert [e["step"] for e in lines if "validation_loss" in e] == held_out
    assert [e["step"] for e in lines if "test_loss" in e] == test
    assert events[-1]["test_loss"] == lines[-1]["test_loss"]
    # Killed before the last line was written: restored at its end it writes the same.
    log = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(log[:-1]))
    asked.clear()
    train.train(config, tmp_path)
    assert asked == [(360, 45)]
    assert result(tmp_path, config) == whole


@pytest.mark.parametrize(
    "overrides",
    [
        dict(method="dense"),
        dict(method="random"),
        dict(method="set"),
        dict(method="rigl"),
        dict(heuristic="synflow", precision="bfloat16"),
        dict(heuristic="synflow", precision="bfloat16", execution="sparse"),
    ],
    ids=str,
)
def test_every_method_learns(tmp_path, overrides):
    """Four epochs of each row of Table 1 beat chance by far, at the sparsity asked for."""
    config = small(hidden=(256,), lr_drop_epochs=(4,), **overrides)
    train.train(config, tmp_path)
    _, events = read(tmp_path / "metrics.jsonl")
    assert events[-1]["test_accuracy"] > 0.4
    assert events[-1]["sparsity"] == pytest.approx(config.sparsity, abs=1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "end"


def test_four_devices_run_the_same_job(run, uninterrupted, tmp_path):
    """All four virtual devices: same batches, same connections, close losses."""
    assert dst_data.steps_per_epoch(1437, 128) == 11
    train.train(run(devices=4, epochs=2), tmp_path)
    four = {e["step"]: e for e in read(tmp_path / "metrics.jsonl")[1] if e["event"] == "train"}
    one = {e["step"]: e for e in uninterrupted[1][1] if e["event"] == "train"}
    for step in (11, 22):
        assert four[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-3)


def test_several_steps_a_dispatch_do_the_same(run, uninterrupted, tmp_path, monkeypatch):
    """The loop of GPUs and TPUs: the same events, the same connections, close losses."""
    monkeypatch.setattr(train.steps, "looped", lambda devices: True)
    train.train(run(), tmp_path)
    _, looped = result(tmp_path, run())
    for ours, theirs in zip(looped, uninterrupted[1][1], strict=True):
        assert (ours["event"], ours["step"]) == (theirs["event"], theirs["step"])
        assert ours.get("active") == theirs.get("active")
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_loop_of_several_steps_stops_at_a_nan(tmp_path, monkeypatch):
    """The sentence comes from within the dispatch, not at its end."""
    monkeypatch.setattr(train.steps, "looped", lambda devices: True)
    with pytest.raises(train.Stopped, match="NaN or inf"):
        train.train(small(learning_rate=1e20, method="random"), tmp_path)
