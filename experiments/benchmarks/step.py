"""Where a step's time goes: masked against dense, XLA's convolutions against dst's.

    python experiments/benchmarks/step.py vgg|resnet [--rounds=7] [--sparsity=0.98]

Every variant runs once a round, interleaved, on random images of CIFAR-100's shape; printed and
appended to experiments/results/step.jsonl are medians in seconds and their ratios.

  plain       Flax and optax alone: forward, backward, SGD with momentum
  plain_fast  the same with dst.layers.convolution
  masked      `dst` at the sparsity asked for, with dst.layers.convolution
  in_loop     masked, inside a while loop of one step (why a CPU gets one step a dispatch)
  rewire      one rewire of GSE-GraBo, which comes every 1000 steps
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dst
from dst import models
from dst.config import default
from dst.layers.conv import fast_convolution
from dst.training import log, steps
from dst.update import parallel, replicate, update_body

BATCH, CLASSES = 128, 100


def plain_step(model, tx, interceptor):
    """The step that one would write without `dst`, to be jitted."""

    def step(variables, opt_state, x, y):
        with nn.intercept_methods(interceptor):
            return run(variables, opt_state, x, y)

    def run(variables, opt_state, x, y):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params):
            logits, new = model.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state

    return step


def variants(kind: str, sparsity: float) -> dict:
    """{name: call}, each ready to be timed."""
    config = default()
    config.model = kind
    model = models.build(config, CLASSES)
    net = dst.network(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), train=False)
    tx = steps.optimizer(config, steps.schedule(config, 390))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, 32, 32, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(CLASSES, size=BATCH), jnp.int32)
    one = jax.local_devices()[:1]
    method = dst.method("gse", sparsity)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    state = replicate(state.replace(step=jnp.int32(method.every)), one)
    update = dst.make_update(net, tx, steps.classification, devices=one)
    rewire = dst.make_rewire(net, tx, method, steps.classification, devices=one)
    body = update_body(net, tx, steps.classification)
    loop = parallel(
        lambda s, b: jax.lax.fori_loop(0, s.step // s.step, lambda _, s: body(s, b)[0], s),
        (None, 0),
        one,
    )
    xla = jax.jit(plain_step(model, tx, lambda call, args, kwargs, _: call(*args, **kwargs)))
    fast = jax.jit(plain_step(model, tx, fast_convolution))
    variables = {"params": state.params, **state.batch_stats}
    return {
        "plain": lambda: xla(variables, state.opt_state, x, y),
        "plain_fast": lambda: fast(variables, state.opt_state, x, y),
        "masked": lambda: update(state, (x, y)),
        "in_loop": lambda: loop(state, (x[None], y[None])),
        "rewire": lambda: rewire(state, (x, y)),
    }


def measure(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, the first (compiling) call left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main(kind: str, rounds: int, sparsity: float) -> None:
    """Measure, print, append."""
    seconds = measure(variants(kind, sparsity), rounds)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    line = {
        "benchmark": "step",
        "model": kind,
        "sparsity": sparsity,
        "rounds": rounds,
        "median_seconds": median,
        "masked_over_plain": median["masked"] / median["plain"],
        "masked_over_plain_fast": median["masked"] / median["plain_fast"],
        "in_loop_over_masked": median["in_loop"] / median["masked"],
        "rewire_over_masked": median["rewire"] / median["masked"],
        "seconds": seconds,
        "load": os.getloadavg()[0],
        **{k: v for k, v in log.header({}).items() if k != "config"},
    }
    print(json.dumps({k: v for k, v in line.items() if k != "seconds"}, indent=1))
    results = Path(__file__).parents[1] / "results" / "step.jsonl"
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    options = dict(a.removeprefix("--").split("=") for a in sys.argv[1:] if a.startswith("--"))
    main(sys.argv[1], int(options.get("rounds", 7)), float(options.get("sparsity", 0.98)))
