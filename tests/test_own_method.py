"""A method of a user's own, from the page of its room: its drop, growth, heuristic and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst
import dst.methods
from dst.errors import ConfigError
from dst.main import main
from dst.methods import (
    BEFORE,
    DISTRIBUTIONS,
    DROPS,
    GROWTHS,
    HEURISTICS,
    MEMORIES,
    METHODS,
    SHARES,
    Distribution,
    Drop,
    Growth,
    Memory,
    Row,
    by_magnitude,
    on_subset,
)
from dst.training.log import read
from tests import tiny
from tests.executions import ONE, dense, structure
from tests.pages import code


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test registers is gone after it."""
    every = (BEFORE, DISTRIBUTIONS, DROPS, GROWTHS, HEURISTICS, MEMORIES, METHODS, SHARES)
    for names in every:
        monkeypatch.setattr(names, "_rows", dict(names._rows))
        monkeypatch.setattr(names, "_files", dict(names._files))


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_the_method_of_the_page_trains_in_both_executions(tmp_path, execution):
    """Nothing of the package was changed; its log, choices and cost know it."""
    path = tmp_path / "ours.py"
    path.write_text(code(dst.methods))
    flags = [f"--config={path}", f"--workdir={tmp_path / 'run'}", f"--config.execution={execution}"]
    assert main(["dst", *flags]) == 0
    header, events = read(tmp_path / "run" / "metrics.jsonl")
    assert header["config"]["method"] == "ours"
    rewires = [event for event in events if event["event"] == "rewire"]
    assert len(rewires) > 2 and all(event["grown"] > 0 for event in rewires)
    assert events[-1]["test_accuracy"] > 0.5
    assert 0 < events[-1]["cost"]["peak_words_per_weight"] < 1


def rewired(execution, **options):
    """The tiny network before and after a rewire: masks and kernels, in NumPy."""
    s = tiny.setup("mine", execution=execution, **options)
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    state, report = rewire(s.state.replace(step=jnp.int32(2)), s.batch)
    assert int(report["grown"]) == int(report["pruned"]) > 20
    return structure(s.state), structure(state), dense(s.state)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_the_users_functions_choose(execution):
    """The strongest go, by a strength that falls with |w|; growth is in the convolution alone."""

    def only_convolutions(layer, G):
        return jnp.abs(G) if layer.convolves else jnp.zeros_like(G)

    def source(net, method, planned, loss):
        return on_subset(net, method, planned, loss, score=only_convolutions)

    DROPS.register("strongest", Drop(by_magnitude, strength=lambda view: 1 / (1 + view.w**2)))
    GROWTHS.register("convolutions", Growth(source, draws=True, gradient="subset"))
    fields = {"drop": "strongest", "score": "convolutions", "heuristic": "uniform"}
    METHODS.register("mine", Row("Mine", fields=fields))
    before, after, w = rewired(execution, subset_ratio=100.0)
    gone, stayed = (
        np.concatenate([np.abs(w[p][before[p] & (keep == after[p])]) for p in before])
        for keep in (False, True)
    )
    assert gone.min() >= stayed.max()
    grown = {path: int((after[path] & ~mask).sum()) for path, mask in before.items()}
    inactive = int((~before["Conv_0"]).sum())
    assert grown["Conv_0"] == min(inactive, sum(grown.values()))


def test_a_memory_of_ones_own_is_kept_and_reported():
    """How often a rewire has happened; of every possible connection it would be refused."""
    count = Memory(
        lambda method, A, kernels, key: jnp.int32(0),
        rewire=lambda own, A, dropped, target: own["rewires"] + 1,
        report=lambda rewires: rewires,
    )
    MEMORIES.register("rewires", count)
    DROPS.register("counted", Drop(by_magnitude, memory=("rewires",)))
    METHODS.register("mine", Row("Mine", fields={"drop": "counted", "score": "chance"}))
    for execution in ("masked", "sparse"):
        s = tiny.setup("mine", execution=execution)
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
        state, report = rewire(s.state, s.batch)
        state, report = rewire(state, s.batch)
        assert int(report["rewires"]) == int(state.method["rewires"]) == 2
    MEMORIES.register("rewires", count._replace(needs="it counts every possible connection"))
    with pytest.raises(ConfigError, match=r"in execution 'sparse', because it counts every poss"):
        tiny.setup("mine", execution="sparse")


