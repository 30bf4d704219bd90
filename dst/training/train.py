"""The training run: build, restore, prune, run; Lottery's rounds are a chain of such runs.

Nothing random is remembered between steps: every number follows from (key, step), so a run that
is killed and started again ends bit for bit as if it had not been.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dst import hosts, models
from dst.config import check_devices
from dst.connections.execution import described
from dst.data import Dataset, load, pipeline
from dst.discovery import network
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.methods.distributions import first_counts
from dst.methods.lottery import levels, ticket, winning
from dst.methods.memory import begun
from dst.methods.settings import method_of, unread_message
from dst.network import Network
from dst.start import init_state, prune_at_init
from dst.state import SparseState, active_counts
from dst.training import checkpoint, figures, log, steps
from dst.training.evaluate import make_evaluate
from dst.training.export import export
from dst.training.loop import Parts, Stopped, collapsed_layers, loop
from dst.training.steps import classification, make_steps, optimizer, residents, schedule
from dst.update import replicate

Masks = Mapping[str, Any]  # layer path -> bool


def train(config: ConfigDict, workdir: Path) -> None:
    """Run `config` in `workdir`, from its newest checkpoint if there is one.

    Lottery's rounds before the last lie in `workdir/rounds`, each a run of its own.
    Raises: ConfigError (bad input, another run's workdir, processes that differ), Stopped (NaN,
    every checkpoint damaged).
    """
    check_alike(config)
    if unread := unread_message(config):
        log.say(unread)
    if config.method != "lottery":
        run_once(config, workdir)
        return
    sparsities = levels(config.sparsity, config.lottery_levels)
    masks: Masks | None = None
    rounds: list[dict] = []
    steps_before = 0
    for n, (level, following) in enumerate(zip(sparsities, (*sparsities[1:], None), strict=True)):
        folder = workdir / "rounds" / f"{level:.10g}" if following is not None else workdir
        log.say(f"Round {n + 1} of {len(sparsities)}: sparsity {level:.10g}, in {folder}.")
        this = config.copy_and_resolve_references()
        this.sparsity = level
        net, state, done = run_once(this.lock(), folder, masks, tuple(rounds))
        if not done:
            return
        if following is not None:
            masks = winning(net, state, following)
            steps_before += int(state.step)
            left = {path: int(mask.sum()) for path, mask in masks.items()}
            rounds.append({"event": "round", "step": steps_before, "active": left})


def check_alike(config: ConfigDict) -> None:
    """Raises: ConfigError in every process if their configs differ.

    Each may have the data in a folder of its own; the other fields say what all of them compute.
    """
    first, *others = hosts.gather(config.to_dict())
    for process, other in enumerate(others, 1):
        difference = checkpoint.first_difference(first, other, ("data_dir",))
        if difference:
            field, was, now = difference
            raise ConfigError(
                f"All processes must have the same config; {field} is {was!r} in process 0 and "
                f"{now!r} in process {process}."
            )


def check_step(step: int, workdir: Path) -> None:
    """Raises: ConfigError in every process if they have not restored the same step (-1: none)."""
    steps = hosts.gather(step)
    if len(set(steps)) > 1:
        found = ", ".join("none" if step < 0 else f"step {step}" for step in steps)
        raise ConfigError(
            f"All processes must see the same --workdir, {workdir} here; their newest checkpoints "
            f"differ: {found}."
        )


class Built(NamedTuple):
    """What a run is made of, before anything is restored."""

    devices: list
    dataset: Dataset
    net: Network
    method: Method
    rate: optax.Schedule
    tx: optax.GradientTransformation
    state: SparseState  # the first one
    per_epoch: int  # steps


def build(config: ConfigDict, masks: Masks | None) -> Built:
    """Data, network, method, optimizer and the first state, with `masks` a Lottery ticket."""
    devices = hosts.devices(check_devices(config, jax.local_device_count(), jax.process_count()))
    dataset = load(config.dataset, config.data_dir, config.validation_size)
    example = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    model = models.build(config, dataset.num_classes)
    models.check_logits(config.model, model, example, dataset.num_classes)
    net = network(
        model,
        example,
        train=False,
        dense=config.dense_layers,
        execution=config.execution,
        fuse=config.fuse,
    )
    per_epoch = pipeline.steps_per_epoch(len(dataset.train_labels), config.batch_size)
    rule, rate = method_of(config, per_epoch), schedule(config, per_epoch)
    tx, key = optimizer(config, rate), jax.random.key(config.seed)
    chained = rule.name == "lottery"
    first = functools.partial(ticket, masks=masks) if chained else init_state
    state = first(net, tx, rule, key, init=config.init)
    return Built(devices, dataset, net, rule, rate, tx, replicate(state, devices), per_epoch)


def run_once(
    config: ConfigDict,
    workdir: Path,
    masks: Masks | None = None,
    rounds: tuple[dict, ...] = (),
) -> tuple[Network, SparseState, bool]:
    """One run, with Lottery's `masks` from their ticket, after the `rounds` before.

    The network, its last state, and whether the run is over.
    """
    with hosts.in_step():
        log.refuse_another_run(workdir, config.to_dict())
        header = log.header(config.to_dict())
        built = build(config, masks)
        variables = built.state.params, built.state.masks, built.state.batch_stats
        if tier := described(built.net, *variables, train=True):
            header["tier"] = tier
            log.say(f"Sparse execution: {tier}.")
        manager = checkpoint.open_manager(workdir, config.checkpoints_kept)
        restored = restore(manager, built, config, workdir)
    state = built.state if restored is None else restored
    step = -1 if restored is None else int(state.step)
    check_step(step, workdir)
    opened = log.open_log(workdir, header, step) if hosts.is_first() else log.no_log()
    with opened as writer:
        run = parts(config, workdir, built, manager, writer, rounds)
        try:
            if built.method.before and restored is None:
                state = replicate(prune_first(run, built), built.devices)
            state, done = loop(run, state)
        except ArithmeticError as error:
            newest = checkpoint.newest(manager)
            kept = "no checkpoint was saved" if newest is None else f"the last good one is {newest}"
            raise Stopped(f"{error}; {kept} (a lower learning_rate may help).") from error
    if hosts.is_first():
        figures.plot(workdir)
        if done:
            export(built.net, state, workdir / "network.npz")
    return built.net, state, done


def parts(
    config: ConfigDict, workdir: Path, built: Built, manager: Any, writer: log.Log, rounds: tuple
) -> Parts:
    """What the loop needs: data on the devices, compiled steps, where to save and to log."""
    devices, dataset, net, rule = built.devices, built.dataset, built.net, built.method
    record = {"config": config.to_dict()}

    def score(images, labels):
        return make_evaluate(config, dataset, net, devices, images, labels)

    held_out = dataset.validation_images, dataset.validation_labels
    return Parts(
        config=config,
        method=rule,
        net=net,
        steps=make_steps(config, dataset, net, built.tx, rule, devices),
        evaluate=score(dataset.test_images, dataset.test_labels),
        validate=score(*held_out) if len(held_out[1]) else None,
        resident=residents(dataset, built.state.key, devices),
        rate=built.rate,
        per_epoch=built.per_epoch,
        looped=steps.looped(devices),
        save=lambda state: checkpoint.save(manager, state, record),
        collapsed=collapsed_layers(first_counts(net, rule)),
        writer=writer,
        events=lambda: log.read(workdir / "metrics.jsonl")[1],
        scored=steps.ScoringBatches(config, dataset).examples,
        rounds=rounds,
    )


def restore(manager: Any, built: Built, config: ConfigDict, workdir: Path) -> SparseState | None:
    """The newest intact checkpoint, None if there is none. Raises: Stopped, ConfigError."""
    try:
        # Whatever was saved had been pruned.
        restored, _ = checkpoint.restore(manager, begun(built.state), config.to_dict(), log.say)
    except checkpoint.Unreadable as error:
        raise Stopped(str(error)) from error
    if restored is not None:
        step, last = int(restored.step), config.epochs * built.per_epoch
        over = f"{workdir} is finished; another --workdir begins anew."
        log.say(f"Resuming {workdir} at step {step}." if step < last else over)
    return restored


def prune_first(run: Parts, built: Built) -> SparseState:
    """Pruning before training, reported and saved: a killed run does not score again."""
    begin = time.monotonic()
    batches = steps.ScoringBatches(run.config, built.dataset)
    with log.scoring() as show:
        state = prune_at_init(
            run.net,
            built.tx,
            run.method,
            classification,
            built.state,
            batches,
            devices=built.devices,
            show=show,
        )
    active = jax.device_get(active_counts(state.masks))
    run.writer.write("prune", 0, active=active, seconds=time.monotonic() - begin)
    run.save(state)
    return state
