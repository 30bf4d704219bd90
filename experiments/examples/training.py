"""The loop of the examples: a rewire when it is due, a step, a line of the log now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

import dst
from dst.training import log


def train(
    workdir: str | Path,
    options: Mapping[str, Any],
    net: dst.Network,
    tx: optax.GradientTransformation,
    method: dst.Method,
    loss: Callable,
    batch: Callable[[int], Any],
    evaluate: Callable[[Any], dict[str, float]],
    *,
    steps: int,
    every: int,
    **first: Any,
) -> dst.SparseState:
    """The state after `steps` steps on batch(0), batch(1), ..., logged to `workdir`/metrics.jsonl.

    Every `every` steps the loss on the last batch, and evaluate(state). `first` are options of
    `dst.init_state`, such as params.
    """
    state = dst.init_state(net, tx, method, jax.random.key(options["seed"]), **first)
    net.summary(state)
    update = dst.make_update(net, tx, loss, donate=True)
    rewire = dst.make_rewire(net, tx, method, loss, donate=True) if method.moves else None
    begin = time.monotonic()
    with (
        log.open_log(workdir, log.header(options), -1) as writer,
        log.progress(steps, 0) as bar,
    ):
        for step in range(steps):
            if rewire and dst.due(method, step):
                state, _ = rewire(state, batch(step))
            state, metrics = update(state, batch(step))
            if (step + 1) % every == 0 or step + 1 == steps:
                numbers = {"loss": float(metrics["loss"]), **evaluate(state)}
                sparsity = dst.sparsity_of(state)
                writer.write(
                    "end" if step + 1 == steps else "eval",
                    step + 1,
                    **numbers,
                    sparsity=sparsity,
                    overall_sparsity=net.overall(sparsity),
                    seconds=time.monotonic() - begin,
                )
                bar.show(step + 1, **numbers)
    return state
