"""A whole training step of one layer: sparse in both tiers, against dense and masked.

    python -m experiments.benchmarks.layer [--sizes 1024 4096 16384] [--seconds 40]
                                           [--densities 0.1 0.05 0.02 0.01] [--out FILE.jsonl]

A step is the forward product, the gradient of the input, the gradient of the weights, and SGD with
momentum, the buffers donated; batch 128, float32. Of dense and masked layers the fastest of some
variants counts. All variants and densities of a size run in turns in one process, `--seconds` long;
peaks are in bytes, see `measure`, each from a process of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dst.connections.arena import Arena, Part, fill, lay_out
from dst.connections.backends import cpp as kernels
from dst.connections.initial import random_positions
from dst.connections.products import product
from dst.layers import Dense
from dst.network import Network
from experiments.benchmarks import measure

Array = jax.Array
BATCH, LEARNING_RATE, MOMENTUM = 128, 1e-3, 0.9
SPARSE = ("kernels", "pure JAX")
DENSE, MASKED = ("dense", "dense, barrier"), ("masked, float32", "masked, bool")


class Arguments(NamedTuple):
    """Of a step; the first two are donated."""

    weights: Any
    momentum: Any
    connections: Any  # an arena, a mask or None
    x: Any
    delta: Any  # the gradient of the output


# ---------------------------------------------------------------------------------------- the steps
def step(multiply: Callable, finish: Callable, weights, momentum, connections, x, delta):
    """(weights, momentum, connections, x, delta) -> (weights, momentum), y, dx."""
    y, back = jax.vjp(lambda weights, x: multiply(weights, connections, x), weights, x)
    # As a loss would order them; else XLA may copy the weights, to read them after the update.
    delta, _ = lax.optimization_barrier((delta, y))
    gradient, dx = back(delta)
    momentum = MOMENTUM * momentum + finish(gradient, connections)
    return (weights - LEARNING_RATE * momentum, momentum), y, dx


def densely(weights: Array, _: Any, x: Array) -> Array:
    """x W: (B, n), the layout in which XLA's dense products are faster."""
    return x @ weights


# What becomes of a variant's gradient; the weights of a masked layer are 0 off the mask before.
FINISH: dict[str, Callable] = {
    "dense": lambda gradient, _: gradient,
    # Momentum may be fused into the product, which is slower; or not.
    "dense, barrier": lambda gradient, _: lax.optimization_barrier(gradient),
    "masked, float32": lambda gradient, mask: gradient * mask,
    "masked, bool": lambda gradient, mask: jnp.where(mask, gradient, 0),
}


def part_of(size: int, density: float) -> Part:
    """The layer's place in an arena of its own."""
    layer = Dense("layer", (size, size))
    net = Network(None, {"layer": layer}, {}, (), {}, "sparse")  # type: ignore[arg-type]
    return lay_out(net, {"layer": connections_of(size, density)})[0]


def connections_of(size: int, density: float) -> int:
    return round(density * size**2)


def compile_step(variant: str, size: int, density: float) -> Any:
    """The compiled step of a variant."""
    if variant not in SPARSE:
        run = functools.partial(step, densely, FINISH[variant])
    else:
        part = part_of(size, density)

        def sparsely(values, arena, x):
            return product(part, values, arena, x)[0]

        run = functools.partial(step, sparsely, FINISH["dense"])
    shapes = shapes_of(variant, size, density)
    available = kernels.available() and variant != "pure JAX"
    with mock.patch.object(kernels, "available", lambda: available):  # asked while it is traced
        return jax.jit(run, donate_argnums=(0, 1)).lower(*shapes).compile()


# ------------------------------------------------------------------------------------ the arguments
def shapes_of(variant: str, size: int, density: float) -> Arguments:
    """Shapes and dtypes of a step's arguments."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if variant in SPARSE:
        part, K = part_of(size, density), connections_of(size, density)
        integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        arena = Arena(integers((K,)), integers((part.rows + 1,)), (part,))
        return Arguments(shape((K,)), shape((K,)), arena, *2 * [shape((size, BATCH))])
    square = shape((size, size))
    mask = {"masked, float32": square, "masked, bool": jax.ShapeDtypeStruct(square.shape, bool)}
    return Arguments(square, square, mask.get(variant), *2 * [shape((BATCH, size))])


def arguments_of(variant: str, size: int, density: float) -> Arguments:
    """A step's arguments: random connections, weights and activations."""
    rng = np.random.default_rng(0)
    shapes = shapes_of(variant, size, density)
    x, delta = (jnp.array(rng.standard_normal(a.shape, np.float32)) for a in shapes[3:])
    if variant in SPARSE:
        part = part_of(size, density)
        count = connections_of(size, density)
        positions = random_positions(jax.random.key(0), size**2, count)
        arena, values = fill((part,), [(positions, rng.standard_normal(count, np.float32))])
        return Arguments(jnp.array(values), jnp.array(np.zeros_like(values)), arena, x, delta)
    weights, mask = jnp.array(rng.standard_normal((size, size), np.float32)), None
    if variant in MASKED:
        mask = jnp.array(rng.random((size, size), np.float32) < density)
        weights = jnp.where(mask, weights, 0)
        mask = mask.astype(shapes.connections.dtype)
    return Arguments(weights, jnp.zeros((size, size)), mask, x, delta)


