"""The training run: build, restore, step, rewire, evaluate, save; killed any time, it resumes.

Nothing random is remembered between steps: every number follows from (key, step), so a run that
is killed and started again ends bit for bit as if it had not been.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dst import checkpoint, data, log, models, steps
from dst.config import check_devices
from dst.evaluate import make_evaluate
from dst.masks import thinned
from dst.methods import Method
from dst.network import Network, network
from dst.plan import due
from dst.products import tier
from dst.signals import stop_signals
from dst.state import (
    SparseState,
    active_counts,
    first_counts,
    fresh_progress,
    init_state,
    sparsity_of,
)
from dst.steps import Resident, Steps, make_steps, method_of, optimizer, schedule
from dst.update import replicate

Array = jax.Array

# Several steps a dispatch take about this long: host overhead vanishes, signals are still served.
SECONDS_PER_DISPATCH = 2.0


class Stopped(RuntimeError):
    """A run that cannot go on; the sentence says at which step and what is left of it."""


# ----------------------------------------------------------------------------------------- the run
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
    thinned: Callable[[dict[str, int]], list[tuple[str, int, int]]]  # layers that lost nearly all
    writer: log.Log

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.per_epoch


def train(config: ConfigDict, workdir: Path) -> None:
    """Run `config` in `workdir`, from its newest checkpoint if there is one.

    Errors: ConfigError (bad input, another run's workdir), Stopped (NaN, every checkpoint damaged).
    """
    # ---- Build
    log.refuse_another_run(workdir, config.to_dict())
    header = log.header(config.to_dict())
    if config.execution == "sparse":
        header["tier"] = tier()
        log.say(f"Sparse execution: {header['tier']}.")
    devices = jax.local_devices()[: check_devices(config, jax.local_device_count())]
    dataset = data.load(config.dataset, config.data_dir, config.validation_size)
    example = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    model = models.build(config, dataset.num_classes)
    net = network(model, example, train=False, execution=config.execution)
    per_epoch = data.steps_per_epoch(len(dataset.train_labels), config.batch_size)
    rule, rate = method_of(config, per_epoch), schedule(config, per_epoch)
    tx = optimizer(config, rate)
    state = replicate(init_state(net, tx, rule, jax.random.key(config.seed)), devices)

    # ---- Restore
    manager = checkpoint.open_manager(workdir, config.checkpoints_kept)
    state = restore(manager, state, config, workdir)

    # ---- Run
    images, labels = replicate((dataset.train_images, dataset.train_labels), devices)
    order = jax.jit(data.epoch_order, static_argnums=2)
    run_key = jnp.array(jax.random.key_data(state.key))  # the state's own buffers are donated

    @functools.lru_cache(maxsize=1)
    def resident(epoch: int) -> Resident:
        permutation = order(jax.random.wrap_key_data(run_key), epoch, len(labels))
        return Resident(images, labels, replicate(permutation, devices))

    def score(images, labels):
        return make_evaluate(config, dataset, net, devices, images, labels)

    held_out = len(dataset.validation_labels) > 0
    record = {"config": config.to_dict()}
    with log.open_log(workdir, header, int(state.step)) as writer:
        parts = Parts(
            config=config,
            method=rule,
            net=net,
            steps=make_steps(config, dataset, net, tx, rule, devices),
            evaluate=score(dataset.test_images, dataset.test_labels),
            validate=score(dataset.validation_images, dataset.validation_labels)
            if held_out
            else None,
            resident=resident,
            rate=rate,
            per_epoch=per_epoch,
            looped=steps.looped(devices),
            save=lambda state: checkpoint.save(manager, state, record),
            thinned=thinned(first_counts(net, rule)),
            writer=writer,
        )
        try:
            loop(parts, state)
        except ArithmeticError as error:
            newest = manager.latest_step()
            kept = "no checkpoint was saved" if newest is None else f"the last good one is {newest}"
            raise Stopped(f"{error}; {kept} (a lower learning_rate may help).") from error
    log.plot(workdir)


def restore(manager: Any, state: SparseState, config: ConfigDict, workdir: Path) -> SparseState:
    """The newest intact checkpoint, or `state` if there is none. Errors: Stopped, ConfigError."""
    try:
        restored, _ = checkpoint.restore(manager, state, config.to_dict(), log.say)
    except checkpoint.Unreadable as error:
        raise Stopped(str(error)) from error
    if restored is None:
        return state
    log.say(f"Resuming {workdir} at step {int(restored.step)}.")
    return restored


def loop(run: Parts, state: SparseState) -> None:
    """From `state` to the end of the run, or to SIGTERM or SIGINT, after which it is saved too."""
    step, budget, previous = int(state.step), 1, None
    clock = Clock(time.monotonic(), step)
    shown = {"sparsity": sparsity_of(state.masks)}
    done, stopping = finished(run, state), False
    with stop_signals() as stop, log.progress(run.total, step) as bar:
        while not (done or stopping):
            # ---- Update, up to the next event
            n = min(until_event(run, step), budget)
            begin = time.monotonic()
            state, metrics = run.steps.update(state, run.resident(step // run.per_epoch), n)
            # A single step is read while the next one runs, unless something follows right now.
            step += n
            stopping = bool(stop)  # asked once: a later signal is served after the next update
            event = until_event(run, step - 1) == 1 or stopping
            shown |= check(previous, step - n)
            previous = metrics if not (run.looped or event) else None
            if previous is None:
                shown |= check(metrics, step)
            if run.looped and time.monotonic() - begin < SECONDS_PER_DISPATCH / 2:
                budget *= 2
            bar.show(step, **shown)

            # ---- End of an epoch
            if step % run.per_epoch == 0:
                state, done = end_epoch(run, state, step, clock)
                clock = Clock(time.monotonic(), step)

            # ---- Rewire: before the update of this step, on its batch
            if not done and due(run.method, step):
                state = rewire(run, state, step)

            # ---- Save
            if done or stopping or step % run.config.checkpoint_every == 0:
                run.save(state)
    if done:
        end(run, state, step)
    else:
        log.say(f"Stopped at step {step} and saved; the same command resumes.")


class Clock(NamedTuple):
    """When an epoch's part in this process began."""

    time: float
    step: int


def until_event(run: Parts, step: int) -> int:
    """Steps until the next end of an epoch, rewire or checkpoint."""
    periods = [run.per_epoch, run.config.checkpoint_every]
    if run.method.grows:
        periods.append(run.method.every)
    return min(period - step % period for period in periods)


def check(metrics: dict[str, Array] | None, step: int) -> dict[str, float]:
    """The metrics of the update that led to `step` as numbers. Errors: FloatingPointError."""
    if metrics is None:
        return {}
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not values.pop("finite"):
        raise FloatingPointError(
            f"the loss or a gradient is NaN or infinite by step {step} (loss {values['loss']:.4g})"
        )
    return values


def end_epoch(run: Parts, state: SparseState, step: int, clock: Clock):
    """Log the epoch, evaluate, remember the best loss: (state, whether the run is over)."""
    config, epoch, seen = run.config, step // run.per_epoch, state.progress
    seconds = time.monotonic() - clock.time
    loss = float(seen.loss_sum) / int(seen.count)
    sparsity = sparsity_of(state.masks)
    run.writer.write(
        "train",
        step,
        epoch=epoch,
        loss=loss,
        accuracy=float(seen.correct_sum) / int(seen.count),
        learning_rate=float(run.rate(step - 1)),
        sparsity=sparsity,
        images_per_second=(step - clock.step) * config.batch_size / seconds,
        seconds=seconds,
    )
    extra = {}
    if run.validate is not None:
        held_out = run.validate(state)
        loss = held_out["loss"]
        extra = {f"validation_{name}": value for name, value in held_out.items()}
    if epoch % config.eval_every == 0 or step == run.total or extra:
        test = {f"test_{name}": value for name, value in run.evaluate(state).items()}
        run.writer.write("eval", step, epoch=epoch, **test, **extra, sparsity=sparsity)
    # Rounded as it is remembered: else an equal loss may look better for ever.
    better = np.float32(loss) < np.float32(seen.best_loss)
    fresh = fresh_progress().replace(
        best_loss=jnp.float32(loss) if better else seen.best_loss,
        stale_epochs=jnp.int32(0) if better else seen.stale_epochs + 1,
    )
    state = state.replace(progress=jax.device_put(fresh, seen.loss_sum.sharding))
    return state, finished(run, state)


def finished(run: Parts, state: SparseState) -> bool:
    """Whether all epochs are done or the loss has not improved for `patience` of them."""
    patience = run.config.patience
    stale = patience > 0 and int(state.progress.stale_epochs) >= patience
    return stale or int(state.step) >= run.total


def rewire(run: Parts, state: SparseState, step: int) -> SparseState:
    """One rewire, reported. Errors: FloatingPointError for a NaN score or weight."""
    begin = time.monotonic()
    state, report = run.steps.rewire(state, run.resident(step // run.per_epoch))
    report = jax.tree.map(lambda a: a.item(), jax.device_get(report))
    if not report.pop("finite"):
        raise FloatingPointError(
            f"a score or weight is NaN or infinite in the rewire of step {step}"
        )
    run.writer.write("rewire", step, **report, seconds=time.monotonic() - begin)
    for path, now, first in run.thinned(report["active"]):
        log.say(
            f"Layer {path} has {now} of its first {first} connections after the rewire of step "
            f"{step}; --config.layer_floor sets a share that every layer keeps."
        )
    return state


def end(run: Parts, state: SparseState, step: int) -> None:
    """The last line of the log."""
    test = {f"test_{name}": value for name, value in run.evaluate(state).items()}
    active = jax.device_get(active_counts(state.masks))
    early = step < run.total
    run.writer.write(
        "end",
        step,
        epoch=step // run.per_epoch,
        **test,
        sparsity=sparsity_of(state.masks),
        active=active,
        possible={path: layer.size for path, layer in run.net.layers.items()},
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        reason=f"no better loss for {run.config.patience} epochs" if early else "all epochs done",
    )
    log.say(
        f"Test accuracy {test['test_accuracy']:.4f} at sparsity {sparsity_of(state.masks):.4f}."
    )
