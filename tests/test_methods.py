"""A method is a value: the rows of Table 1, and one sentence for every field out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dst
from dst.config import ConfigError, default
from dst.methods import RULES, Method
from dst.steps import method_of

BAD = {
    "distribution": ["ERK", None],
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
        dst.method("snip")
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
        rewire_every=11, rewire_end_epoch=5, subset_ratio=3.0, sampling_rounds=4,
    )  # fmt: skip
    assert method_of(config, 100) == Method(
        name="gse", sparsity=0.5, distribution="erk", heuristic="synflow", score="gradient",
        drop_fraction=0.3, floor=0.1, every=11, end=500, subset_ratio=3.0, rounds=4, gain=2.0,
    )  # fmt: skip
    assert dst.method("gse").floor == 0.0
