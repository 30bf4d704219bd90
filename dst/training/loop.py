"""The training loop: step, rewire, evaluate, save, until the end or a signal."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dst import hosts
from dst.methods.base import Method
from dst.methods.distributions import first_counts
from dst.methods.plan import due, until_due
from dst.network import Network
from dst.state import SparseState, active_counts, fresh_progress, sparsity_of
from dst.training import cost, log
from dst.training.signals import stop_signals
from dst.training.steps import Resident, Steps

Array = jax.Array

# Several steps a dispatch take about this long: host overhead vanishes, signals are still served.
SECONDS_PER_DISPATCH = 2.0


class Stopped(RuntimeError):
    """A run that cannot go on; the sentence says at which step and what is left of it."""


class Parts(NamedTuple):
    """What stays the same during a run."""

    config: ConfigDict
    method: Method
    net: Network
    steps: Steps
    evaluate: Callable[[SparseState], dict[str, float]]
    validate: Callable[[SparseState], dict[str, float]] | None
    resident: Callable[[int], Resident]  # of an epoch
    rate: optax.Schedule
    per_epoch: int
    looped: bool  # several steps a dispatch
    save: Callable[[SparseState], None]
    collapsed: Callable[[dict[str, int]], list[tuple[str, int, int]]]  # layers that lost nearly all
    writer: log.Log
    events: Callable[[], list[dict]]  # the log so far
    scored: int  # examples of pruning before training
    rounds: tuple[dict, ...]  # Lottery's before this one: steps up to its end, what it left active

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.per_epoch


def loop(run: Parts, state: SparseState) -> tuple[SparseState, bool]:
    """From `state` to the end of the run, or to SIGTERM or SIGINT, after which it is saved too.

    The last state, and whether it is that of the end.
    """
    step, budget, previous = int(state.step), 1, None
    clock = Clock(time.monotonic(), step)
    shown = {"sparsity": sparsity_of(state.masks)}
    done, stopping, test = finished(run, state), False, None
    with stop_signals() as stop, log.progress(run.total, step) as bar:
        while not (done or stopping):
            # ---- Update, up to the next event
            n = min(until_event(run, step), budget)
            begin = time.monotonic()
            state, metrics = run.steps.update(state, run.resident(step // run.per_epoch), n)
            if run.looped:
                jax.block_until_ready(metrics)
            slow = time.monotonic() - begin >= SECONDS_PER_DISPATCH / 2
            # Asked once, of all processes: a later signal is served after the next update.
            stopping, slow = hosts.any_of(bool(stop), slow)
            # A single step is read while the next one runs, unless something follows right now.
            step += n
            event = until_event(run, step - 1) == 1 or stopping
            shown |= check(previous, step - n)
            previous = metrics if not (run.looped or event) else None
            if previous is None:
                shown |= check(metrics, step)
            if run.looped and not slow:
                budget *= 2
            bar.show(step, **shown)

            # ---- End of an epoch
            if step % run.per_epoch == 0:
                state, done, test = end_epoch(run, state, step, clock)
                clock = Clock(time.monotonic(), step)

            # ---- Rewire: before the update of this step, on its batch
            if not done and due(run.method, step):
                state = rewire(run, state, step)
                shown["sparsity"] = sparsity_of(state.masks)

            # ---- Save
            if done or stopping or step % run.config.checkpoint_every == 0:
                run.save(state)
    if done:
        end(run, state, step, test)
    else:
        log.say(f"Stopped at step {step} and saved; the same command resumes.")
    return state, done


class Clock(NamedTuple):
    """When an epoch's part in this process began."""

    time: float
    step: int


def until_event(run: Parts, step: int) -> int:
    """Steps until the next end of an epoch, rewire or checkpoint."""
    periods = run.per_epoch, run.config.checkpoint_every
    waits = [period - step % period for period in periods]
    return min(*waits, until_due(run.method, step)) if run.method.moves else min(waits)


def check(metrics: dict[str, Array] | None, step: int) -> dict[str, float]:
    """The metrics of the update that led to `step` as numbers. Raises: FloatingPointError."""
    if metrics is None:
        return {}
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not values.pop("finite"):
        raise FloatingPointError(
            f"the loss or a gradient is NaN or infinite by step {step} (loss {values['loss']:.4g})"
        )
    return values


