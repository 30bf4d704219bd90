"""What has to hold on an accelerator, small: `pytest -m gpu`; skipped where there is none."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dst
from dst.methods import METHODS
from dst.training import log, train
from tests import tiny
from tests.test_every_method import SPARSE, first_state
from tests.test_train import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]
RUNS = [(name, "masked", {}) for name in METHODS] + [(name, "sparse", {}) for name in SPARSE]
RUNS += [("rigl", "sparse", {"growth_memory": "streamed"})]
RUNS += [("gse", "masked", {"heuristic": h}) for h in ("uniform", "synflow", "graest")]


@pytest.mark.parametrize(("name", "execution", "options"), RUNS, ids=str)
def test_every_method_steps_and_rewires(name, execution, options):
    """SynFlow's flow is found in float64."""
    s = tiny.setup(name, execution=execution, **options)
    state = first_state(s.net, s.tx, s.method, tiny.loss, jax.random.key(0))
    update = dst.make_update(s.net, s.tx, tiny.loss)
    before = dst.sparsity_of(state)
    for step in range(3):
        if s.method.moves and dst.due(s.method, step):
            rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss)
            state, report = rewire(state, tiny.batch(step))
            assert report["finite"] and int(report["pruned"]) > 0
        state, metrics = update(state, tiny.batch(step))
        assert metrics["finite"]
    assert dst.sparsity_of(state) == before or s.method.ramps or name in ("dsr", "deepr")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_run_learns_stops_and_goes_on(tmp_path, monkeypatch, execution, precision):
    """Several steps a dispatch, checkpoints; what was stopped ends as what was not."""
    config = small(execution=execution, precision=precision, hidden=(128,), sparsity=0.8)
    train.run_once(config, tmp_path / "whole")
    save, saved = train.checkpoint.save, []

    def stop_after_two(*args):
        save(*args)
        saved.append(None)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.checkpoint, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train.run_once(config, tmp_path / "stopped")
    train.run_once(config, tmp_path / "stopped")
    ends = [log.read(tmp_path / n / "metrics.jsonl")[1][-1] for n in ("whole", "stopped")]
    assert ends[0]["test_accuracy"] == ends[1]["test_accuracy"] > 0.5
    assert ends[0]["active"] == ends[1]["active"]
