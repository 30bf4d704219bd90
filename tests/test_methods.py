"""A method is a value: the rows of Table 1, and one sentence for every field out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dst
from dst.config import default
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.methods.combinations import check_execution
from dst.methods.settings import FIELDS, OWN, method_of, resolve, unread_fields, unread_message
from dst.methods.table import METHODS, RULES
from dst.training import train

BAD = {
    "initial": [-0.1, 1.0, math.nan, "0.5"],
    "distribution": ["ERK", 2],
    "sparsity_of": [0.5, {"a": 1.0}, [("a", 0.5)], (("a", "b"),)],
    "before": ["SNIP", None],
    "temperature": [0, -1.0, math.inf],
    "iterations": [0, 1.5, True],
    "drop": ["smallest", None],
    "share": ["all", None],
    "growth_memory": ["sparse", None],
    "last_fraction": [-0.1, 1.1],
    "subset_of": ["layer", None],
    "explored": [1, None],
    "keep_counts": [1, None],
    "momentum": [1.0, -0.1, "much"],
    "heuristic": ["nope", ""],
    "score": ["magnitude", None],
    "drop_fraction": [-0.1, 1.1, math.nan],
    "floor": [-0.1, 1.0, math.nan, "0.1"],
    "every": [0, -5, 1.5, np.int64(0), None],
    "end": [0, -1, 10.0],
    "subset_ratio": [0.5, math.inf],
    "rounds": [0, 2.0, True, 1025],
    "sparsity": [98, 1.0, -0.1, None],
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
    assert set(BAD) == set(RULES) == set(Method._fields) - {"name"}


def test_unknown_fields_and_methods():
    hint = r"no field 'rewire_every'; did you mean \"every\"\?; it has .*every"
    with pytest.raises(ConfigError, match=hint):
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
        name="gse", sparsity=0.5, initial=0.25, distribution="erk", gain=1.5,
        drop="magnitude", score="gradient", heuristic="synflow", drop_fraction=0.3, floor=0.1,
        every=11, end=500, subset_ratio=3.0, rounds=4, explored=True,
    )  # fmt: skip
    config.update(
        initial_sparsity=None, keep_counts=True, sparsity_of=(("head", 0.75), ("*", None))
    )
    assert method_of(resolve(config), 100).sparsity_of == (("head", 0.75), ("*", None))
    assert method_of(resolve(config), 100).keep_counts
    config.update(method="synflow", synflow_rounds=7, initial_sparsity=None, sparsity_of=())
    assert method_of(resolve(config), 100).iterations == 7
    config.update(method="rigl", growth_memory="streamed")
    assert method_of(resolve(config), 100).growth_memory == "streamed"
    config.update(method="grasp", initial_sparsity=None)
    assert method_of(resolve(config), 100).temperature == 7.0
    config.update(rewire_end_epoch=0.004)
    with pytest.raises(ConfigError, match=r"^rewire_end_epoch must be at least one step .* 0\.004"):
        method_of(resolve(config), 100)
    assert dst.method("gse").floor == 0.0


@pytest.mark.parametrize("name", [*METHODS])
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


def test_which_rows_ramp_and_which_wait():
    assert {name for name in METHODS if dst.method(name).ramps} == {"pruning", "granet"}
    first = {"lottery", "snip", "grasp", "grasp_abs", "synflow"}
    assert {name for name in METHODS if dst.method(name).waits} == first


REFUSED = [
    # Only what drops the weakest can begin less sparse.
    ("dsr", {"initial": 0.5}, r"initial must be None for method 'dsr', not 0\.5\."),
    ("snip", {"initial": None}, r"initial must be 0\.0 for method 'snip', not None\."),
    ("granet", {"initial": 0.99}, r"initial must be at most 0\.98, .*, not 0\.99\."),
    ("granet", {"drop": "threshold"}, r"drop must be 'magnitude' .* from 0\.5 to 0\.98, not 'thr"),
    ("pruning", {"drop": ""}, "drop must be 'magnitude' for method 'pruning', .*, not ''"),
    # What neither drops nor grows.
    ("pruning", {"initial": None}, "score must not be '' for method 'pruning', "),
    ("set", {"score": ""}, "score must not be '' for method 'set', "),
    ("deepr", {"score": ""}, "score must not be '' for method 'deepr', "),
    ("set", {"drop": ""}, "score must be '' for method 'set', which drops nothing, not 'chance'"),
    ("random", {"score": "chance"}, "score must be '' for method 'random', "),
    ("snip", {"drop": "magnitude"}, "drop must be '' for method 'snip', which prunes before"),
    ("lottery", {"drop": "magnitude"}, "drop must be '' for method 'lottery', "),
    ("lottery", {"before": "snip"}, "before must be '' for method 'lottery', not 'snip'"),
    # S, the dense gradient and sharing.
    ("set", {"heuristic": "grabo"}, "heuristic must be '' for method 'set', .*, not 'grabo'"),
    ("rigl", {"heuristic": "grabo"}, "heuristic must be '' for method 'rigl', "),
    ("gse", {"score": "chance"}, "heuristic must be '' for method 'gse', .*'chance'"),
    ("set", {"score": "gradient"}, "heuristic must be 'uniform', .* for method 'set', .*, not ''"),
    ("gse", {"growth_memory": "streamed"}, "growth_memory must be 'dense' for method 'gse', "),
    ("gse", {"share": "momentum"}, "share must be '' for a method .* not 'momentum'"),
    ("pruning", {"share": "survivors"}, "share must be '' for a method .* not 'survivors'"),
    ("rigl", {"share": "momentum"}, "share must be '' or 'survivors' for method 'rigl', "),
    # What would change nothing.
    ("set", {"subset_ratio": 5.0}, r"subset_ratio must be 10\.0 for method 'set', .*, not 5\.0"),
    ("rigl", {"rounds": 3}, "rounds must be 8 for method 'rigl', which does not read it, not 3"),
    ("rigl", {"subset_of": "active"}, "subset_of must be 'dropped' for method 'rigl', "),
    ("random", {"drop_fraction": 0.5}, "drop_fraction must be 0.2 for method 'random', "),
    ("pruning", {"drop_fraction": 0.5}, "drop_fraction must be 0.2 for method 'pruning', "),
    ("deepr", {"last_fraction": 0.1}, r"last_fraction must be 0\.0 for method 'deepr', "),
    ("snfs", {"floor": 0.1}, r"floor must be 0\.0 for method 'snfs', "),
    ("snip", {"temperature": 1.0}, "temperature must be 200.0 for method 'snip', "),
    ("grasp", {"iterations": 3}, "iterations must be 100 for method 'grasp', "),
    ("random", {"explored": True}, "explored must be False for method 'random', "),
    ("dense", {"distribution": "erk"}, "distribution must be 'uniform' for method 'dense', "),
    ("snip", {"distribution": "erk"}, "distribution must be 'uniform' for method 'snip', "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED, ids=str)
def test_what_would_be_ignored_or_does_not_go_together_is_refused(name, options, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}") as caught:
        dst.method(name, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_what_goes_together():
    """A ramp of any method that drops the weakest, mixtures, the row's own value, a schedule."""
    assert dst.method("gse", initial=0.5).ramps and not dst.method("gse", initial=0.98).ramps
    assert dst.method("dsr", score="gradient", heuristic="grabo", share="").heuristic == "grabo"
    assert dst.method("snfs", drop="magnitude", share="").score == "momentum"
    assert dst.method("set", subset_ratio=10.0, rounds=8) == dst.method("set")
    assert dst.method("dense", every=5, end=50).end == 50
    assert not dst.method("pruning", 0.0).ramps and not dst.method("snip", 0.0).waits


