"""Layers with a sparsity of their own: exact counts, exact totals; those with None never move."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dst
from dst import main
from dst.methods.distributions import DISTRIBUTIONS, active_count, layer_counts
from dst.methods.plan import plan
from tests import tiny
from tests.executions import ONE, both, structure

SIZES = {"Conv_0": 108, "Dense_0": 1080, "Dense_1": 100}
GLOBS = st.sampled_from(["*", "b/*", "b/c", "a", "?", "*c"])
OWN = st.lists(st.tuples(GLOBS, st.none() | st.floats(0, 0.99)), max_size=3)


@given(st.lists(st.integers(1, 30), min_size=8, max_size=8), st.floats(0, 0.99), OWN, st.data())
def test_counts_are_exact(sides, sparsity, own, data):
    """K in all; a layer's own where a glob matches it first; what cannot be is refused."""
    shapes = dict(
        zip(["a", "b/c", "b/d", "e"], zip(sides[::2], sides[1::2], strict=True), strict=True)
    )
    distribution = data.draw(st.sampled_from([*DISTRIBUTIONS]))
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    K = active_count(sum(size.values()), sparsity)
    expected = {}
    for path in shapes:
        for s in [s for glob, s in own if fnmatchcase(path, glob)][:1]:
            expected[path] = size[path] if s is None else size[path] - round(s * size[path])
    left = K - sum(expected.values())
    if expected and not 0 <= left <= sum(n for path, n in size.items() if path not in expected):
        with pytest.raises(dst.ConfigError, match=f"leaves {left} of the {K} at"):
            layer_counts(shapes, sparsity, distribution, own)
        return
    counts = layer_counts(shapes, sparsity, distribution, own)
    assert sum(counts.values()) == K and [*counts] == [*shapes]
    assert counts == {**counts, **expected}
    assert all(0 <= n <= size[path] for path, n in counts.items())
    if not expected:
        assert counts == layer_counts(shapes, sparsity, distribution)


def test_the_others_share_what_is_left_as_if_they_were_alone():
    """ER of two layers is that of the two, whatever the third has."""
    shapes = {"a": (40, 10), "b": (10, 10), "c": (50, 20)}
    counts = layer_counts(shapes, 0.8, "er", (("c", 0.9),))
    assert counts == {"a": 143, "b": 57, "c": 100}  # 50 : 20 of 200


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("set", {}),
        ("gse", {}),
        ("rigl", {"growth_memory": "streamed"}),
    ],
    ids=str,
)
def test_what_is_none_never_moves(name, options):
    """Nor counts for how many move or are sampled; the other layers move, alike in both."""
    own = {"*_1": None, "Conv*": 0.5}
    masks = []
    for s in both(name, sparsity=0.7, drop_fraction=0.9, sparsity_of=own, **options):
        before = structure(s.state)
        K = active_count(1288, 0.7)
        counts = {path: int(mask.sum()) for path, mask in before.items()}
        assert counts == {"Conv_0": 54, "Dense_0": K - 154, "Dense_1": 100}
        planned = plan(s.net, s.method)
        assert planned.grown.max() <= 0.9 * (K - 100) and not planned.subset[:, 2].any()
        rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
        # The weights of the layer that stays are the weakest of all.
        state, report = rewire(weakened(s.state), s.batch)
        masks.append(structure(state))
        assert masks[-1]["Dense_1"].all() and int(report["grown"]) > 20
        assert (masks[-1]["Dense_0"] != before["Dense_0"]).any()
    for path, mask in masks[0].items():
        np.testing.assert_array_equal(mask, masks[1][path])


def weakened(state):
    """`state` at step 2, with the weights of all layers 1e-6 times as large."""
    params = jax.tree.map(lambda w: w * 1e-6, state.params)
    return state.replace(step=jnp.int32(2), params=params)


@pytest.mark.parametrize("name", ["dsr", "deepr", "snfs"])
def test_rules_that_know_themselves_how_many_go_leave_it_alone(name):
    """Of a threshold above all weights, or of signs that are all wrong, too."""
    s = tiny.setup(name, sparsity=0.7, sparsity_of={"Dense_1": None})
    state = weakened(s.state)
    if name == "deepr":
        state = state.replace(params=jax.tree.map(jnp.negative, state.params))
    rewire = dst.make_rewire(s.net, s.tx, s.method, tiny.loss, devices=ONE)
    state, report = rewire(state, s.batch)
    assert np.asarray(state.masks["Dense_1"]).all() and int(report["pruned"]) > 20
    assert sum(tiny.active(state).values()) == active_count(1288, 0.7)
    if name != "snfs":
        assert int(report["pruned"]) == active_count(1288, 0.7) - 100


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (
            {"head": None},
            "sparsity_of has 'head', which is no layer's path; the layers are 'Conv_0', ",
        ),
        (
            {"Dense_0": 0.5},
            "sparsity_of gives 540 connections to layers of its own, which leaves -282 of the 258",
        ),
        (
            {"*": 0.9},
            "which leaves 129 of the 258 at sparsity 0.8 to the 0 other layers; they can h",
        ),
    ],
)
def test_what_cannot_be_is_told_with_the_numbers(own, sentence):
    with pytest.raises(dst.ConfigError) as caught:
        tiny.setup(sparsity_of=own)
    assert sentence in str(caught.value) and str(caught.value).endswith(".")


def test_it_is_a_value_and_may_be_on_the_command_line(tmp_path):
    method = dst.method("gse", sparsity_of={"a": np.float32(0.5), "b": None})
    assert hash(method) == hash(dst.method("gse", sparsity_of=(("a", 0.5), ("b", None))))
    for name in ("snip", "granet", "pruning", "lottery", "dense"):
        with pytest.raises(
            dst.ConfigError, match=r"^sparsity_of must be \(\) for method .* not read"
        ):
            dst.method(name, sparsity_of={"a": 0.5})
    with pytest.raises(
        dst.ConfigError, match=r"^sparsity_of must be pairs .* not \(\('a', 1.5\),\)"
    ):
        dst.method("gse", sparsity_of={"a": 1.5})
    argv = ["dst", "--config=configs/digits_mlp.py", f"--workdir={tmp_path}"]
    pairs = "(('Dense_?', 0.5), ('head', None))"
    config, _, _ = main.parse([*argv, f"--config.sparsity_of={pairs}"])
    assert config.to_dict()["sparsity_of"] == (("Dense_?", 0.5), ("head", None))
