"""A method is a value: the rows of Table 1, and one sentence for every field out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dst
from dst.config import METHODS, RAMPS, ConfigError, default
from dst.methods import OWN, ROWS, RULES, Method, resolve
from dst.steps import method_of

BAD = {
    "initial": [-0.1, 1.0, math.nan, "0.5"],
    "distribution": ["ERK", 2],
    "before": ["SNIP", None],
    "temperature": [0, -1.0, math.inf],
    "iterations": [0, 1.5, True],
    "drop": ["smallest", None],
    "share": ["all", None],
    "growth_memory": ["sparse", None],
    "last_fraction": [-0.1, 1.1],
    "subset_of": ["layer", None],
    "explored": [1, None],
    "momentum": [1.0, -0.1, "much"],
    "heuristic": ["nope", ""],
    "score": ["magnitude", None],
    "drop_fraction": [-0.1, 1.1, math.nan],
    "floor": [-0.1, 1.0, math.nan, "0.1"],
    "every": [0, -5, 1.5, np.int64(0), None],
    "end": [0, -1, 10.0],
    "subset_ratio": [0.5, math.inf],
    "rounds": [0, 2.0, True],
    "gain": [0, -1.0, math.nan, math.inf, "2"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_told_by_the_name_it_was_given(field, value):
    with pytest.raises(ConfigError) as caught:
        dst.method("gse", **{field: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"{field} must be ") and sentence.endswith(".")
    assert "\n" not in sentence


def test_every_option_has_a_rule_and_bad_values():
    assert set(BAD) == set(RULES) == set(Method._fields) - {"name", "sparsity"}


def test_unknown_fields_and_methods():
    with pytest.raises(ConfigError, match=r"no field 'rewire_every'; it has .*every"):
        dst.method("gse", rewire_every=10)
    with pytest.raises(ConfigError, match="method must be 'dense', "):
        dst.method("SNIP")
    with pytest.raises(ConfigError, match="sparsity must be a number in"):
        dst.method("gse", 1.0)


def test_a_method_holds_plain_numbers():
    rule = dst.method("gse", every=np.int64(7), end=np.int32(20), drop_fraction=np.float64(0.5))
    assert [type(value) for value in (rule.every, rule.end, rule.drop_fraction)] == [
        int,
        int,
        float,
    ]
    assert rule == dst.method("gse", every=7, end=20, drop_fraction=0.5)


def test_the_configuration_gives_every_field():
    """A field that `method_of` forgot would keep its default."""
    config = default()
    config.update(
        heuristic="synflow", sparsity=0.5, distribution="erk", drop_fraction=0.3, layer_floor=0.1,
        rewire_every=11, rewire_end_epoch=5.0, subset_ratio=3.0, sampling_rounds=4,
        track_explored=True, grasp_temperature=7.0, initial_sparsity=0.25,
        init_gain=1.5,
    )  # fmt: skip
    assert method_of(resolve(config), 100) == Method(
        name="gse", sparsity=0.5, initial=0.25, distribution="erk", gain=1.5, temperature=7.0,
        drop="magnitude", score="gradient", heuristic="synflow", drop_fraction=0.3, floor=0.1,
        every=11, end=500, subset_ratio=3.0, rounds=4, explored=True,
    )  # fmt: skip
    config.update(method="rigl", growth_memory="streamed", initial_sparsity=0.25)
    assert method_of(resolve(config), 100).growth_memory == "streamed"
    assert dst.method("gse").floor == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_a_field_left_alone_has_the_methods_own_value(name):
    """The command line and the library give the same row, ITOP's longer schedule apart."""
    config = default()
    config.method = name
    resolved = resolve(config)
    assert None not in [resolved[field] for field in OWN if field != "initial_sparsity"]
    end = resolved.epochs if name == "itop" else 120
    expected = dst.method(name, end=390 * end)
    assert method_of(resolved, 390) == expected
    assert resolved.is_locked and config.sparsity == 0.98
    same = {field: value for field, value in config.to_dict().items() if value is not None}
    if name == "dense":
        assert resolved.sparsity == 0.0
        same["sparsity"] = 0.0
    assert {field: resolved[field] for field in same} == same


def test_the_rows_are_those_that_the_configuration_allows():
    assert tuple(ROWS) == METHODS
    assert {name for name in ROWS if dst.method(name).ramps} == set(RAMPS)


def test_what_does_not_go_together():
    """Only what drops the weakest can begin less sparse; sharing needs every candidate."""
    with pytest.raises(ConfigError, match=r"^initial must be None for method 'dsr', not 0\.5\.$"):
        dst.method("dsr", initial=0.5)
    with pytest.raises(ConfigError, match=r"^initial must be at most 0\.9, .*, not 0\.95\.$"):
        dst.method("granet", 0.9, initial=0.95)
    with pytest.raises(ConfigError, match=r"^growth_memory must be 'dense' for method 'gse', "):
        dst.method("gse", growth_memory="streamed")
    with pytest.raises(ConfigError, match=r"^share must be '' for a method .* not 'momentum'\.$"):
        dst.method("gse", share="momentum")
    assert dst.method("gse", initial=0.5).ramps and not dst.method("gse", initial=0.98).ramps
