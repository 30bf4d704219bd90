"""Quality of the heuristics: slow oracles, laws, and a digits run measured at its command line."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dst import checkpoint, data, train
from dst.candidates import by_dense_gradient, drawing, everything
from dst.heuristics import grabo
from dst.plan import plan
from dst.sample import draw_subset
from dst.update import parallel, split_batch
from experiments import quality, recall
from experiments.cost import configured
from tests import tiny

ONE = jax.local_devices()[:1]
RUN = dict(
    dataset="digits", model="mlp", hidden=[32], epochs=4, rewire_every=10, devices=2, seed=3,
    rewire_end_epoch=3.0, lr_drop_epochs=[2, 3], sparsity=0.9, checkpoint_every=15,
    checkpoints_kept=9,
)  # fmt: skip


# ------------------------------------------------------------------------------------- correlations
def slow_spearman(a, b):
    """Pearson's correlation of how many are smaller, half of the equal ones included."""
    rank = lambda v: np.array([(v < x).sum() + (v == x).sum() / 2 for x in v])  # noqa: E731
    x, y = (r - r.mean() for r in (rank(a), rank(b)))
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 6))
def test_spearman_ranks_ties_at_their_mean(seed, n, values):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(values, size=n) / 7, rng.integers(values + 1, size=n) / 7
    found = recall.spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(slow_spearman(a, b), abs=1e-12)
        assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def marginals(net, seed):
    """Random f and g, some of which are 0."""
    rng = np.random.default_rng(seed)
    draw = lambda n: np.maximum(rng.normal(size=n), 0).astype(np.float32)  # noqa: E731
    return {path: (draw(layer.n_in), draw(layer.n_out)) for path, layer in net.layers.items()}


def test_density_is_the_share_of_draws_times_the_size_of_the_layer():
    net = tiny.setup().net
    for path, (f, g) in marginals(net, 0).items():
        layer = net.layers[path]
        p = np.zeros(layer.shape)
        for at in np.ndindex(*layer.shape):
            places = np.prod(layer.shape[:-2])
            p[at] = f[at[-2]] / f.sum(dtype=float) * g[at[-1]] / g.sum(dtype=float) / places
        np.testing.assert_allclose(recall.density(layer, f, g), layer.size * p.ravel(), rtol=1e-6)


def test_uniform_orders_nothing_and_nothing_possible_is_0():
    parts = tiny.setup()
    fg = quality.HEURISTICS["uniform"](parts.net, tiny.loss)(parts.state, None)
    G = {path: np.arange(layer.size) for path, layer in parts.net.layers.items()}
    free = {path: ~np.asarray(mask).ravel() for path, mask in parts.state.masks.items()}
    assert recall.correlations(parts.net, G, free, fg) == (None, None)
    layer = parts.net.layers["Dense_0"]
    assert not recall.density(layer, np.zeros(layer.n_in), np.ones(layer.n_out)).any()


def test_a_heuristic_that_is_the_gradient_has_correlation_1():
    """Over the network and within layers; where all is active there is no layer to speak of."""
    net = tiny.setup().net
    fg = marginals(net, 1)
    G = {path: recall.density(layer, *fg[path]) for path, layer in net.layers.items()}
    free = {path: np.random.default_rng(0).random(g.size) < 0.7 for path, g in G.items()}
    free["Dense_1"][:] = False
    assert recall.correlations(net, G, free, fg) == pytest.approx((1, 1))
    opposite = {path: -g for path, g in G.items()}
    assert recall.correlations(net, opposite, free, fg) == pytest.approx((-1, -1))
    # One layer rescaled: within the layers nothing changes, over the network it does.
    other = {**G, "Dense_0": 100 + G["Dense_0"]}
    network, layers = recall.correlations(net, other, free, fg)
    assert layers == pytest.approx(1) and network < 0.99


