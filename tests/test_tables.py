"""Tables and figures of experiments, from logs that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from dst.methods.table import METHODS
from experiments import layer_sparsity, memory, paper, subset_size, sweep, table1, width
from experiments.runs import Finished
from experiments.tables import LABELS, interval, markdown, ours

LAYERS = {"Conv_2": 100, "Conv_10": 300, "Dense_0": 50}


def made_up(experiment, *arguments):
    """(options, results): every run of a command line finished, with an accuracy of its own."""
    options = sweep.parse(experiment, list(arguments))
    results = []
    for n, run in enumerate(sweep.expand(experiment, options)):
        active = {layer: size // (2 + i) for i, (layer, size) in enumerate(LAYERS.items())}
        end = {"test_accuracy": n / 100, "active": active, "possible": LAYERS}
        end |= {"peak_rss_mib": 100.0 + n, "cost": {"peak_words_per_weight": 3.0}}
        rewire = {"event": "rewire", "step": 10, "active": active, "subset_realised": 18}
        results.append(Finished(run, run.config().to_dict(), end, [rewire]))
    return options, results


def test_the_interval_is_that_of_the_seeds():
    """Mean and percentiles, against NumPy's on the sorted values."""
    values = [3.0, 1.0, 2.0]
    mean, low, high = interval(values)
    assert mean == 2 and low == pytest.approx(1.1) and high == pytest.approx(2.9)
    assert interval([7.0]) == (7, 7, 7)


def test_cells_tell_their_seeds():
    """A dash where nothing was run."""
    _, results = made_up(
        table1.EXPERIMENT, "--scale=smoke", "--methods", "gse", "--seeds", "0", "1"
    )
    assert ours([]) == "–" and ours(results[:1]) == "0.00 (1 seed)"
    assert ours(results) == "0.50 (0.05 to 0.95, 2 seeds)"


def test_every_method_has_a_label():
    """And the paper's rows are those of its table."""
    assert set(METHODS) == set(LABELS)
    assert set(table1.METHODS) <= set(LABELS)


def test_the_papers_numbers():
    """Cells copied from the paper by eye: corners, the collapse of |GraSP|, the abstract's."""
    assert paper.table1(("cifar10", "resnet"), "lottery", 0.9) == 89.18
    assert paper.table1(("cifar100", "vgg"), "gse", 0.98) == 37.17
    assert paper.table1(("cifar100", "resnet"), "gse", 0.98) == 49.14
    assert paper.table1(("cifar100", "vgg"), "grasp_abs", 0.98) == 1.00
    assert paper.table1(("cifar10", "vgg"), "set", 0.95) == 83.34
    assert paper.table1(("cifar10", "vgg"), "dense", 0.95) == 89.31
    assert paper.table1(("cifar10", "vgg"), "granet", 0.95) is None
    assert paper.table1(("digits", "mlp"), "gse", 0.98) is None
    assert paper.table2(("cifar100", "vgg"), 1.5) == 65.86
    assert paper.table2(("cifar100", "resnet"), 4.0) == 72.70
    assert paper.table2(("cifar100", "vgg"), 1.25) is None
    rows = {line.split()[0]: line for line in paper._TABLE1.values()}
    assert all(len(line.split()) == 12 for line in rows.values())


def test_table_1_stands_beside_the_papers():
    """Ours, then theirs, a row a method; dense is one run whatever the sparsity."""
    arguments = ["--scale=short", "--settings", "cifar100/vgg", "--methods", "dense", "gse"]
    options, results = made_up(table1.EXPERIMENT, *arguments)
    lines = table1.table(options, results).splitlines()
    dense = "2.00 (0.20 to 3.80, 2 seeds)"
    assert f"| Dense | {dense} | 62.50 | {dense} | 62.50 | {dense} | 62.50 |" in lines
    (gse,) = [line for line in lines if line.startswith("| GSE (the paper's) |")]
    assert gse.endswith("| 37.17 |")


