"""Quality of the heuristics: a digits run measured at its command line, and by hand."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from dst.data import load
from dst.data import pipeline as data
from dst.methods.plan import plan
from dst.training import checkpoint, train
from experiments import quality
from experiments.runs import configured
from tests.test_sample import draw_jit

ONE = jax.local_devices()[:1]
RUN = dict(
    dataset="digits", model="mlp", hidden=[32], epochs=4, rewire_every=10, devices=2, seed=3,
    rewire_end_epoch=3.0, lr_drop_epochs=[2, 3], sparsity=0.9, checkpoint_every=15,
    checkpoints_kept=9,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a digits run with checkpoints at steps 15, 30 (a rewire) and 44 (the end)."""
    folder = tmp_path_factory.mktemp("run")
    train.train(configured(**RUN), folder)
    return folder


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory):
    """What the command line printed, and the rows that it wrote."""
    out, png = (tmp_path_factory.mktemp("out") / name for name in ("rows.jsonl", "plot.png"))
    printed, said = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(quality, "RATIOS", (1, 4, 10))  # each takes seconds to compile
        assert quality.main([str(run), "--out", str(out), "--png", str(png)]) == 0
    assert "1 of 3 checkpoints were saved right after a rewire" in said.getvalue()
    assert matplotlib.image.imread(png).std() > 0
    return printed.getvalue(), [json.loads(line) for line in out.read_text().splitlines()]


def test_a_row_for_every_checkpoint_and_heuristic(run, measured):
    _, rows = measured
    assert [(row["step"], row["heuristic"]) for row in rows] == [
        (step, name) for step in (15, 30, 44) for name in ("uniform", "grabo", "synflow")
    ]
    K = 2368 - round(0.9 * 2368)
    for row in rows:
        event = {15: 10, 30: 20, 44: 20}[row["step"]]  # that of step 30 drops none
        assert row["dropped"] == int(0.1 * (1 + np.cos(np.pi * event / 33)) * K)
        assert (row["seed"], row["method"], row["inactive"]) == (3, "gse", 2368 - K)
        assert row["just_rewired"] == (row["step"] == 30)
        assert row["rewires_follow"] == (row["step"] < 33)
        assert row["epoch"] == row["step"] / 11
        assert row["learning_rate"] == pytest.approx({15: 0.1, 30: 0.01, 44: 0.001}[row["step"]])
        assert row["ratios"] == [1, 4, 10]
        for field in ("recall", "mass"):
            assert all(0 <= value <= 1 for value in row[field])
        asked = np.ceil(np.array(row["ratios"]) * row["dropped"])
        assert (row["subset"] <= asked).all() and row["subset"][0] == asked[0]
    assert {row["git_revision"] for row in rows} == {json.loads(header(run))["git_revision"]}


def header(run):
    return (run / "metrics.jsonl").read_text().splitlines()[0]


@pytest.fixture(scope="module")
def by_hand(run):
    """State of step 15, |G| of both layers, f and g of each heuristic: plain NumPy, float64."""
    config = configured(**RUN)
    built = train.build(config, None)
    with checkpoint.open_manager(run, None) as manager:
        state, _ = checkpoint.restore_step(manager, 15, built.state, config.to_dict())
    digits = load("digits", "", 0)
    n = len(digits.train_labels)
    order = data.epoch_order(state.key, 1, n)
    chosen = np.asarray(order)[4 * 128 : 5 * 128]  # step 15 is the fifth of epoch 1
    x = (digits.train_images[chosen].reshape(128, 64) / 255 - digits.mean[0]) / digits.std[0]
    labels = digits.train_labels[chosen]
    (W, b), (V, c) = (
        (np.asarray(state.params[l]["kernel"], float), np.asarray(state.params[l]["bias"], float))
        for l in ("Dense_0", "Dense_1")
    )
    h = np.maximum(x @ W + b, 0)
    p = np.exp(h @ V + c)
    delta = (p / p.sum(1, keepdims=True) - np.eye(10)[labels]) / 128
    below = delta @ V.T * (h > 0)
    G = {"Dense_0": np.abs(x.T @ below), "Dense_1": np.abs(h.T @ delta)}
    sums = lambda a: np.abs(a).sum(0)  # noqa: E731
    fg = {
        "grabo": {"Dense_0": (sums(x), sums(below)), "Dense_1": (sums(h), sums(delta))},
        # An input of ones through |w|: into layer 1 flow W's column sums, out of layer 0 V's rows.
        "synflow": {
            "Dense_0": (np.ones(64), sums(V.T)),
            "Dense_1": (sums(W), np.ones(10)),
        },
    }
    return built, state, G, fg


@pytest.mark.parametrize("name", ["grabo", "synflow"])
def test_correlations_equal_those_of_a_network_by_hand(name, measured, by_hand):
    built, state, G, fg = by_hand
    row = next(r for r in measured[1] if (r["step"], r["heuristic"]) == (15, name))
    pairs = []
    for path, (f, g) in fg[name].items():
        free = ~np.asarray(state.masks[path])
        share = np.outer(f / f.sum(), g / g.sum()) * built.net.layers[path].size
        pairs.append((share[free], G[path][free]))
    within = [stats.spearmanr(*pair).statistic for pair in pairs]
    whole = stats.spearmanr(*(np.concatenate(side) for side in zip(*pairs, strict=True))).statistic
    assert row["layer_correlation"] == pytest.approx(np.mean(within), abs=2e-3)
    assert row["correlation"] == pytest.approx(whole, abs=2e-3)