def test_of_one_image_grabo_is_the_gradient_of_a_dense_layer():
    """Eq. 7 is then Eq. 5, places in a convolution's window apart."""
    parts = tiny.setup(images=1, norm=False)

    def body(state, batch):
        S, _, _ = everything(state, batch, {}, None)
        G = by_dense_gradient(parts.net, tiny.loss)(state, batch, S)
        return G, grabo(parts.net, tiny.loss)(state, batch)

    run = parallel(body, (None, 0), ONE)
    G, fg = jax.device_get(run(parts.state, split_batch(parts.batch, ONE)))
    rank = {
        path: recall.spearman(recall.density(layer, *fg[path]), G[path])
        for path, layer in parts.net.layers.items()
    }
    assert rank["Dense_0"] == pytest.approx(1, abs=1e-4)
    assert rank["Dense_1"] == pytest.approx(1, abs=1e-4)
    assert 0.1 < rank["Conv_0"] < 0.99


# --------------------------------------------------------------------------- recall, gradient mass
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_recall_and_mass_equal_a_slow_count(data):
    n = data.draw(st.integers(2, 20))
    bits = st.lists(st.booleans(), min_size=n, max_size=n)
    G = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), np.float32)
    free = np.array(data.draw(bits))
    free[0] = True
    k = data.draw(st.integers(1, int(free.sum())))
    S = np.flatnonzero(np.array(data.draw(bits)) & free)
    best = recall.strongest(G, free, k)
    order = sorted(np.flatnonzero(free), key=lambda i: (-G[i], i))
    assert best.tolist() == order[:k]
    found, mass = recall.caught(G, best, S)
    assert found == len(set(order[:k]) & set(S.tolist())) / k
    total = sum(G[i] for i in order[:k])
    if total == 0:
        assert mass is None
        return
    assert mass == pytest.approx(sum(sorted(G[S], reverse=True)[:k]) / total)
    # Laws: at most RigL's; what was caught counts; more candidates never lose any.
    both = np.intersect1d(best, S)
    assert G[both].sum() / total - 1e-9 <= mass <= 1
    assert mass == 1 or found < 1
    more, more_mass = recall.caught(G, best, np.union1d(S, best[:1]))
    assert more >= found and more_mass >= mass


def test_mass_may_be_less_than_recall():
    G, free = np.array([100, 1, 0.5]), np.ones(3, bool)
    found, mass = recall.caught(G, recall.strongest(G, free, 2), np.array([1]))
    assert (found, mass) == (0.5, pytest.approx(1 / 101))


def drawn(parts, ratio, fg, keys):
    """S of each key, of the plan's first event."""
    draw = jax.jit(drawing(parts.net, parts.method._replace(subset_ratio=ratio)))
    return [quality.subset(parts.net, draw, key, parts.state, fg, 0) for key in keys]


def random_gradients(parts):
    """|G| of all connections, which are inactive, and the |P| largest of these."""
    free = ~np.concatenate([np.asarray(mask).ravel() for mask in parts.state.masks.values()])
    G = np.random.default_rng(4).exponential(size=free.size)
    return G, free, recall.strongest(G, free, int(plan(parts.net, parts.method).grown[0]))


def test_everything_holds_everything():
    """Whatever the heuristic, S that large has the recall and the mass of RigL."""
    parts = tiny.setup()
    G, free, best = random_gradients(parts)
    (S,) = drawn(parts, 1e3, marginals(parts.net, 2), [jax.random.key(0)])
    np.testing.assert_array_equal(np.sort(S), np.flatnonzero(free))
    assert recall.caught(G, best, S) == (1, 1)


def test_uniform_catches_what_chance_does():
    """On average |S_l| / |inactive_l| of each layer, thus about |S| / |inactive|."""
    parts = tiny.setup()
    G, free, best = random_gradients(parts)
    fg = quality.HEURISTICS["uniform"](parts.net, tiny.loss)(parts.state, None)
    keys = [jax.random.fold_in(jax.random.key(0), n) for n in range(100)]
    S = drawn(parts, 4.0, fg, keys)
    found = np.mean([recall.caught(G, best, s)[0] for s in S])
    p, k = len(S[0]) / free.sum(), len(best)
    assert len(S[0]) == 4 * k
    assert abs(found - p) < 5 * np.sqrt(p * (1 - p) / (k * len(S)))


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
    digits = data.load("digits", "", 0)
    n = len(digits.train_labels)
    order = jax.random.permutation(jax.random.fold_in(state.key, 1), jnp.arange(n))
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


draw_jit = jax.jit(draw_subset, static_argnums=(5, 6))


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
