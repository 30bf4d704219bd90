"""A random number for every connection without an array of them: for ties, chance and times.

Each output unit has 32 random bits, its salt; they and the column are mixed. The number depends on
a key and on the connection alone, never on where or in which order an execution holds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def mix(x: Array) -> Array:
    """Scrambles uint32, one to one (Wellons' lowbias32; `mix` of hashing.h is the same)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def salts(key: Array, l: Array | int, n_out: int) -> Array:
    """The salt of each output of layer l: uint32 (n_out,)."""
    return jax.random.bits(jax.random.fold_in(key, l), (n_out,), jnp.uint32)


def hashed(salt: Array, column: Array) -> Array:
    """The number of each connection, of its output's salt and its column: uint32 (n,)."""
    return mix(salt ^ mix(column.astype(jnp.uint32)))


def hashes_of_layer(key: Array, l: int, columns: int, n_out: int) -> Array:
    """The numbers of all possible connections of layer l: uint32 (columns, n_out)."""
    column = jnp.arange(columns, dtype=jnp.uint32)
    return hashed(salts(key, l, n_out)[None, :], column[:, None])