def test_the_papers_scale_has_its_numbers_by_any_network():
    """The config file of its VGG-16 names a network of ours, vgg_dropout."""
    arguments = ["--scale=paper", "--settings", "cifar100/vgg", "--sparsities", "0.98"]
    options, results = made_up(table1.EXPERIMENT, *arguments, "--methods", "gse", "--seeds", "0")
    assert [result.config["model"] for result in results] == ["vgg_dropout"]
    assert "| GSE (the paper's) | 0.00 (1 seed) | 37.17 |" in table1.table(options, results)


def test_figure_2_has_a_line_a_heuristic_and_two_more():
    """Means over seeds at |S| / |W| of the first rewire."""
    arguments = ["--scale=short", "--settings", "cifar100/vgg", "--ratios", "1", "10"]
    options, results = made_up(subset_size.EXPERIMENT, *arguments)
    assert subset_size.share(results[0]) == pytest.approx(100 * 18 / 450)
    axes = subset_size.figure(options, results).axes[0]
    points = {line.get_label(): line for line in axes.containers}
    assert set(points) == {"Random", "GraBo", "SynFlow"}
    gse = [r for r in results if r.config["method"] == "gse" and r.config["heuristic"] == "grabo"]
    for n, ratio in enumerate((1.0, 10.0)):
        mean = np.mean([r.accuracy for r in gse if r.config["subset_ratio"] == ratio])
        assert points["GraBo"][0].get_ydata()[n] == pytest.approx(mean)
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    for method, label in (("set", "SET"), ("rigl", "RigL")):
        mean = np.mean([r.accuracy for r in results if r.config["method"] == method])
        assert levels[label] == pytest.approx(mean)
    assert "| 10 | 4.0 % |" in subset_size.table(options, results)


def test_table_2_tells_the_counts():
    """Of the masks at the end, in thousands; the paper's number in the same row."""
    arguments = ["--scale=short", "--settings", "cifar100/vgg", "--widths", "1", "1.5"]
    options, results = made_up(width.EXPERIMENT, *arguments, "--seeds", "0")
    assert "| 1.5 | 450 | 162 | 64.00% | 1.00 (1 seed) | 65.86 |" in width.table(options, results)
    assert [width.width_of(result) for result in results] == [1.0, 1.5]
    line = width.figure(options, results).axes[0].containers[0][0]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [0, 1])


def test_figure_4_has_the_layers_in_order():
    """Conv_10 after Conv_2; a line a method."""
    arguments = ["--scale=smoke", "--methods", "set", "gse"]
    options, results = made_up(layer_sparsity.EXPERIMENT, *arguments)
    table = layer_sparsity.table(options, results).splitlines()
    assert [line.split(" | ")[0][2:] for line in table[-3:]] == list(LAYERS)
    assert table[-3] == "| Conv_2 | 50.0 | 50.0 |" and table[-2] == "| Conv_10 | 66.7 | 66.7 |"
    axes = layer_sparsity.figure(options, results).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [50, 200 / 3, 76], atol=0.01)


def test_memory_is_told_above_the_smallest_network():
    """Each variant less its own 64-64 process."""
    options, results = made_up(memory.EXPERIMENT, "--scale=smoke", "--variants", "GSE, sparse")
    assert [memory.cell(r) for r in results] == [("GSE, sparse", 64), ("GSE, sparse", 256)]
    assert memory.table(options, results).endswith("| 256-256 | 450 | 1 (3) |")
    assert len(memory.figure(options, results).axes[0].lines) == 1


@pytest.mark.parametrize("variant", memory.VARIANTS)
def test_every_variant_is_recognised_in_its_log(variant):
    """By method, execution and how it grows."""
    _, results = made_up(memory.EXPERIMENT, "--scale=smoke", "--variants", variant)
    assert {memory.cell(result)[0] for result in results} == {variant}


def test_a_bar_in_a_cell_does_not_end_it():
    """|GraSP| and |S| / |P| are cells of their own in the Markdown."""
    lines = markdown(["|S|", "b"], [["|GraSP|", 1]]).splitlines()
    assert lines == [r"| \|S\| | b |", "| --- | --- |", r"| \|GraSP\| | 1 |"]