def test_a_distribution_of_ones_own():
    """Density in proportion to the outputs."""
    DISTRIBUTIONS.register(
        "outputs", Distribution(lambda shapes: {path: 1.0 * s[-1] for path, s in shapes.items()})
    )
    s = tiny.setup("random", distribution="outputs")
    density = {p: float(np.mean(np.asarray(mask))) for p, mask in s.state.masks.items()}
    assert density["Dense_0"] / density["Dense_1"] == pytest.approx(20 / 5, rel=0.1)
    assert sum(tiny.active(s.state).values()) == 258


@pytest.mark.parametrize(
    ("register", "sentence"),
    [
        (
            lambda: METHODS.register("gse", Row("Mine")),
            "method 'gse' exists already, in dst",
        ),
        (
            lambda: METHODS.register("mine", {"drop": "sign"}),
            "method 'mine' must be registered",
        ),
        (
            lambda: METHODS.register("mine", Row("Mine", fields={"dorp": "magnitude"})),
            "method 'mine' has no field 'dorp'; a row may have before, ",
        ),
        (lambda: DROPS.register("a b", Drop(by_magnitude)), "the name of a drop rule must be"),
    ],
)
def test_mistakes_are_told_in_a_sentence(register, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        register()


def test_a_row_of_unknown_parts_is_refused_where_it_is_asked_for():
    METHODS.register("mine", Row("Mine", fields={"drop": "nope", "score": "chance"}))
    with pytest.raises(ConfigError, match=r"^drop must be '', 'magnitude', .* not 'nope'\.$"):
        dst.method("mine")
    with pytest.raises(ConfigError, match=r"^method must be .*'itop' or 'mine', not 'yours'\.$"):
        dst.method("yours")


def test_a_rule_that_plans_nothing_is_refused_in_sparse_execution():
    def half(net, method):
        def may_drop(view, event, wanted):
            weak = view.A.exists & (jnp.abs(view.w) < jnp.median(jnp.abs(view.w)))
            return weak, weak.sum(dtype=jnp.int32)

        return may_drop

    DROPS.register("half", Drop(half, planned=False))
    METHODS.register("mine", Row("Mine", fields={"drop": "half", "score": "chance"}))
    with pytest.raises(ConfigError, match="its drop is 'half', which does not say beforehand"):
        tiny.setup("mine", execution="sparse")
    s = tiny.setup("mine", sparsity=0.3)
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    _, report = rewire(s.state, jax.tree.map(np.asarray, s.batch))
    assert int(report["grown"]) == int(report["pruned"]) > 100


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_heuristic_may_hold_units_and_want_their_sums(execution):
    """GraBo of what is held: no layer is both held and summed."""
    HEURISTICS.register("both", HEURISTICS["grabo"]._replace(holds=True))
    fields = {"drop": "magnitude", "score": "gradient", "heuristic": "both"}
    METHODS.register("mine", Row("Mine", fields=fields))
    before, after, _ = rewired(execution)
    assert any((before[path] != after[path]).any() for path in before)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_negative_score_moves_nothing_and_is_reported(execution):
    """It would mean that there is no candidate."""

    def source(net, method, planned, loss):
        return on_subset(net, method, planned, loss, score=lambda layer, G: G)

    GROWTHS.register("signed", Growth(source, draws=True, gradient="subset"))
    fields = {"drop": "magnitude", "score": "signed", "heuristic": "uniform"}
    METHODS.register("mine", Row("Mine", fields=fields))
    s = tiny.setup("mine", execution=execution)
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    _, report = rewire(s.state.replace(step=jnp.int32(2)), s.batch)
    assert not bool(report["finite"]) and int(report["grown"]) == int(report["pruned"]) == 0


def test_a_negative_strength_is_less_than_any_other():
    """The largest |w| go first."""
    DROPS.register("largest", Drop(by_magnitude, strength=lambda view: -view.strength))
    fields = {"drop": "largest", "score": "gradient", "heuristic": "uniform"}
    METHODS.register("mine", Row("Mine", fields=fields))
    before, after, w = rewired("masked")
    gone, stayed = (
        np.concatenate([np.abs(w[p][before[p] & (keep == after[p])]) for p in before])
        for keep in (False, True)
    )
    assert gone.min() >= stayed.max()
