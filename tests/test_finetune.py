"""The example that begins with a dense network's weights, small: it is the better start."""

from __future__ import annotations

from dst.training import log
from experiments.examples import finetune


def test_a_dense_networks_weights_are_a_better_start(tmp_path):
    """By way of the file; both sparse networks have the same number of connections."""
    ran = finetune.main(
        ["--hidden=32", "--batch=32", "--dense_epochs=5", "--epochs=1", f"--out={tmp_path}"]
    )
    ends = {name: log.read(tmp_path / name / "metrics.jsonl")[1][-1] for name in ran}
    assert ends["finetuned"]["test_accuracy"] > ends["scratch"]["test_accuracy"] + 0.1
    assert ends["dense"]["sparsity"] == 0 and abs(ends["finetuned"]["sparsity"] - 0.9) < 1e-3
    assert ends["finetuned"]["sparsity"] == ends["scratch"]["sparsity"]
