"""The table of experiments/cost.py: schedules integrated slowly, committed logs, all methods."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dst.methods.table import METHODS
from experiments import cost

RESULTS = Path(cost.__file__).parent / "results"


def planned(method, sparsity=0.9, **fields):
    """A small network on the paper's schedule."""
    fields = {"model": "mlp", "hidden": (50,), "dataset": "cifar100", **fields}
    return cost.Run(cost.configured(method=method, sparsity=sparsity, **fields)).planned()


def test_every_method_has_a_row(capsys):
    cost.main(["--model", "mlp", "--sparsity", "0.98", "--logs", str(RESULTS / "digits_mlp")])
    printed = capsys.readouterr().out.splitlines()
    head, _, *lines = [line.strip("| ").split(" | ") for line in printed]
    rows = {line[0].split(" ")[0] for line in lines}
    assert rows == set(METHODS)
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert cells["dense"]["counted from masks (runs)"] == "0 %: 1 (3)"
    assert cells["random"]["counted from masks (runs)"] == "98 %: 0.02 (3)"
    assert cells["gse (grabo)"]["counted from masks (runs)"].endswith("(6)")
    assert cells["gse (grabo)"]["memory"] == cells["rigl (streamed)"]["memory"] == "sparse"
    assert cells["rigl"]["memory"] == "dense at every rewire"
    assert cells["snip"]["memory"] == "dense, once"
    assert cells["rigl"]["peak words, 98 %"] == "1.08"
    assert cells["lottery"]["training FLOPs / dense, 98 %"] == "1.92"


def test_a_ramp_costs_its_mean_density():
    steps, end, every = 200 * 390, 120 * 390, 1000
    changes = np.minimum(np.arange(steps) // every * every, end)
    changes[np.arange(steps) >= end] = end
    density = 1 - 0.9 * (1 - (1 - changes / end) ** 3)
    found = planned("pruning")
    assert found["training_flops_vs_dense"] == pytest.approx(density.mean(), rel=1e-4)
    assert found["inference_flops_vs_dense"] == pytest.approx(0.1, rel=1e-4)


def test_rewires_add_to_the_steps_what_they_take():
    steps, rewires = 200 * 390, 46
    found = planned("rigl")["training_flops_vs_dense"]
    assert found == pytest.approx(0.1 + rewires * (2 * 0.1 + 1) / (3 * steps), rel=1e-5)


def test_snfs_has_the_dense_gradient_of_every_step():
    found = planned("snfs")["training_flops_vs_dense"]
    assert found == pytest.approx((2 * 0.1 + 1) / 3, rel=1e-4)


def test_scores_before_training_see_the_images_asked_for():
    seen = 0.1 + 50_000 / (200 * 390 * 128)
    assert planned("snip")["training_flops_vs_dense"] == pytest.approx(seen, rel=1e-4)
    seen = 0.1 + 10 * 128 / (200 * 390 * 128)
    found = planned("snip", score_batches=10)["training_flops_vs_dense"]
    assert found == pytest.approx(seen, rel=1e-4)


def test_logs_are_found_by_model_and_cost_what_their_masks_say():
    runs = cost.logged([RESULTS / "cifar100_vgg16_short"], "vgg")
    assert set(runs) == {(name, 0.98) for name in ("gse (grabo)", "random", "set")}
    assert runs["random", 0.98] == [pytest.approx(0.02, rel=1e-3)]
    # The global choice moves connections into the first layers, of which each is used most.
    assert runs["gse (grabo)", 0.98][0] > 0.03
    assert cost.logged([RESULTS / "cifar100_vgg16_short"], "resnet") == {}


def test_xla_plans_little_for_a_truly_sparse_step_and_nothing_for_a_method_that_is_not():
    masked_step, masked_rewire, step, rewire = cost.measured({"method": "set"}, 0.98)
    assert float(step) < 0.12 < 3 < float(masked_step)
    assert float(rewire) < 0.25 < 3 < float(masked_rewire)  # a chunk of 2^15 pairs is most of it
    snip_step, *rest = cost.measured({"method": "snip"}, 0.98)
    assert float(snip_step) > 3 and rest == ["–", "–", "–"]


def test_logs_of_methods_without_a_heuristic_are_read(tmp_path):
    """Their resolved heuristic is "", which no user may ask for."""
    for folder in (RESULTS / "runs").glob("*-vgg-*"):
        if "-snip-" in folder.name or "-granet-" in folder.name:
            shutil.copytree(folder, tmp_path / folder.name)
    runs = cost.logged([tmp_path], "vgg")
    assert len(runs["snip", 0.98]) == 2 and len(runs["granet", 0.98]) == 1