MIXED = [
    ("snfs", {}, "its drop is 'layer magnitude'"),
    ("dsr", {}, "its drop is 'threshold'"),
    ("deepr", {}, "its drop is 'sign'"),
    ("set", {"drop": "sign"}, "its drop is 'sign'"),
    ("set", {"share": "survivors"}, "it shares growth out to the layers by survivors"),
    ("set", {"score": "momentum"}, "it keeps the momentum of every possible connection"),
    ("rigl", {}, "it takes the gradient of .* at once; use growth_memory='streamed' or execution"),
    ("itop", {"growth_memory": "streamed"}, r"it remembers every connection .* \(explored\)"),
    ("gse", {"explored": True}, r"it remembers every connection .* \(explored\)"),
    ("gse", {"initial": 0.5}, "its sparsity grows from 0.5 to 0.98, and there it is constant"),
    ("granet", {"growth_memory": "streamed"}, "its sparsity grows from 0.5 to 0.98"),
    ("pruning", {}, "its sparsity grows from 0.0 to 0.98"),
    ("snip", {}, "it scores every possible connection before training"),
    ("lottery", {}, "it begins with every possible connection"),
]


@pytest.mark.parametrize(("name", "options", "why"), MIXED, ids=str)
def test_what_sparse_execution_cannot_do_is_refused(name, options, why):
    """By what the method does, not by its name; test_every_method has who asks."""
    method = dst.method(name, **options)
    sentence = rf"^method '{name}' cannot run in execution 'sparse', because {why}.*'masked'\.$"
    with pytest.raises(ConfigError, match=sentence):
        check_execution(method, "sparse")
    check_execution(method, "masked")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("dense", "random", "set", "gse", "gse_v2")),
        ("rigl", {"growth_memory": "streamed"}),
        ("gse", {"initial": 0.98, "subset_of": "active"}),
        ("itop", {"growth_memory": "streamed", "explored": False}),
        ("granet", {"sparsity": 0.5, "growth_memory": "streamed"}),
        ("pruning", {"score": "chance", "initial": None}),
    ],
    ids=str,
)
def test_what_sparse_execution_does_is_not(name, options):
    check_execution(dst.method(name, **options), "sparse")


