"""C++ kernels for the products of a sparse layer and the rewire's merges, on CPUs; optional.

They are compiled when dst is installed (`native/`) and called through XLA's typed FFI. Where there
are none, `why_not` says so in a sentence, and `dst.connections.products` has the same in pure JAX.

A layer's connections are `values` f32 (K,) and `column` int32 (K,) of the arena, and its slice
`pointer` int32 (blocks n_out + 1,) of offsets into them: virtual row b n_out + o holds those of
output o from the inputs of block b. Activations are feature-major float32, (units, B).

A convolution's maps are (N, H, W, C), in memory (H, W, C, N): XLA is asked for that layout, and
computes elementwise operations between two convolutions in it without a copy. Volumes are maps of
all slices that a kernel reads (`Layer.slices`). What the kernels do between two convolutions is in
`maps.py`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst.connections.backends.native.library import interface, library, source_hash
from dst.layers.base import Layer

Array = jax.Array

HANDLERS = {
    "dst_multiply": "DstMultiply",
    "dst_backward": "DstBackward",
    "dst_gradient_on": "DstGradientOn",
    "dst_convolve": "DstConvolve",
    "dst_convolve_backward": "DstConvolveBackward",
    "dst_convolve_gradient_on": "DstConvolveGradientOn",
    "dst_channel_sums": "DstChannelSums",
    "dst_pool": "DstPool",
    "dst_pool_backward": "DstPoolBackward",
    "dst_join": "DstJoin",
    "dst_join_backward": "DstJoinBackward",
    "dst_magnitudes": "DstMagnitudes",
    "dst_after": "DstAfter",
    "dst_best": "DstBest",
    "dst_lowest": "DstLowest",
    "dst_exchange": "DstExchange",
    "dst_move": "DstMove",
    "dst_arrivals": "DstArrivals",
    "dst_exists": "DstExists",
}
MOST_TAPS = 32  # along one side of a convolution's kernel
MAP = (1, 2, 3, 0)  # (N, H, W, C) with the batch innermost in memory
THREADS = 0  # those of XLA's pool, if the work is worth it; tests ask for a number


# ----------------------------------------------------------------------------------- the library
def available() -> bool:
    """Whether the kernels were built for this machine and can be used."""
    return not why_not()


@functools.cache
def why_not() -> str:
    """Why the kernels cannot be used, in one sentence; "" when they can."""
    if os.environ.get("DST_KERNELS") == "0":
        return "the compiled kernels are turned off by DST_KERNELS=0"
    return _register(library())


def _register(path: Path) -> str:
    """Loads the library and makes XLA know its kernels: "" or why not."""
    if not path.exists():
        return "dst was installed without compiled kernels, for want of a working C++ compiler"
    try:
        loaded = ctypes.CDLL(str(path))
        if _text(loaded.dst_sources) != source_hash():
            return "the compiled kernels are older than their sources; reinstall dst"
        # XLA would notice only when it starts, and then not start.
        if _text(loaded.dst_interface) != interface():
            return "the compiled kernels were built for another jaxlib; reinstall dst"
        found = {name: jax.ffi.pycapsule(loaded[symbol]) for name, symbol in HANDLERS.items()}
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load ({error}); reinstall dst"
    for name, capsule in found.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return ""


def _text(function) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()


# ---------------------------------------------------------------------------------- the products
def multiply(values: Array, column: Array, pointer: Array, x: Array, n_out: int) -> Array:
    """y = W x: x (n_in, B) -> (n_out, B)."""
    y = jax.ShapeDtypeStruct((n_out, x.shape[1]), jnp.float32)
    call = kernel("dst_multiply", y)
    return call(values, column, pointer, x, threads=np.int64(THREADS))


def backward(
    values: Array, column: Array, pointer: Array, x: Array, delta: Array, gradient: Array
) -> tuple[Array, Array]:
    """dx = W^T delta, and dL/dw = x . delta added to the layer's range of `gradient`.

    Shapes: x (n_in, B), delta (n_out, B), gradient (K,) -> dx (n_in, B), gradient (K,), in place
    if XLA can give it away. A gradient of no entries is not computed.
    """
    results = (like(x), like(gradient))
    call = kernel("dst_backward", results, input_output_aliases={5: 1})
    dx, gradient = call(values, column, pointer, x, delta, gradient, threads=np.int64(THREADS))
    return dx, gradient


def gradient_on(i: Array, o: Array, x: Array, delta: Array) -> Array:
    """dL/dw on pairs (input i, output o), both int32 (n,): float32 (n,); 0 where one is negative.

    Shapes: x (n_in, B), delta (n_out, B).
    """
    call = kernel("dst_gradient_on", jax.ShapeDtypeStruct(i.shape, jnp.float32))
    return call(i, o, x, delta, threads=np.int64(THREADS))


# -------------------------------------------------------------------------------- the convolutions
class Read(NamedTuple):
    """A map (N, H, W, C) as a kernel reads it: itself, or what it computes on the way.

    An activation x is relu(k[0] x + k[1]), k (2, C): what batch normalisation and ReLU make of x.
    A gradient is k[0] delta + k[1] y + k[2], k (3, C), y `other`: delta through a batch norm.
    """

    map: Array
    k: Array | None = None
    other: Array | None = None


def convolve(
    values: Array, column: Array, pointer: Array, x: Read, layer: Layer, moments: bool = False
) -> tuple[Array, Array]:
    """y = W * x, and mean and variance of each of its channels if `moments`, else nothing.

    Shapes: x (N, H, W, C), pointer (n_out + 1,) -> (N, H', W', n_out), (2, n_out) or (0,).
    """
    n = x.map.shape[0]
    rows, columns = layer.output_sides(x.map.shape[1:3])
    shapes = (n, rows, columns, layer.n_out), (2, layer.n_out) if moments else (0,)
    call = kernel(
        "dst_convolve",
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        input_layouts=[None, None, None, MAP, None],
        output_layouts=[MAP, None],
    )
    y, found = call(values, column, pointer, *as_activation(x), **_taps(layer, x.map))
    return y, found


def convolve_backward(
    values: Array,
    column: Array,
    pointer: Array,
    x: Read,
    delta: Read,
    gradient: Array,
    layer: Layer,
) -> tuple[Array, Array, Array]:
    """dx, and dL/dw added to the layer's range of `gradient`, in place if XLA can give it away.

    If x is an activation, dx is du, the gradient of what its ReLU reads, and sums are those of du
    and du x of each channel: (2, C), else (0,). A gradient of no entries is not computed.
    Shapes: x (N, H, W, C), delta (N, H', W', n_out), gradient (K,) -> dx as x, gradient, sums.
    """
    sums = jax.ShapeDtypeStruct((0,) if x.k is None else (2, x.map.shape[3]), jnp.float32)
    call = kernel(
        "dst_convolve_backward",
        (like(x.map), like(gradient), sums),
        input_layouts=[None, None, None, MAP, None, MAP, *layouts(delta), None],
        output_layouts=[MAP, None, None],
        input_output_aliases={8: 1},
    )
    maps = (*as_activation(x), *as_read(delta))
    dx, gradient, sums = call(values, column, pointer, *maps, gradient, **_taps(layer, x.map))
    return dx, gradient, sums


def convolve_gradient_on(column: Array, output: Array, x: Read, delta: Read, layer: Layer) -> Array:
    """dL/dw on pairs (column, output), both int32 (n,): float32 (n,); 0 where one is negative.

    Shapes: x (N, H, W, C), delta (N, H', W', n_out); column is the kernel's but for the output,
    flattened.
    """
    call = kernel(
        "dst_convolve_gradient_on",
        jax.ShapeDtypeStruct(column.shape, jnp.float32),
        input_layouts=[None, None, MAP, None, MAP, *layouts(delta)],
    )
    return call(column, output, *as_activation(x), *as_read(delta), **_taps(layer, x.map))


def as_activation(x: Read) -> tuple[Array, Array]:
    """The same where no other map can be: the map, and k or nothing."""
    return as_read(x)[::2]


def as_read(a: Read) -> tuple[Array, Array, Array]:
    """The arguments that say how a map is read: itself, the other one and k, or nothing."""
    nothing = jnp.zeros(0, jnp.float32)
    return a.map, nothing if a.other is None else a.other, nothing if a.k is None else a.k


def layouts(delta: Read) -> list:
    """How the last two of `as_read` lie."""
    return [None if delta.other is None else MAP, None]


def _taps(layer: Layer, x: Array) -> dict[str, Any]:
    taps = np.array(layer.taps(x.shape[1:3]), np.int64)
    return {"taps": taps, "threads": np.int64(THREADS)}


# ------------------------------------------------------------------------------------ the rewire
def best(
    row: Array,
    column: Array,
    score: Array,
    new_row: Array,
    new_column: Array,
    new_score: Array,
    k: Array,
    salt: Array,
) -> tuple[Array, Array, Array]:
    """The k best distinct connections of two lists sorted by (row, column), sorted so again.

    Shapes: int32, int32, float32 (P,) and (Q,), k <= P int32 (), salt uint32 (R,) of each row
    -> (P,). Entries with a score that is not >= 0 are empty, wherever they stand; unused slots at
    the end are (2^31 - 1, 0, -1). Of equal connections the first list's counts, of equal scores at
    the cut the lower `hashing.hashed`.
    """
    results, in_place = (like(row), like(column), like(score)), {0: 0, 1: 1, 2: 2}
    call = kernel("dst_best", results, input_output_aliases=in_place)
    row, column, score = call(row, column, score, new_row, new_column, new_score, k, salt)
    return row, column, score


def lowest(
    order: Array, eligible: Array, k: Array, highest: bool, ties: tuple | None, told: bool
) -> tuple[Array, Array, Array]:
    """The k lowest, or highest, of the eligible: uint32 (n,), bool (n,), int32 () -> bool (n,).

    Of equals the first, or with `ties`, an arena's (column, pointer, salt), those of the lowest
    hashes. If they are to be `told` none of them is chosen where not all fit: bool (n,), and how
    many of them fit, int32 ().
    """
    none = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.uint32)
    flags = jax.ShapeDtypeStruct(order.shape, jnp.bool_)
    equal = flags if told else jax.ShapeDtypeStruct((0,), jnp.bool_)
    call = kernel("dst_lowest", (flags, equal, jax.ShapeDtypeStruct((), jnp.int32)))
    chosen, equal, left = call(order, eligible, k, *(ties or none), highest=highest)
    return chosen, equal, left


def exchange(
    dropped: Array, column: Array, pointer: Array, grown_row: Array, grown_column: Array, k: Array
) -> tuple[Array, Array, Array]:
    """The arena's (column, pointer) without the dropped and with the first k grown connections.

    Shapes: dropped bool (K,), column int32 (K,), pointer int32 (R + 1,), grown int32 (P,) sorted
    by (row, column), k int32 () -> column, pointer, and source int32 (K,): the position each
    connection had, -1 for a grown one. Raises if other than k are dropped.
    """
    results = like(column), like(pointer), like(column)
    call = kernel("dst_exchange", results, input_output_aliases={1: 0})
    column, pointer, source = call(dropped, column, pointer, grown_row, grown_column, k)
    return column, pointer, source


def arrivals(
    random: Array, count: Array, bounds: Array, f: Array, g: Array, salt: Array, block: Array
) -> tuple[Array, Array, Array, Array]:
    """Column, output, time and validity of a bucket's distinct pairs, as `arrivals.pairs_of`.

    Shapes: random uint32 (2, n), count int32 () <= n, bounds int32 (4,): first output and the end,
    first column and the end; cumulative shares f, g and salt uint32, block uint32 () -> int32,
    int32, uint32, bool (n,).
    """
    n = random.shape[1]
    shapes = [jax.ShapeDtypeStruct((n,), t) for t in (jnp.int32, jnp.int32, jnp.uint32, jnp.bool_)]
    call = kernel("dst_arrivals", shapes)
    column, output, time, valid = call(random, count, bounds, f, g, salt, block)
    return column, output, time, valid


def exists(column: Array, pointer: Array, row: Array, wanted: Array) -> Array:
    """Whether the arena has (row, wanted column): int32 (n,), int32 (n,) -> bool (n,)."""
    call = kernel("dst_exists", jax.ShapeDtypeStruct(row.shape, jnp.bool_))
    return call(column, pointer, row, wanted)


def move(leaf: Array, source: Array) -> Array:
    """leaf[source] where source is not negative, in place if XLA can give `leaf` away.

    Shapes: float32 (K,), int32 (K,), increasing but for negative ones, whose result is undefined.
    """
    return kernel("dst_move", like(leaf), input_output_aliases={0: 0})(leaf, source)


def after(a: Array, first: Array) -> Array:
    """a, once `first` is there: on CPUs XLA removes `optimization_barrier` before it matters.

    An array of four dimensions is a map, and stays as it lies.
    """
    lies = MAP if a.ndim == 4 else None
    call = kernel(
        "dst_after",
        like(a),
        input_layouts=[lies, None],
        output_layouts=lies,
        input_output_aliases={0: 0},
    )
    return call(a, first)


def kernel(name: str, results: Any, **options: Any) -> Callable:
    """The call of a kernel; raises RuntimeError where there are none."""
    if why_not():
        raise RuntimeError(f"{name} cannot run: {why_not()}.")
    return jax.ffi.ffi_call(name, results, vmap_method="sequential", **options)


def like(a: Array) -> jax.ShapeDtypeStruct:
    """Shape and type of a result that is as a."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
