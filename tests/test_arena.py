"""The arena's order, its layout of blocks and its way from flat kernel positions and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dst.connections.arena import BLOCK, PER_ROW, Arena, fill, lay_out, place, positions, rows_of
from dst.errors import ConfigError
from dst.layers import Conv, Dense
from dst.network import Network
from tests.arenas import listed, ordered, parts_of, possible, random_case, slices

examples = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def net_of(*shapes):
    kinds = {2: Dense, 4: Conv}
    layers = {f"l{n}": kinds[len(s)](f"l{n}", s) for n, s in enumerate(shapes)}
    return Network(None, layers, {}, (), {}, "sparse")


def layout(*shapes_and_counts):
    shapes, counts = zip(*shapes_and_counts, strict=True)
    return lay_out(net_of(*shapes), {f"l{n}": count for n, count in enumerate(counts)})


# -------------------------------------------------------------------------------------- the layout
@pytest.mark.parametrize(
    ("shape", "count", "block"),
    [
        ((100, 30), 3000, 100),  # fewer inputs than a block
        ((100, 30), 0, 100),
        ((BLOCK, 30), 1, BLOCK),
        ((BLOCK + 1, 2), 2 * BLOCK + 2, BLOCK),
        ((4 * BLOCK, 10), PER_ROW * 4 * 10, BLOCK),  # 8 a row on average
        ((4 * BLOCK, 10), PER_ROW * 4 * 10 - 1, 2 * BLOCK),
        ((4 * BLOCK, 10), PER_ROW * 10, 4 * BLOCK),
        ((3 * BLOCK, 10), PER_ROW * 10, 3 * BLOCK),  # never more than there are inputs
        ((4 * BLOCK, 10), 0, 4 * BLOCK),
        ((5, 5, 2 * BLOCK, 6), 10_000, 50 * BLOCK),  # a convolution
    ],
)
def test_blocks_are_small_unless_rows_would_be_nearly_empty(shape, count, block):
    (part,) = layout((shape, count))
    assert part.block == block


def test_parts_follow_one_another_without_a_gap():
    parts = layout(((3 * BLOCK + 7, 5), 20_000), ((3, 3, 4, 6), 50), ((10, 1), 0), ((1, 8), 8))
    assert [part.n_in for part in parts] == [3 * BLOCK + 7, 36, 10, 1]
    assert [part.n_out for part in parts] == [5, 6, 1, 8]
    assert [part.blocks for part in parts] == [4, 1, 1, 1]
    assert [part.rows for part in parts] == [20, 6, 1, 8]
    assert [part.first for part in parts] == [0, 20, 26, 27]
    assert [part.end for part in parts] == [20, 26, 27, 35]


def test_what_int32_cannot_count_is_refused_in_a_sentence():
    huge = (2**20, 2**20)
    layout((huge, 2**31 - 1))
    with pytest.raises(
        ConfigError, match=rf"would have {2**31} connections; allowed are 2\^31 - 1"
    ):
        layout((huge, 2**30), (huge, 2**30))
    layout(((1, 2**30), 5), ((1, 2**30 - 1), 5))
    with pytest.raises(ConfigError, match=rf"would have {2**31} output rows; .* fewer units"):
        layout(((1, 2**30), 5), ((1, 2**30), 5))


# ------------------------------------------------------------------------ positions, there and back
@examples
@given(seed=seeds, density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), block=st.integers(1, 10))
def test_connections_are_sorted_distinct_and_come_back_as_they_were(seed, density, block):
    rng = np.random.default_rng(seed)
    parts = parts_of(block=block)
    arena, values, masks, kernels = random_case(rng, round(density * possible(parts)), parts)
    assert arena.column.dtype == arena.pointer.dtype == jnp.int32
    order = listed(arena)
    assert order == ordered(parts, masks) == sorted(set(order))
    own = slices(parts, masks)
    for part, mask, kernel, expected in zip(parts, masks, kernels, own, strict=True):
        here, at = positions(arena, part)
        assert here == expected
        np.testing.assert_array_equal(np.sort(at), np.flatnonzero(mask))
        np.testing.assert_array_equal(values[here], kernel.ravel()[at])
        row, column = place(part, at)
        assert order[here] == list(zip((row + part.first).tolist(), column.tolist(), strict=True))


def test_a_layer_may_have_more_than_2_to_the_32_possible_connections():
    n = 2**20
    corners = np.array([0, n - 1, n * n // 2 + 3, n * n - n, n * n - 1], np.int64)
    weights = np.arange(5.0, dtype=np.float32)
    for count, rows in ((5, n), (PER_ROW * n * 2, 2 * n)):  # one block, two blocks
        parts = layout(((6, 4), 2), ((n, n), count))
        arena, values = fill(parts, iter([(np.array([23, 0]), weights[:2]), (corners, weights)]))
        assert parts[1].rows == rows
        assert arena.pointer.shape == (4 + rows + 1,)
        here, at = positions(arena, parts[1])
        np.testing.assert_array_equal(np.sort(at), corners)
        np.testing.assert_array_equal(values[here], weights[np.searchsorted(corners, at)])
        np.testing.assert_array_equal(arena.counts(), [2, 5])
        assert int(arena.dead_units()[parts[1].layer.path]) == n - 3  # outputs 0, 3 and the last


def test_layers_must_come_in_the_order_of_their_parts_and_all_of_them():
    parts = parts_of(((3, 2), (2, 2)))
    with pytest.raises(ValueError, match="shorter"):
        fill(parts, iter([(np.array([1]), np.ones(1))]))


# --------------------------------------------------------------------------------------- counts
@examples
@given(seed=seeds, connections=st.sampled_from([0, 12, 60, 140]), block=st.sampled_from([3, 9]))
def test_counts_dead_units_and_rows_are_those_of_the_masks(seed, connections, block):
    rng = np.random.default_rng(seed)
    parts = parts_of(block=block)
    case = random_case(rng, connections, parts)
    arena = case.arena
    np.testing.assert_array_equal(arena.counts(), [mask.sum() for mask in case.masks])
    assert arena.counts().dtype == jnp.int32
    order, own = listed(arena), slices(parts, case.masks)
    rows = rows_of(arena.pointer, connections)
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(rows, [row for row, _ in order])
    dead = arena.dead_units()
    for part, mask, here in zip(parts, case.masks, own, strict=True):
        assert int(dead[part.layer.path]) == np.count_nonzero(~mask.any(0))
        pointer = np.asarray(arena.pointer_of(part))
        assert pointer.shape == (part.rows + 1,)
        assert (pointer[0], pointer[-1]) == (here.start, here.stop)


def test_an_arena_is_a_pytree_whose_layout_is_static():
    case = random_case(np.random.default_rng(0), 20)
    leaves, tree = jax.tree.flatten(case.arena)
    assert [leaf.shape for leaf in leaves] == [(20,), (case.arena.parts[-1].end + 1,)]
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, Arena)
    assert again.parts == case.arena.parts
