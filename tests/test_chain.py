"""Whole runs of pruning before and during training and of Lottery's chain, killed and resumed."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from dst.data import load
from dst.data import pipeline as data
from dst.methods.distributions import active_count
from dst.methods.lottery import winning
from dst.training import checkpoint, log, loop, steps, train
from tests.test_train import result, small

pytestmark = pytest.mark.usefixtures("compiled_once")
N = 64 * 32 + 32 * 10  # possible connections of the small network
LEVELS = (0.0, 0.5, 0.9)


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs, nothing is saved."""


def kill_at(monkeypatch, step, sparsity):
    """The end of the epoch at `step` of the run of this sparsity never comes."""
    go = loop.end_epoch

    def end_epoch(run, state, now, clock):
        if now == step and run.config.sparsity == sparsity:
            raise Killed
        return go(run, state, now, clock)

    monkeypatch.setattr(loop, "end_epoch", end_epoch)
    return lambda: monkeypatch.setattr(loop, "end_epoch", go)


def lottery(**fields):
    return small(method="lottery", lottery_levels=LEVELS[:2], epochs=2, **fields)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of three rounds, never stopped."""
    workdir = tmp_path_factory.mktemp("chain")
    train.train(lottery(), workdir)
    return workdir


def folders(workdir):
    return [workdir / "rounds" / "0", workdir / "rounds" / "0.5", workdir]


def test_a_chain_gives_every_level(chain):
    """One log a level, exact counts, and masks that are the winners of the round before."""
    for folder, level in zip(folders(chain), LEVELS, strict=True):
        header, events = log.read(folder / "metrics.jsonl")
        assert header["config"]["sparsity"] == level and events[-1]["event"] == "end"
        assert sum(events[-1]["active"].values()) == active_count(N, level)
    # Costs add up: 2 epochs of everything, of half and of a tenth.
    assert events[-1]["cost"]["training_flops_vs_dense"] == pytest.approx(1.6, abs=1e-3)


def last_state(folder, config):
    built = train.build(config, None)
    manager = checkpoint.open_manager(folder, 2)
    return built.net, checkpoint.restore(manager, built.state, config.to_dict())[0]


def test_rounds_train_the_winners(chain):
    """The masks of a round are the largest trained weights of the one before."""
    configs = [lottery(sparsity=level) for level in LEVELS]
    states = [last_state(*pair) for pair in zip(folders(chain), configs, strict=True)]
    for (net, before), (_, after), level in zip(states, states[1:], LEVELS[1:], strict=False):
        for path, mask in winning(net, before, level).items():
            np.testing.assert_array_equal(mask, after.masks[path])


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_a_killed_chain_resumes_in_its_round(chain, tmp_path, monkeypatch, level, capsys):
    """In the second epoch of a round: the same command ends with the same bits."""
    restore = kill_at(monkeypatch, 22, level)
    with pytest.raises(Killed):
        train.train(lottery(), tmp_path)
    restore()
    capsys.readouterr()
    train.train(lottery(), tmp_path)
    assert "at step 21." in capsys.readouterr().err  # its last checkpoint
    for mine, theirs, s in zip(folders(tmp_path), folders(chain), LEVELS, strict=True):
        assert result(mine, lottery(sparsity=s)) == result(theirs, lottery(sparsity=s))


def test_a_chain_goes_on_with_other_devices(chain, tmp_path, monkeypatch, capsys):
    """Rounds that are over and the one that was killed: said once in each, none is refused."""
    restore = kill_at(monkeypatch, 22, 0.5)
    with pytest.raises(Killed):
        train.train(lottery(), tmp_path)
    restore()
    other = lottery(devices=4, checkpoint_every=10)
    for said in (2, 0):
        capsys.readouterr()
        train.train(other, tmp_path)
        assert capsys.readouterr().err.count("devices = 4 (was 1)") == said
    for mine, theirs in zip(folders(tmp_path), folders(chain), strict=True):
        (_, one), (_, four) = (log.read(folder / "metrics.jsonl") for folder in (theirs, mine))
        one, four = ([e for e in events if e["event"] == "train"] for events in (one, four))
        assert [e["step"] for e in four] == [11, 22]
        assert four[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["snip", "pruning"])
def test_a_killed_run_is_not_pruned_again(tmp_path, monkeypatch, method):
    """Scores are taken once; the ramp goes on where it was; the same bits in the end."""
    config = small(method=method)
    train.train(config, tmp_path / "whole")
    restore = kill_at(monkeypatch, 11, 0.9)
    with pytest.raises(Killed):
        train.train(config, tmp_path / "killed")
    restore()
    monkeypatch.setattr(train, "prune_at_init", None)  # would be called again
    train.train(config, tmp_path / "killed")
    assert result(tmp_path / "killed", config) == result(tmp_path / "whole", config)
    _, events = log.read(tmp_path / "killed" / "metrics.jsonl")
    assert [e["event"] for e in events].count("prune") == (method == "snip")
    assert sum(events[-1]["active"].values()) == active_count(N, 0.9)
    if method == "pruning":
        assert [e["step"] for e in events if e["event"] == "rewire"] == [10, 20, 30, 33]


def test_patience_waits_for_the_ramp(tmp_path):
    """Before its end the loss belongs to another network: none of it counts as stale."""
    train.train(small(method="pruning", patience=1, learning_rate=1e-9), tmp_path)
    _, events = log.read(tmp_path / "metrics.jsonl")
    assert events[-1]["step"] == 44  # epoch 3 is the first that counts, 4 is worse or the last


def test_scoring_sees_the_whole_training_set_as_it_is():
    """All 1,437 digits in their order, the last batch smaller; `score_batches` cuts it short."""
    config = small(method="snip")
    dataset = load("digits")
    batches = steps.ScoringBatches(config, dataset)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [128] * 11 + [29] and batches.examples == sum(sizes) == 1437
    assert len(batches) == 12
    np.testing.assert_array_equal(
        np.concatenate([labels for _, labels in batches]), dataset.train_labels
    )
    first = steps.ScoringBatches(small(method="snip", score_batches=1), dataset)
    assert len(first) == 1 and first.examples == 128
    exact = data.normalise(jax.numpy.asarray(dataset.train_images[:128]), dataset.mean, dataset.std)
    np.testing.assert_array_equal(next(iter(first))[0], exact)


def test_the_log_tells_the_cost(chain):
    """Every run ends with it; what is written is JSON."""
    lines = (chain / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[-1])["cost"]) == {
        "peak_words_per_weight",
        "training_flops_vs_dense",
        "inference_flops_vs_dense",
    }
