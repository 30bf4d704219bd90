"""The examples run, small: they learn, and are as sparse as they say."""

from __future__ import annotations

import numpy as np

from dst.training import log
from experiments.examples import gpt, vit


def run(example, folder, *argv):
    """The last event of the log."""
    example.main([*argv, f"--out={folder}"])
    return log.read(folder / "metrics.jsonl")[1]


def test_a_vision_transformer_is_as_sparse_overall_as_it_says(tmp_path):
    small = ["--dataset=digits", "--dim=32", "--blocks=1", "--patch=4", "--epochs=2", "--batch=32"]
    first, *_, last = run(vit, tmp_path, *small, "--learning_rate=1e-2", "--method=set")
    assert abs(last["overall_sparsity"] - 0.9) < 1e-3 < last["sparsity"] - 0.9
    assert last["test_accuracy"] > 0.15 and last["loss"] < first["loss"]


def test_a_gpt_has_the_weights_of_its_dense_rival(tmp_path):
    small = ["--dim=64", "--blocks=1", "--length=16", "--batch=4", "--steps=10"]
    last = run(gpt, tmp_path / "sparse", *small)[-1]
    assert last["sparsity"] > 0.979 and last["held_out_bits"] < np.log2(256)
    run(gpt, tmp_path / "dense", *small, "--method=dense")
    counts = [
        log.read(tmp_path / name / "metrics.jsonl")[0]["config"]["weights"]
        for name in ("sparse", "dense")
    ]
    assert abs(counts[0] - counts[1]) < 0.2 * counts[0]
    assert gpt.weights(512, 6, 128) == 12 * 6 * 512**2 + 384 * 512
