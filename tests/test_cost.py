"""Costs: the specification's table of memory, and arithmetic against slow counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import dst
from dst.layers import Conv, Dense, Layer
from dst.methods.distributions import first_counts
from dst.methods.table import METHODS
from dst.models import MLP, VGG16, ResNet
from dst.network import Network
from dst.training import cost, log

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def vgg():
    return dst.network(VGG16(100), IMAGE, train=False)


@pytest.fixture(scope="module")
def resnet():
    return dst.network(ResNet(56, 10), IMAGE, train=False)


def network_of(*layers: Layer) -> Network:
    """These layers, of no model."""
    return Network(nn.Module(), {layer.path: layer for layer in layers}, {}, (), {})


# ---------------------------------------------------------------------------------------- memory
# Words per possible weight at densities .10, .05 and .02, to the digits that the paper's argument
# gives. |S| = 10 |P|, |P| = .2 |A|.
PEAKS = {
    "dense": "3 3 3",
    "lottery": "4 4 4",
    "pruning": "3.03 3.03 3.03",
    "random": ".40 .20 .08",
    "snip": "3 3 3",
    "grasp": "4 4 4",
    "grasp_abs": "4 4 4",
    "synflow": "5 5 5",
    "set": ".42 .21 .084",
    "rigl": "1.40 1.20 1.08",
    "gse uniform": ".80 .40 .16",
    "gse grabo": ".80 .40 .16",
    "gse synflow": "1.20 .60 .24",
}


@pytest.mark.parametrize("row", PEAKS)
def test_peak_words_of_the_papers_methods(row, vgg):
    name, _, heuristic = row.partition(" ")
    options = {"heuristic": heuristic} if heuristic else {}
    for sparsity, words in zip((0.9, 0.95, 0.98), PEAKS[row].split(), strict=True):
        digits = len(words.partition(".")[2])
        found = cost.peak_words(dst.method(name, sparsity, **options), vgg)
        assert (round(found, digits) if digits else found) == float(words), sparsity


# Of 100 x 100 possible connections 1,000 exist; the one rewire drops 100 (SNFS: 250).
OTHERS = {
    "dense": 3.0,
    "random": 0.4,
    "set": 0.4 + 0.01,
    "rigl": 0.4 + 1,
    "rigl streamed": 0.4 + 2 * 0.01,
    "gse uniform": 0.4 + 2 * 0.1,
    "gse grabo": 0.4 + 2 * 0.1 + 200 / 10_000,
    "gse graest": 0.4 + 2 * 0.1 + 200 / 10_000,
    "gse synflow": 0.4 + 2 * 0.1 + 0.4,
    "gse_v2 uniform": 0.4 + 2 * 0.1,
    "gse_v2 grabo": 0.4 + 2 * 0.1 + 200 / 10_000,
    "snfs": 0.4 + 2,
    "dsr": 0.4 + 0.01,
    "deepr": 0.4 + 0.01 + 1 / 32,
    "granet": 4 * 0.5 + 1,
    "itop": 0.4 + 1 + 1 / 32,
    "pruning": 3 + 1 / 32,
}


@pytest.mark.parametrize("row", OTHERS)
def test_peak_words_to_the_word(row):
    name, _, option = row.partition(" ")
    field = "growth_memory" if name == "rigl" else "heuristic"
    method = dst.method(name, 0.9, every=1, end=2)
    method = method._replace(**{field: option} if option else {})
    found = cost.peak_words(method, network_of(Dense("a", (100, 100))))
    assert found == pytest.approx(OTHERS[row], rel=1e-12)


def test_the_subset_of_gse_v2_is_gamma_times_the_active():
    method = dst.method("gse_v2", 0.9)._replace(heuristic="uniform", subset_ratio=3.0)
    found = cost.peak_words(method, network_of(Dense("a", (100, 100))))
    assert found == pytest.approx(0.4 + 2 * 3 * 0.1, rel=1e-12)


def test_a_network_denser_than_its_scores_has_its_peak_in_training(vgg):
    assert cost.peak_words(dst.method("snip", 0.1), vgg) == 3 + 1 / 32
    assert cost.peak_words(dst.method("grasp", 0.1), vgg) == 4


def test_graest_has_an_f_for_every_column_of_a_convolution():
    net = network_of(Conv("a", (3, 3, 20, 40)))
    grabo = dst.method("gse", 0.9)
    difference = cost.peak_words(grabo._replace(heuristic="graest"), net) - cost.peak_words(
        grabo, net
    )
    assert difference == pytest.approx((9 * 20 - 20) / (9 * 20 * 40))


# ------------------------------------------------------------------------------------------- uses
def test_vgg16_against_a_count_by_hand(vgg):
    products, side, channels = 0, 32, 3
    for stage in ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 128)):
        for wide in stage:
            products += side * side * 9 * channels * wide
            channels = wide
        side //= 2
    products += 128 * 128 + 128 * 100
    sizes = {path: layer.size for path, layer in vgg.layers.items()}
    assert cost.forward_flops(cost.multiply_adds(vgg), sizes) == 2 * products


def test_resnet56_against_a_count_by_hand(resnet):
    products, side, channels = 32 * 32 * 9 * 3 * 16, 32, 16
    for wide in (16, 32, 64):
        for block in range(9):
            if wide > 16 and block == 0:
                side //= 2
            products += side * side * 9 * (channels * wide + wide * wide)
            channels = wide
    products += 64 * 10
    sizes = {path: layer.size for path, layer in resnet.layers.items()}
    assert cost.forward_flops(cost.multiply_adds(resnet), sizes) == 2 * products
    assert round(products / 1e6, 1) == 125.5  # which everybody reports of it


class Reused(nn.Module):
    """A layer on 7 tokens, then twice on the result; a valid convolution with stride."""

    @nn.compact
    def __call__(self, x, image):
        same = nn.Dense(4, name="same")
        y = nn.Conv(5, (3, 2), strides=(2, 1), padding="VALID", name="conv")(image)
        return same(same(same(x).mean(1))), y


@pytest.mark.parametrize("batch", [1, 6])
def test_calls_of_a_layer_add_up_whatever_the_batch(batch):
    x, image = jnp.zeros((batch, 7, 4)), jnp.zeros((batch, 9, 8, 2))
    uses = cost.multiply_adds(dst.network(Reused(), x, image))
    assert uses == {"same": 7 + 1 + 1, "conv": 4 * 7}


# ------------------------------------------------------------------------------------- arithmetic
USES, POSSIBLE = {"a": 9, "b": 1}, {"a": 40, "b": 200}
FIRST = {"a": 8, "b": 40}
BATCH, STEPS, EXAMPLES = 4, 12, 1000
EVENTS = [
    {"event": "train", "step": 3, "loss": 1.0},
    {"event": "rewire", "step": 3, "active": {"a": 10, "b": 38}, "subset_realised": 60},
    {"event": "rewire", "step": 6, "active": {"a": 7, "b": 41}, "subset_realised": 30},
    {"event": "rewire", "step": 9, "active": {"a": 5, "b": 43}, "subset_realised": 0},
    {"event": "end", "step": 12, "active": {"a": 5, "b": 43}},
]


def method_of(row: str) -> dst.Method:
    """'gse grabo' -> that method."""
    name, _, heuristic = row.partition(" ")
    method = dst.method(name, 0.8)
    return method._replace(heuristic=heuristic) if heuristic else method


def slowly(row: str) -> int:
    """The FLOPs of the run above, step by step and connection by connection."""

    def F(counts):
        return sum(2 for path in USES for _ in range(counts[path]) for _ in range(USES[path]))

    everything, active = F(POSSIBLE), dict(FIRST)
    name, _, heuristic = row.partition(" ")
    total = {
        "snip": 3 * everything * EXAMPLES,
        "grasp": 3 * everything * EXAMPLES + 6 * everything * EXAMPLES,
        "grasp_abs": 3 * everything * EXAMPLES + 6 * everything * EXAMPLES,
        "synflow": 100 * 3 * everything,
    }.get(name, 0)
    rewires = {e["step"]: e for e in EVENTS if e["event"] == "rewire"}
    for step in range(STEPS):
        if event := rewires.get(step):
            if name in ("rigl", "granet", "itop"):
                total += BATCH * (F(active) + F(active) + everything)
            if name in ("gse", "gse_v2"):
                S = event["subset_realised"]
                whole = sum(active.values()) if name == "gse_v2" else 240
                weight = active if name == "gse_v2" else POSSIBLE
                a = round(S * weight["a"] / whole)
                total += BATCH * (2 * F(active) + F({"a": a, "b": S - a}))
                total += {"uniform": 0, "synflow": 1}.get(heuristic, BATCH) * 2 * F(active)
            active = event["active"]
        total += BATCH * (2 * F(active) + (everything if name == "snfs" else F(active)))
    return total


ALL = [
    *(name for name in METHODS if "heuristic" not in METHODS[name].fields),
    *(f"gse {heuristic}" for heuristic in ("uniform", "grabo", "graest", "synflow")),
    "gse_v2 uniform",
    "gse_v2 graest",
]


def spent(row: str, events=EVENTS) -> int:
    """The FLOPs of the run above from its events."""
    rest = (USES, POSSIBLE, FIRST, events, STEPS, BATCH, EXAMPLES)
    return cost.training_flops(method_of(row), *rest)


@pytest.mark.parametrize("row", ALL)
def test_the_integral_over_events_is_the_sum_of_the_steps(row):
    assert spent(row) == slowly(row)


def test_rigl_and_gse_by_hand():
    # F = 2 (9 a + b): 224, 256, 208 and 176 between the rewires, 1120 dense.
    steps = 4 * 3 * 3 * (224 + 256 + 208 + 176)
    assert spent("set") == steps
    assert spent("rigl") == steps + 4 * (2 * (224 + 256 + 208) + 3 * 1120)
    # Of 60 candidates 10 lie in a, of 30 five: 280 and 140 more.
    assert spent("gse grabo") == steps + 4 * (4 * (224 + 256 + 208) + 280 + 140)


def test_a_resumed_log_costs_the_same(tmp_path):
    header = {"config": {"seed": 0}}

    def write(events, step):
        with log.open_log(tmp_path, header, step) as writer:
            for event in events:
                writer.write(**event)

    write(EVENTS[:3], 0)  # killed after step 6; its checkpoint is of step 5
    write(EVENTS[2:], 5)
    write(EVENTS[-1:], 12)  # started again when it was finished
    _, events = log.read(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in cost.changes(events)] == [3, 6, 9]
    assert spent("gse grabo", events) == slowly("gse grabo")


def test_counted_from_the_masks_of_a_real_run():
    t = tiny.setup("gse", heuristic="uniform")
    rewire = dst.make_rewire(t.net, t.tx, t.method, tiny.loss, devices=jax.devices()[:1])
    uses = cost.multiply_adds(t.net)
    assert uses == {"Conv_0": 9, "Dense_0": 1, "Dense_1": 1}
    state, events, total = t.state, [], 0

    def F(masks):
        return sum(2 * uses[path] * int(np.asarray(mask).sum()) for path, mask in masks.items())

    for step in range(8):
        state = state.replace(step=jnp.int32(step))
        if dst.due(t.method, step):
            before = F(state.masks)
            state, report = rewire(state, t.batch)
            report = jax.tree.map(int, report)
            events.append({"event": "rewire", "step": step, **report})
            S, N = report["subset_realised"], t.net.possible
            by_size = sum(2 * uses[p] * S * layer.size / N for p, layer in t.net.layers.items())
            total += 2 * before + by_size
        total += 3 * F(state.masks)
    first = first_counts(t.net, t.method)
    found = cost.run_cost(t.net, t.method, first, events, 8, 16)
    dense = F({path: np.ones(layer.shape) for path, layer in t.net.layers.items()})
    assert len(events) == 3
    # Whole candidates: |S| is split to the unit.
    assert found["training_flops_vs_dense"] == pytest.approx(total / (8 * 3 * dense), rel=1e-3)
    assert found["inference_flops_vs_dense"] == F(state.masks) / dense


# ------------------------------------------------------------------------------------------ report
@pytest.fixture(scope="module")
def mlp():
    return dst.network(MLP((50,), 10), jnp.zeros((1, 20)), train=False)


def reported(net, name, first, events=(), **options):
    return cost.run_cost(net, dst.method(name, 0.9), first, events, 100, 10, **options)


def test_dense_costs_what_dense_costs(mlp):
    full = {path: layer.size for path, layer in mlp.layers.items()}
    assert reported(mlp, "dense", full) == {
        "peak_words_per_weight": 3.0,
        "training_flops_vs_dense": 1.0,
        "inference_flops_vs_dense": 1.0,
    }


def test_a_network_pruned_before_the_first_step_pays_the_scores_and_then_what_is_left(mlp):
    full = {path: layer.size for path, layer in mlp.layers.items()}
    left = {path: n // 10 for path, n in full.items()}
    pruned = [{"event": "prune", "step": 0, "active": left}]
    found = reported(mlp, "grasp", full, pruned, examples=500)
    assert found["training_flops_vs_dense"] == pytest.approx(0.1 + 3 * 500 / (100 * 10))
    assert found["inference_flops_vs_dense"] == pytest.approx(0.1)


def test_all_rounds_of_a_lottery_count(mlp):
    full = {path: layer.size for path, layer in mlp.layers.items()}
    densities = (0.5, 0.2, 0.1)
    rounds = [
        {"event": "round", "step": 25 * i, "active": {p: int(n * d) for p, n in full.items()}}
        for i, d in enumerate(densities, 1)
    ]
    found = reported(mlp, "lottery", full, rounds, rounds=4)
    assert found["training_flops_vs_dense"] == pytest.approx(1 + sum(densities))
    assert found["inference_flops_vs_dense"] == pytest.approx(0.1)
