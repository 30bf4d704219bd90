"""Single 3x3 convolutions on this CPU: XLA's against `dst.layers.convolution`, and inside a loop.

    python experiments/benchmarks/convolution.py [--rounds=9]

Prints and appends to experiments/results/convolution.jsonl medians in milliseconds, all variants
interleaved: forward, gradient of the input, gradient of the kernel; and the latter in a loop.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dst.layers import Conv
from dst.layers.convolution import convolve
from dst.layers.window import PIXEL
from dst.training import log

# (channels, pixels) of the layers of ResNet-56 and VGG-16 / 4, batch 128.
SHAPES = ((16, 32), (32, 16), (64, 8), (128, 4), (128, 2))


def variants(channels: int, pixels: int) -> dict:
    """{name: call} of one layer."""
    window = PIXEL._replace(padding=((1, 1), (1, 1)))
    layer = Conv("conv", (3, 3, channels, channels), window=window)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, pixels, pixels, channels))
    w = jax.random.normal(keys[1], layer.shape)
    delta = jax.random.normal(keys[2], x.shape)
    calls = {}
    for name, product in (("xla", layer.apply), ("dst", functools.partial(convolve, layer))):
        gradient = lambda x, w, delta, f=product: jax.vjp(f, x, w)[1](delta)  # noqa: E731
        dx = jax.jit(lambda x, w, d, g=gradient: g(x, w, d)[0])
        dw = jax.jit(lambda x, w, d, g=gradient: g(x, w, d)[1])
        loop = jax.jit(
            lambda x, w, d, n, g=gradient: jax.lax.fori_loop(
                0, n, lambda _, w: w + g(x, w, d)[1], w
            )
        )
        calls[f"{name} forward"] = functools.partial(jax.jit(product), x, w)
        calls[f"{name} dx"] = functools.partial(dx, x, w, delta)
        calls[f"{name} dw"] = functools.partial(dw, x, w, delta)
        calls[f"{name} dw in a loop"] = functools.partial(loop, x, w, delta, jnp.int32(1))
    return calls


def main(rounds: int) -> None:
    """Measure, print, append."""
    milliseconds = {}
    for channels, pixels in SHAPES:
        calls = variants(channels, pixels)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call())
                if i:  # the first call compiles
                    times[name].append(1000 * (time.perf_counter() - begin))
        row = {name: round(statistics.median(t), 2) for name, t in times.items()}
        milliseconds[f"{channels} channels, {pixels}x{pixels}"] = row
        print(channels, pixels, row, flush=True)
    line = {
        "benchmark": "convolution",
        "rounds": rounds,
        "milliseconds": milliseconds,
        "load": os.getloadavg()[0],
        **{k: v for k, v in log.header({}).items() if k != "config"},
    }
    results = Path(__file__).parents[1] / "results" / "convolution.jsonl"
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    options = dict(a.removeprefix("--").split("=") for a in sys.argv[1:])
    main(int(options.get("rounds", 9)))