def test_recall_and_mass_equal_those_of_draws_by_hand(measured, by_hand):
    """Of uniform, whose draws do not hang on float32's last bits."""
    built, state, G, _ = by_hand
    row = next(r for r in measured[1] if (r["step"], r["heuristic"]) == (15, "uniform"))
    free = [~np.asarray(state.masks[path]).ravel() for path in G]
    flat, k = np.concatenate([g.ravel() for g in G.values()]), row["dropped"]
    order = sorted(np.flatnonzero(np.concatenate(free)), key=lambda i: -flat[i])
    for i, c in enumerate(row["ratios"]):
        sizes = plan(built.net, built.method._replace(subset_ratio=float(c))).subset
        found, mass = [], []
        for n in range(3):
            key = jax.random.fold_in(jax.random.fold_in(state.key, 15), 4)
            key = jax.random.fold_in(key, n)
            S = []
            for l, (path, layer) in enumerate(built.net.layers.items()):
                ones = jnp.ones(layer.n_in), jnp.ones(layer.n_out)
                asked, size = jnp.int32(sizes[0, l]), int(sizes[:, l].max())
                mask, own = state.masks[path], jax.random.fold_in(key, l)
                at, valid = draw_jit(own, *ones, mask, asked, size, 8)
                S += (np.asarray(at)[np.asarray(valid)] + l * 64 * 32).tolist()
            found.append(len(set(S) & set(order[:k])) / k)
            mass.append(sum(sorted(flat[S], reverse=True)[:k]) / flat[order[:k]].sum())
        assert row["recall"][i] == pytest.approx(np.mean(found), abs=1e-6)
        assert row["mass"][i] == pytest.approx(np.mean(mass), rel=1e-4)


def test_the_table_has_means_over_checkpoints(measured):
    printed, rows = measured
    assert printed == quality.table(rows) + "\n"
    head, _, *lines = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    assert [line[0] for line in lines] == ["uniform", "grabo", "synflow"]
    assert lines[0][1:3] == ["–", "–"] and len(head) == 6
    own = [row for row in rows if row["heuristic"] == "grabo"]
    assert lines[1][1] == f"{np.mean([row['correlation'] for row in own]):.3f}"
    means = [np.mean([row[field][-1] for row in own]) for field in ("recall", "mass")]
    assert lines[1][-1] == "{:.3f} ({:.3f})".format(*means)


def test_the_figure_has_a_line_a_heuristic_and_none_for_uniforms_ranks(measured):
    left, right = quality.figure(measured[1]).axes
    assert [line.get_label() for line in left.lines] == ["uniform", "grabo", "synflow"]
    own = [row for row in measured[1] if row["heuristic"] == "synflow"]
    np.testing.assert_allclose(
        left.lines[2].get_ydata(), np.mean([row["recall"] for row in own], 0)
    )
    labels = [line.get_label() for line in right.lines if "," in line.get_label()]
    assert [label.split(",")[0] for label in labels] == ["grabo"] * 2 + ["synflow"] * 2
    assert right.lines[0].get_xdata().tolist() == [15, 30, 44]


def test_a_damaged_checkpoint_is_said_and_left_where_it_is(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "RATIOS", (1,))
    folder = shutil.copytree(run, tmp_path / "run")
    note = folder / "checkpoints" / "15" / "note" / "metadata"
    note.write_text("nonsense")
    assert sorted({row["step"] for row in quality.measure(folder)}) == [30, 44]
    assert "The checkpoint of step 15 is damaged; left out." in capsys.readouterr().err
    assert note.read_text() == "nonsense"


# ---------------------------------------------------------------------------------------- bad input
BAD = [
    (None, "RUN_FOLDER must be the workdir of a run"),
    ("", "RUN_FOLDER must be the workdir of a run"),
    ({"benchmark": "step"}, "RUN_FOLDER must be the workdir of a run"),
    ({"config": {**RUN, "execution": "sparse"}}, "execution must be 'masked'", "not 'sparse'"),
    ({"config": {**RUN, "method": "random"}}, "method must be 'gse' or 'rigl' or 'set'", "random"),
    ({"config": RUN}, "must hold checkpoints; there are none"),
]


@pytest.mark.parametrize(("first", "parts"), [(first, parts) for first, *parts in BAD])
def test_what_cannot_be_measured_is_a_sentence(first, parts, tmp_path, capsys):
    if first is not None:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(first) if first else "")
    before = sorted(tmp_path.rglob("*"))
    assert quality.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("dst: ") and err.count("\n") == 1
    assert all(part in err for part in parts)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_are_refused_before_anything_is_measured(tmp_path, capsys):
    assert quality.main([str(tmp_path), "--out", str(tmp_path / "no" / "a.jsonl")]) == 2
    assert "must be in a folder that exists" in capsys.readouterr().err


def test_a_run_that_never_rewires_is_refused():
    config = configured(**{**RUN, "rewire_every": 33})
    with pytest.raises(quality.ConfigError, match="rewire_every must be below 33"):
        quality.tools(config, train.build(config, None))
