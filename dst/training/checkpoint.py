"""Checkpoints: save, verify, restore, fall back.

Orbax stores and commits the arrays; a SHA-256 beside them tells whether they are still those that
were saved (Orbax itself restores a flipped bit without a word). A damaged checkpoint is skipped
for the one before; one of another run is refused, never skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dst import hosts
from dst.config import OPERATIONAL
from dst.errors import ConfigError
from dst.methods.settings import never_read

Leaves = dict[str, np.ndarray]  # path in the state -> host array; of a typed key its key data


class NotFinite(ArithmeticError):
    """A state with NaN or infinity was to be saved; the sentence names the leaf."""


class Unreadable(RuntimeError):
    """There are checkpoints, but every one is damaged."""


def open_manager(workdir: str | os.PathLike, keep: int | None) -> ocp.CheckpointManager:
    """The manager of `<workdir>/checkpoints`: synchronous saves, the `keep` newest are kept.

    Of several processes the first alone writes, the others' managers only read. So does one that
    keeps None: nothing in the folder is touched, for its run may still be going on.
    """
    folder, here = Path(workdir).resolve() / "checkpoints", jax.process_index()
    if keep is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,  # when `save` returns, the checkpoint is committed
            cleanup_tmp_directories=True,  # of saves that were killed, unless `read_only`
            read_only=keep is None or not hosts.is_first(),
            # Each process for itself, or Orbax would wait for all of them.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}
            ),
        )
        return ocp.CheckpointManager(folder, item_names=("state", "note"), options=options)


def newest(manager: ocp.CheckpointManager) -> int | None:
    """The step of the newest checkpoint, whichever process saved it."""
    with _quiet():
        manager.reload()
    return manager.latest_step()


def save(manager: ocp.CheckpointManager, state: Any, record: Mapping[str, Any]) -> None:
    """Commits `state` (any pytree of arrays with a `step`) and the JSON `record`
    (with its "config") at `state.step`, if this is the first process.

    Raises: `NotFinite` before anything is written; ValueError at a step older than the newest one.
    """
    leaves = _host_leaves(state)
    for path, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(leaf).all():
            raise NotFinite(f"{path} holds NaN or infinity at step {int(state.step)}; not saved.")
    if not hosts.is_first():
        return
    step = int(state.step)
    note = {"sha256": _digest(leaves), "leaves": _describe(state), "record": dict(record)}
    note = json.loads(json.dumps(note))  # as it will be read: tuples become lists
    note["seal"] = _seal(note)
    if step in manager.all_steps():
        if _read_note(manager, step) == note:
            return
        manager.delete(step)
    # Orbax refuses arrays without elements; their shapes are in the note.
    arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}
    args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(note))
    if not manager.save(step, args=args):  # Orbax's way of saying that there is a newer one
        raise ValueError(f"Step {step} is older than the newest checkpoint; restore that first.")


def restore(
    manager: ocp.CheckpointManager,
    like: Any,
    config: Mapping[str, Any],
    say: Callable[[str], Any] = print,
) -> tuple[Any, dict | None]:
    """The newest intact state, structured and placed like `like`, and its record, or (None, None).

    `record["config"]` and `config` must be of one run, see `another_run`. Damaged newer steps are
    said, skipped and deleted.
    Raises: `ConfigError` for a checkpoint of another run, `Unreadable` if every one is damaged.
    """
    with _quiet():
        manager.reload()
    steps = sorted(manager.all_steps(), reverse=True)
    for i, step in enumerate(steps):
        found = restore_step(manager, step, like, config)
        if found is not None:
            with _quiet():  # what the first process deletes the others are told to skip
                for damaged in steps[:i]:  # or they would stand in the way of later saves
                    manager.delete(damaged)
            return found
        if step != steps[-1]:
            say(f"The checkpoint of step {step} is damaged; taking that of step {steps[i + 1]}.")
    if steps:
        raise Unreadable(
            f"Every checkpoint in {manager.directory} is damaged "
            f"(steps {', '.join(map(str, reversed(steps)))}); delete that folder to start afresh."
        )
    return None, None


def restore_step(
    manager: ocp.CheckpointManager, step: int, like: Any, config: Mapping[str, Any]
) -> tuple[Any, dict] | None:
    """The state of this step, as `restore` gives it, and its record; None if it is damaged.

    Raises: `ConfigError` for a checkpoint of another run.
    """
    note = _read_note(manager, step)
    if note is None:
        return None
    _refuse_another_run(manager, step, note, like, config)
    leaves = _read_leaves(manager, step, note, like)
    return None if leaves is None else (_rebuild(like, leaves), note["record"])


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()
) -> tuple | None:
    """(field, old value, new value) of the first field that differs as JSON, None if none does."""
    old, new = json.loads(json.dumps(dict(old))), json.loads(json.dumps(dict(new)))
    for field in [*new, *(field for field in old if field not in new)]:
        was, now = old.get(field, "missing"), new.get(field, "missing")
        if was != now and field not in ignored:
            return field, was, now
    return None


def another_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple | None:
    """`first_difference` of two configs among the fields that make a run what it is.

    A run may be resumed with others of `OPERATIONAL`, and of what its method and model never read.
    """
    free = never_read(new) if {"method", "model"} <= new.keys() else set()
    return first_difference(old, new, {*OPERATIONAL, *free})


def _host_leaves(state: Any) -> Leaves:
    flat = jax.tree.leaves_with_path(state)
    data = [jax.random.key_data(x) if _is_key(x) else x for _, x in flat]
    arrays = (np.asarray(x) for x in jax.device_get(data))
    return dict(zip((_name(path) for path, _ in flat), arrays, strict=True))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(state: Any) -> dict[str, list]:
    def shape_and_dtype(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return [str(leaf.dtype), list(leaf.shape)]

    return {_name(p): shape_and_dtype(x) for p, x in jax.tree.leaves_with_path(state)}


def _digest(leaves: Leaves) -> str:
    sha = hashlib.sha256()
    for path, leaf in leaves.items():
        sha.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


def _seal(note: Mapping[str, Any]) -> str:
    # Without it a flipped bit in the JSON would look like another config, which is refused.
    unsealed = {key: value for key, value in note.items() if key != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def _read_note(manager: ocp.CheckpointManager, step: int) -> dict | None:
    with _quiet():
        try:
            note = manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore())).note
            return note if note["seal"] == _seal(note) else None
        except Exception:  # whatever Orbax makes of damaged files
            return None


def _read_leaves(
    manager: ocp.CheckpointManager, step: int, note: Mapping[str, Any], like: Any
) -> Leaves | None:
    leaves = _host_leaves(like)
    arrays = {path: np.empty_like(leaf) for path, leaf in leaves.items() if leaf.size}
    with _quiet():
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
            leaves |= manager.restore(step, args=args).state
            return leaves if note["sha256"] == _digest(leaves) else None
        except MemoryError:
            raise
        except Exception:  # whatever Orbax makes of damaged files
            time.sleep(0.5)  # until the reads still under way have complained, see _quiet
            return None


def _refuse_another_run(
    manager: ocp.CheckpointManager,
    step: int,
    note: Mapping[str, Any],
    like: Any,
    config: Mapping[str, Any],
) -> None:
    difference = another_run(note["record"]["config"], config)
    if difference:
        field, was, now = difference
        raise ConfigError(
            f"{manager.directory} holds a run with {field} = {was!r}, but {field} is {now!r} now; "
            "choose another --workdir or the same settings."
        )
    difference = first_difference(note["leaves"], _describe(like))
    if difference:
        path, was, now = (" ".join(map(str, x)) if isinstance(x, list) else x for x in difference)
        raise ConfigError(
            f"{path} is {was} in the checkpoint of step {step} in {manager.directory}, "
            f"but {now} in this run; choose another --workdir."
        )


def _rebuild(like: Any, leaves: Leaves) -> Any:
    def place(value: np.ndarray, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return value
        if _is_key(leaf):
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
        return jax.device_put(value, leaf.sharding if leaf.committed else None)

    old, tree = jax.tree.flatten(like)
    new = [place(x, leaf) for x, leaf in zip(leaves.values(), old, strict=True)]
    return jax.tree.unflatten(tree, new)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Orbax tells pages about damaged files, by logging and by tracebacks of the reads that were
    # still under way; one sentence is enough.
    level, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logging.disable(level)