def end_epoch(run: Parts, state: SparseState, step: int, clock: Clock):
    """Log the epoch, evaluate, remember the best loss.

    The state, whether the run is over, and the test set's numbers, None if it was not its turn: it
    is asked every `eval_every` epochs and in the end, the validation set after every epoch.
    """
    config, epoch, seen = run.config, step // run.per_epoch, state.progress
    seconds = time.monotonic() - clock.time
    loss = float(seen.loss_sum) / int(seen.count)
    sparsity = sparsities(run, state)
    run.writer.write(
        "train",
        step,
        epoch=epoch,
        loss=loss,
        accuracy=float(seen.correct_sum) / int(seen.count),
        learning_rate=float(run.rate(step - 1)),
        **sparsity,
        images_per_second=(step - clock.step) * config.batch_size / seconds,
        seconds=seconds,
    )
    extra = {}
    if run.validate is not None:
        held_out = run.validate(state)
        loss = held_out["loss"]
        extra = {f"validation_{name}": value for name, value in held_out.items()}
    # Rounded as it is remembered: else an equal loss may look better for ever.
    better = np.float32(loss) < np.float32(seen.best_loss)
    fresh = fresh_progress()
    if not (run.method.ramps and step < run.method.end):  # before, the network is another one
        fresh = fresh.replace(
            best_loss=jnp.float32(loss) if better else seen.best_loss,
            stale_epochs=jnp.int32(0) if better else seen.stale_epochs + 1,
        )
    state = state.replace(progress=jax.device_put(fresh, seen.loss_sum.sharding))
    done = finished(run, state)
    test = tested(run, state) if done or epoch % config.eval_every == 0 else None
    if test or extra:
        run.writer.write("eval", step, epoch=epoch, **(test or {}), **extra, **sparsity)
    return state, done, test


def tested(run: Parts, state: SparseState) -> dict[str, float]:
    """The numbers of the test set, as the log has them."""
    return {f"test_{name}": value for name, value in run.evaluate(state).items()}


def finished(run: Parts, state: SparseState) -> bool:
    """Whether all epochs are done or the loss has not improved for `patience` of them."""
    patience = run.config.patience
    stale = patience > 0 and int(state.progress.stale_epochs) >= patience
    return stale or int(state.step) >= run.total


def rewire(run: Parts, state: SparseState, step: int) -> SparseState:
    """One rewire, reported. Raises: FloatingPointError for a NaN score or weight."""
    begin = time.monotonic()
    state, report = run.steps.rewire(state, run.resident(step // run.per_epoch))
    report = jax.tree.map(lambda a: a.item(), jax.device_get(report))
    if not report.pop("finite"):
        raise FloatingPointError(
            f"a score or weight is NaN, infinite or a score negative in the rewire of step {step}"
        )
    run.writer.write("rewire", step, **report, seconds=time.monotonic() - begin)
    # A ramp takes nine tenths of most layers, as it should.
    for path, now, first in [] if run.method.ramps else run.collapsed(report["active"]):
        log.say(
            f"Layer {path} has {now} of its first {first} connections after the rewire of step "
            f"{step}; --config.layer_floor sets a share that every layer keeps."
        )
    return state


def cost_of(run: Parts, step: int) -> dict[str, float]:
    """What the run has cost, and Lottery's rounds before it, counted from the log.

    So a resumed run tells the same.
    """
    before = run.rounds[-1]["step"] if run.rounds else 0
    return cost.run_cost(
        run.net,
        run.method,
        first_counts(run.net, run.method),
        [*run.rounds, *run.events()],
        before + step,
        run.config.batch_size,
        run.scored,
        1 + len(run.rounds),
    )


def end(run: Parts, state: SparseState, step: int, test: dict[str, float] | None) -> None:
    """The last line of the log; `test` is None in a run that was over when it was restored."""
    test = test or tested(run, state)
    if not hosts.is_first():  # its log is the only one, and tells the cost
        return
    active = jax.device_get(active_counts(state.masks))
    early = step < run.total
    run.writer.write(
        "end",
        step,
        epoch=step // run.per_epoch,
        **test,
        **sparsities(run, state),
        active=active,
        possible={path: layer.size for path, layer in run.net.layers.items()},
        cost=cost_of(run, step),
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        reason=f"no better loss for {run.config.patience} epochs" if early else "all epochs done",
    )
    eligible, overall = sparsities(run, state).values()
    words = "" if overall == eligible else f", {overall:.4f} overall"
    log.say(f"Test accuracy {test['test_accuracy']:.4f} at sparsity {eligible:.4f}{words}.")


def sparsities(run: Parts, state: SparseState) -> dict[str, float]:
    """Of the layers that are sparse, and overall, with what stays dense."""
    eligible = sparsity_of(state.masks)
    return {"sparsity": eligible, "overall_sparsity": run.net.overall(eligible)}


def collapsed_layers(
    first: Mapping[str, int],
) -> Callable[[Mapping[str, int]], list[tuple[str, int, int]]]:
    """A function of the counts: (layer, its count, its first) of those below a tenth of the first.

    It remembers what it has told: each layer is told once.
    """
    told: set[str] = set()

    def tell(active: Mapping[str, int]) -> list[tuple[str, int, int]]:
        low = [(p, n, first[p]) for p, n in active.items() if 10 * n < first[p]]
        new = [layer for layer in low if layer[0] not in told]
        told.update(path for path, _, _ in new)
        return new

    return tell
