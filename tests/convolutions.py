"""Convolutions with random connections, and the same in NumPy in float64, which is the oracle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dst.layers import Conv
from dst.layers.window import Window


class Case(NamedTuple):
    """A convolution's connections in an arena with 3 foreign ones before and 2 behind, and maps."""

    layer: Conv
    W: np.ndarray  # (kx ky n_in, n_out), float32 numbers
    column: np.ndarray
    output: np.ndarray  # of the layer's own connections
    arrays: tuple  # values, column, pointer
    x: np.ndarray
    delta: np.ndarray
    kept: np.ndarray  # the gradient so far
    other: np.ndarray  # a map as delta
    k: np.ndarray  # (2, n_in): x may stand for an activation
    delta_k: np.ndarray  # (3, n_out): delta for a gradient


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make(
    seed,
    batch,
    sides,
    channels,
    taps,
    strides=(1, 1),
    padding="SAME",
    dilation=(1, 1),
    p=0.3,
    groups=1,
):
    rng = np.random.default_rng(seed)
    shape = *taps, channels[0] // groups, channels[1]
    layer = Conv("layer", shape, None, Window(strides, padding, dilation), groups)
    n_in = layer.columns
    W = np.where(rng.random((n_in, layer.n_out)) < p, normal(rng, n_in, layer.n_out), 0)
    output, column = np.nonzero(W.T)
    values = np.concatenate([normal(rng, 3), W[column, output], normal(rng, 2)])
    columns = np.concatenate([[7] * 3, column, [5] * 2]).astype(np.int32)
    counts = np.bincount(output, minlength=layer.n_out)
    pointer = np.concatenate([[3], 3 + np.cumsum(counts)]).astype(np.int32)
    x = normal(rng, batch, *sides, channels[0])
    delta = normal(rng, batch, *layer.output_sides(sides), channels[1])
    kept = normal(rng, values.size)
    other, k, delta_k = (
        normal(rng, *delta.shape),
        normal(rng, 2, channels[0]),
        normal(rng, 3, channels[1]),
    )
    arrays = values, columns, pointer
    return Case(layer, W, column, output, arrays, x, delta, kept, other, k, delta_k)


def activation(case):
    """What x stands for: relu(k0 x + k1), float64, and where that passes a gradient on."""
    u = case.k[0].astype(np.float64) * case.x + case.k[1]
    return np.maximum(u, 0), u > 0


def gradient(case):
    """What delta stands for: k0 delta + k1 other + k2, float64."""
    k = case.delta_k.astype(np.float64)
    return k[0] * case.delta + k[1] * case.other + k[2]


FRAME = 16  # zeros around a map in NumPy, more than any padding here


def taps_of(layer, framed, pads, out):
    """(flat tap, what it reads for every output pixel, a view of the maps in their frames)."""
    (sx, sy), (dx, dy) = layer.window.strides, layer.window.dilation
    (top, _), (left, _) = pads
    for a in range(layer.dims[0]):
        for b in range(layer.dims[1]):
            row, column = FRAME - top + a * dx, FRAME - left + b * dy
            rows = slice(row, row + (out[0] - 1) * sx + 1, sx)
            columns = slice(column, column + (out[1] - 1) * sy + 1, sy)
            yield a * layer.dims[1] + b, framed[:, rows, columns]


def expected(case):
    """y, dx and dW (n_in, n_out), by a product for each tap."""
    layer, pads = case.layer, case.layer.pads(case.x.shape[1:3])
    frame = (FRAME, FRAME)
    x = np.pad(case.x.astype(np.float64), ((0, 0), frame, frame, (0, 0)))
    delta, out = case.delta.astype(np.float64), case.delta.shape[1:3]
    pairs = read_by(layer), np.arange(layer.n_out)
    W = np.zeros((len(case.W) // layer.n_in, layer.channels, layer.n_out))
    W[:, *pairs] = case.W.reshape(-1, layer.n_in, layer.n_out)
    y, dx, dW = np.zeros(delta.shape), np.zeros(x.shape), np.zeros(W.shape)
    writes = dict(taps_of(layer, dx, pads, out))
    for tap, seen in taps_of(layer, x, pads, out):
        y += seen @ W[tap]
        dW[tap] = np.einsum("nhwi,nhwo->io", seen, delta)
        writes[tap][...] += delta @ W[tap].T
    dx = dx[:, FRAME:-FRAME, FRAME:-FRAME]
    return y, dx, dW[:, *pairs].reshape(case.W.shape)


def read_by(layer):
    """The channels that each output reads: (n_in, n_out)."""
    group = np.arange(layer.n_out) // (layer.n_out // layer.groups)
    return group * layer.n_in + np.arange(layer.n_in)[:, None]


def near(got, wanted, tolerance=3e-6):
    """Equal to a share of the largest number."""
    assert got.shape == wanted.shape
    scale = np.abs(wanted).max(initial=1e-3)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)