def resolved(**fields):
    config = default()
    config.update(fields)
    return resolve(config)


def test_the_command_line_says_what_a_method_does_not_read():
    """A sweep gives the same flags to many methods, so it is said and not refused."""
    config = resolved(method="set", heuristic="grabo", subset_ratio=3.0, score_batches=1)
    assert unread_message(config) == (
        "Method 'set' does not read heuristic='grabo', score_batches=1, subset_ratio=3.0, which "
        "changes nothing."
    )
    assert method_of(config, 100) == dst.method("set", end=12_000)
    assert unread_message(resolved(method="pruning", drop_fraction=0.5)).count("=") == 1
    assert (
        unread_message(resolved(method="snip", track_explored=True, layer_floor=0.5)).count("=")
        == 2
    )
    for name in METHODS:
        assert unread_message(resolved(method=name, rewire_every=7, rewire_end_epoch=9.0)) is None


def test_a_run_says_it_once(monkeypatch, tmp_path, capsys):
    """Lottery's rounds do not repeat it."""
    monkeypatch.setattr(train, "run_once", lambda *args: (None, None, False))
    for fields in (
        {"method": "set", "sampling_rounds": 1},
        {"method": "lottery", "layer_floor": 0.1},
    ):
        train.train(resolved(**fields), tmp_path)
        assert capsys.readouterr().err.count(f"Method {fields['method']!r} does not read ") == 1
    train.train(resolved(method="set"), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [*METHODS])
def test_what_is_said_not_to_be_read_is_what_the_library_refuses(name):
    """For every field of every row; the others pass, or do not go together."""
    other = {
        "initial": 0.5, "distribution": "erk", "temperature": 3.0, "heuristic": "graest",
        "drop_fraction": 0.3, "subset_ratio": 3.0, "rounds": 3, "gain": 3.0,
        "growth_memory": "streamed", "floor": 0.01, "explored": True,
        "sparsity_of": (("*", 0.5),), "keep_counts": True, "iterations": 3,
    }  # fmt: skip
    unread = unread_fields(resolved(method=name))
    for field, option in FIELDS.items():
        try:
            dst.method(name, **{option: other[option]})
        except ConfigError:
            assert field in unread or option == "initial", field
        else:
            assert field not in unread or other[option] == getattr(dst.method(name), option), field
