"""The training run: build, restore, prune, run; Lottery's rounds are a chain of such runs.

Nothing random is remembered between steps: every number follows from (key, step), so a run that
is killed and started again ends bit for bit as if it had not been.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dst import checkpoint, data, log, models, steps
from dst.config import check_devices
from dst.evaluate import make_evaluate
from dst.loop import Parts, Stopped, loop
from dst.lottery import levels, ticket, winning
from dst.masks import thinned
from dst.network import Network, network
from dst.products import tier
from dst.scores import prune_at_init
from dst.state import SparseState, active_counts, first_counts, init_state
from dst.steps import Resident, classification, make_steps, method_of, optimizer, schedule
from dst.update import replicate

Array = jax.Array


def train(config: ConfigDict, workdir: Path) -> None:
    """Run `config` in `workdir`, from its newest checkpoint if there is one.

    Lottery's rounds before the last lie in `workdir/rounds`, each a run of its own.
    Errors: ConfigError (bad input, another run's workdir), Stopped (NaN, every checkpoint damaged).
    """
    if config.method != "lottery":
        run_once(config, workdir)
        return
    sparsities = levels(config.sparsity, config.lottery_levels)
    masks = None
    for n, (level, following) in enumerate(zip(sparsities, (*sparsities[1:], None), strict=True)):
        folder = workdir / "rounds" / f"{level:.4g}" if following is not None else workdir
        log.say(f"Round {n + 1} of {len(sparsities)}: sparsity {level:.4g}, in {folder}.")
        this = config.copy_and_resolve_references()
        this.sparsity = level
        net, state, done = run_once(this.lock(), folder, masks)
        if not done:
            return
        if following is not None:
            masks = winning(net, state, following)


def run_once(
    config: ConfigDict, workdir: Path, masks: dict[str, Array] | None = None
) -> tuple[Network, SparseState, bool]:
    """One run, with Lottery's `masks` from their ticket.

    The network, its last state, and whether the run is over.
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
    tx, key = optimizer(config, rate), jax.random.key(config.seed)
    fresh = init_state(net, tx, rule, key) if masks is None else ticket(net, tx, rule, key, masks)
    fresh = replicate(fresh, devices)

    # ---- Restore
    manager = checkpoint.open_manager(workdir, config.checkpoints_kept)
    restored = restore(manager, fresh, config, workdir)
    state = fresh if restored is None else restored

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
    with log.open_log(workdir, header, -1 if restored is None else int(state.step)) as writer:
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
            if rule.before and restored is None:
                batches = steps.ScoringBatches(config, dataset)
                state = replicate(prune_first(parts, state, tx, batches, devices), devices)
            state, done = loop(parts, state)
        except ArithmeticError as error:
            newest = manager.latest_step()
            kept = "no checkpoint was saved" if newest is None else f"the last good one is {newest}"
            raise Stopped(f"{error}; {kept} (a lower learning_rate may help).") from error
    log.plot(workdir)
    return net, state, done


def restore(
    manager: Any, state: SparseState, config: ConfigDict, workdir: Path
) -> SparseState | None:
    """The newest intact checkpoint, None if there is none. Errors: Stopped, ConfigError."""
    try:
        restored, _ = checkpoint.restore(manager, state, config.to_dict(), log.say)
    except checkpoint.Unreadable as error:
        raise Stopped(str(error)) from error
    if restored is not None:
        log.say(f"Resuming {workdir} at step {int(restored.step)}.")
    return restored


def prune_first(run: Parts, state: SparseState, tx, batches, devices: list) -> SparseState:
    """Pruning before training, reported and saved: a killed run does not score again."""
    begin = time.monotonic()
    with log.scoring() as show:
        state = prune_at_init(
            run.net, tx, run.method, classification, state, batches, devices=devices, show=show
        )
    active = jax.device_get(active_counts(state.masks))
    run.writer.write("prune", 0, active=active, seconds=time.monotonic() - begin)
    run.save(state)
    return state
