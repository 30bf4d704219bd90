"""The table of runs of the paper's length, from logs that are made up."""

from __future__ import annotations

import json

import pytest

from dst.config import default
from experiments import full_length

THIRD = 1 / 3


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(accuracy, field=value ...): a log of a finished run of VGG-16 on CIFAR-100."""
    monkeypatch.setattr(full_length, "RESULTS", tmp_path)
    (tmp_path / "some").mkdir()

    def write(accuracy, end="end", **fields):
        config = {
            **default().to_dict(),
            "dataset": "cifar100",
            "model": "vgg",
            "heuristic": "grabo",
        }
        config |= {"subset_ratio": 10.0, **fields}
        header = {"event": "start", "config": config, "devices": {"platform": "cpu"}}
        events = [{"event": "train", "step": 390, "epoch": 1, "seconds": 1800.0}]
        events += [
            {"event": end, "step": 400, "epoch": 200, "test_loss": 1, "test_accuracy": accuracy}
        ]
        path = tmp_path / "some" / f"{len(list(tmp_path.glob('*/*')))}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in [header, *events]))

    return write


def rows(table):
    """The cells of each line."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_seeds_are_averaged_beside_the_papers_number(write):
    """Mean, seeds in order, the paper's 37.17, the distance; no run that is short or not over."""
    write(0.36, seed=1)
    write(0.38, seed=0)
    write(0.9, seed=2, end="eval")
    write(0.9, seed=3, epochs=20)
    name, hours = "GSE (the paper's)", "0.5 (CPU)"
    expected = ["CIFAR-100, VGG-16", name, "98%", "37.00", "0, 1", "37.17", "-0.17", hours]
    assert rows(full_length.table()) == [expected]


def test_what_was_not_set_up_alike_is_not_averaged(write):
    """Another variance of first weights, network, heuristic or |S| has a row of its own."""
    write(0.1)
    write(0.2, init_gain=THIRD)
    write(0.3, init="model")
    write(0.7, init_gain=0.25)
    write(0.4, model="vgg_dropout")
    write(0.5, heuristic="uniform")
    write(0.6, subset_ratio=2.0)
    found = rows(full_length.every())
    assert sorted(row[3] for row in found) == [
        "10.00",
        "20.00",
        "30.00",
        "40.00",
        "50.00",
        "60.00",
        "70.00",
    ]
    assert len({tuple(row[:2]) for row in found}) == 7
    assert ["CIFAR-100, VGG-16, variance 1/3", "20.00"] in [[row[0], row[3]] for row in found]


def test_a_wider_network_stands_beside_table_2(write):
    """At K = |W(1.0)|, whatever that is in percent; never beside Table 1."""
    wide = {"model": "vgg_dropout", "width": 2.0, "sparsity": 0.7482447129139889}
    write(0.68, **wide)
    write(0.69, **{**wide, "width": 1.25})
    write(0.37, model="vgg_dropout")
    shown = {row[1]: row[2:4] + row[5:7] for row in rows(full_length.table())}
    assert shown["GSE (the paper's), width 2"] == ["75%", "68.00", "67.18", "+0.82"]
    assert shown["GSE (the paper's), width 1.25"][2:] == ["–", "–"]
    assert shown["GSE (the paper's)"] == ["98%", "37.00", "37.17", "-0.17"]


def test_the_rounds_of_synflow_are_told_apart(write):
    """The paper does not say how many it had, so that its number stands beside all."""
    for rounds, accuracy in ((None, 0.3), (100, 0.31), (20, 0.33)):
        write(accuracy, method="synflow", synflow_rounds=rounds)
    shown = {row[1]: (row[3], row[5]) for row in rows(full_length.table())}
    assert shown == {"SynFlow": ("30.50", "35.02"), "SynFlow, 20 rounds": ("33.00", "35.02")}


def test_the_likeliest_set_up_stands_for_the_paper(write):
    """With dropout before without, variance 1/3 before 1; a method with one set-up keeps it."""
    write(0.1)
    write(0.9, model="vgg_dropout", init_gain=0.25)
    write(0.2, model="vgg_dropout")
    write(0.3, init_gain=THIRD)
    write(0.4, model="vgg_dropout", init_gain=THIRD)
    write(0.5, method="set")
    write(0.6, method="random", init_gain=THIRD)
    write(0.7, method="random", model="vgg_dropout")
    shown = {row[1]: (row[0], row[3]) for row in rows(full_length.table())}
    assert shown == {
        "GSE (the paper's)": ("CIFAR-100, VGG-16 with dropout, variance 1/3", "40.00"),
        "SET": ("CIFAR-100, VGG-16", "50.00"),
        "Random": ("CIFAR-100, VGG-16 with dropout", "70.00"),
    }
    assert full_length.figure().axes[0].get_legend() is not None