class Run:
    """A compiled step and its arguments; `memory`, [weights, momentum], is donated and replaced."""

    def __init__(self, compiled: Any, memory: list[Array], rest: tuple[Any, Array, Array]):
        self.compiled, self.memory, self.rest = compiled, memory, rest

    def __call__(self) -> Any:
        self.memory[:], *results = self.compiled(*self.memory, *self.rest)
        return self.memory, results


# --------------------------------------------------------------------------------- what is measured
def peak(variant: str, size: int, density: float) -> dict[str, int]:
    """Bytes at the peak of two steps; in a fresh process."""

    def prepare(size):
        weights, momentum, *rest = arguments_of(variant, size, density)
        return Run(compiled[size], [weights, momentum], tuple(rest))

    compiled = {n: compile_step(variant, n, density) for n in (measure.SMALL, size)}
    return {"xla": measure.xla_peak(compiled[size]), "rss": measure.growth(prepare, size)}


def times(size: int, densities: list[float], seconds: float) -> dict[tuple[str, float], list]:
    """Seconds of every variant at every density; of dense and masked ones at the first only.

    Theirs do not depend on it, and they share weights and momentum: 16384 units would not fit else.
    """
    weights, momentum, mask, *units = arguments_of(MASKED[0], size, densities[0])
    memory, masks = [weights, momentum], {MASKED[0]: mask, MASKED[1]: mask > 0}
    del weights, momentum
    calls: dict[tuple[str, float], Callable] = {
        (variant, densities[0]): Run(
            compile_step(variant, size, densities[0]), memory, (masks.get(variant), *units)
        )
        for variant in DENSE + MASKED
    }
    for density in densities:
        for variant in SPARSE[not kernels.available() :]:
            weights, momentum, *rest = arguments_of(variant, size, density)
            compiled = compile_step(variant, size, density)
            calls[variant, density] = Run(compiled, [weights, momentum], tuple(rest))
            del weights, momentum
    return measure.in_turns(calls, seconds)


def cells(size: int, densities: list[float], seconds: float) -> Iterator[dict[str, Any]]:
    """A line for the fastest dense, the fastest masked, and every sparse variant."""
    found = {at: measure.summary(t) for at, t in times(size, densities, seconds).items()}
    median = {at: line["median_seconds"] for at, line in found.items()}
    best = [min(((v, densities[0]) for v in vs), key=median.__getitem__) for vs in (DENSE, MASKED)]
    for at in [*best, *(at for at in found if at[0] in SPARSE)]:
        case = {"variant": at[0], "size": size, "density": at[1]}
        ratios = {
            f"{name}_over_this": median[other] / median[at]
            for name, other in zip(("dense", "masked"), best, strict=True)
        }
        peaks = measure.alone("experiments.benchmarks.layer", "--alone", json.dumps(case))
        yield {**case, **found[at], **ratios, "peak_bytes": peaks}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, ratios of medians, MiB."""

    def row(line):
        sparse = line["variant"] in SPARSE
        of = f", {100 * line['density']:g} %" if sparse else ""
        yield f"{line['size']}²{of}: {line['variant']}"
        yield from (f"{1000 * line[f'{w}_seconds']:.4g}" for w in ("median", "least"))
        yield from (f"{line[f'{w}_over_this']:.1f}" for w in ("dense", "masked"))
        yield from (f"{line['peak_bytes'][w] / measure.MIB:.1f}" for w in ("xla", "rss"))

    head = ("layer", "ms, median", "least", "× dense", "× masked", "MiB, XLA", "MiB, RSS")
    return measure.table(head, map(row, lines))


def main() -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.02, 0.01])
    parser.add_argument("--seconds", type=float, default=40)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(peak(**json.loads(options.alone))))
        return
    lines = measure.Lines(options.out)
    lines.add(measure.header("layer", batch=BATCH, dtype="float32"))
    for size in options.sizes:
        for cell in cells(size, options.densities, options.seconds):
            lines.add(cell)
    print(table(lines.lines[1:]))


if __name__ == "__main__":
    main()
