"""Both executions of a tiny run, seen alike."""

import jax
import numpy as np
import optax

from dst.connections.arena import positions
from dst.connections.masks import Masks
from tests import tiny

# A large eps: where a gradient nearly vanishes, Adam would show its last bits.
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3, weight_decay=0.1))
ONE = jax.local_devices()[:1]


def dense(state, leaf=None) -> dict[str, np.ndarray]:
    """{path: kernel}, or a (K,) leaf in the kernels' shapes, of either execution."""
    if isinstance(state.masks, Masks):
        return tiny.kernels(state.params if leaf is None else leaf, state)
    values = np.asarray(state.params["arena"]["kernel"] if leaf is None else leaf)
    found = {}
    for part in state.masks.parts:
        here, where = positions(state.masks, part)
        kernel = np.zeros(part.layer.size, values.dtype)
        kernel[where] = values[here]
        found[part.layer.path] = kernel.reshape(part.layer.shape)
    return found


def structure(state) -> dict[str, np.ndarray]:
    """{path: mask} of either execution."""
    if isinstance(state.masks, Masks):
        return {path: np.asarray(mask) for path, mask in state.masks.items()}
    ones = np.ones(state.masks.column.size, bool)
    return dense(state, ones)


def check_arena(state, K):
    """K connections, sorted, none twice, pointers that fit."""
    arena = state.masks
    pointer, column = np.asarray(arena.pointer, np.int64), np.asarray(arena.column, np.int64)
    assert pointer[0] == 0 and pointer[-1] == column.size == K and (np.diff(pointer) >= 0).all()
    row = np.repeat(np.arange(pointer.size - 1), np.diff(pointer))
    assert (np.diff(row * 2**32 + column) > 0).all()
    for part in arena.parts:
        mine = slice(pointer[part.first], pointer[part.end])
        block = (row[mine] - part.first) // part.n_out
        assert (column[mine] // part.block == block).all() and (column[mine] < part.n_in).all()


def close(a, b, rtol=2e-5):
    """Equal as far as float32 sums in another order are."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def both(name="gse", tx=tiny.SGD, **options):
    """The same run in both executions."""
    return [tiny.setup(name, tx=tx, execution=e, **options) for e in ("masked", "sparse")]


def precisions(program) -> list:
    """The precision of every product in a jaxpr, those within it included."""
    found = []
    for equation in getattr(program, "jaxpr", program).eqns:
        found += [equation.params["precision"]] if "precision" in equation.params else []
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr"),
        )
        for value in inner:
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                found += precisions(value)
    return found
