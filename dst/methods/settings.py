"""How the fields of a config become a method, and which of them it never reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dst.config import default
from dst.connections.execution import EXECUTIONS
from dst.data.table import DATASETS
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.methods.before import BEFORE
from dst.methods.combinations import check, check_execution, memories, unread
from dst.methods.fields import FIELDS, IN_CONFIG, OWN
from dst.methods.table import METHODS, method, row_of
from dst.models.table import never_reads

END_EPOCH = 120.0  # the paper's second learning rate drop; ITOP explores to the last epoch


def resolve(config: ConfigDict) -> ConfigDict:
    """A locked copy in which what follows from other fields is filled in.

    A field that is None has the method's own value, its source's; `method='dense'` trains every
    connection, so its sparsity is 0, whatever the file that it overrides says.
    """
    resolved = config.copy_and_resolve_references()
    own, to_the_end = row_of(config.method, config.sparsity), METHODS[config.method].to_the_end
    for field, name in OWN.items():
        if resolved[field] is None:
            resolved[field] = getattr(own, name)
    if resolved.rewire_end_epoch is None:
        resolved.rewire_end_epoch = float(config.epochs) if to_the_end else END_EPOCH
    if resolved.method == "dense":
        resolved.sparsity = 0.0
    return resolved.lock()


def method_of(config: ConfigDict, steps_per_epoch: int) -> Method:
    """The row of Table 1 that a resolved config names, its epochs turned into steps.

    What the method never reads keeps the row's value.
    """
    ignored = unread_fields(config)
    options = {name: config[field] for field, name in FIELDS.items() if field not in ignored}
    row = row_of(config.method)
    if "explored" in options:
        options["explored"] |= row.explored
    if "momentum" in memories(row):
        options["momentum"] = config.momentum
    options |= {"every": config.rewire_every, "end": end_of(config, steps_per_epoch)}
    try:
        return method(config.method, config.sparsity, **options)
    except ConfigError as error:  # which names a field of the method
        name, _, rest = str(error).partition(" ")
        raise ConfigError(f"{IN_CONFIG.get(name, name)} {rest}") from None


def end_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """The step at which a resolved config's rewires end. Raises: none before it."""
    end = round(config.rewire_end_epoch * steps_per_epoch)
    if end < 1:
        raise ConfigError(
            f"rewire_end_epoch must be at least one step of an epoch's {steps_per_epoch}, "
            f"not {config.rewire_end_epoch}."
        )
    return end


def never_read(config: Mapping[str, Any]) -> set[str]:
    """Fields that a run of this resolved config's model and method never reads."""
    fields = never_reads(config["model"])
    if not row_of(config["method"]).moves:
        fields |= {"rewire_every", "rewire_end_epoch"}
    if config["method"] == "dense":
        fields.add("sparsity")
    return fields | unread_fields(config)


def unread_fields(config: Mapping[str, Any]) -> set[str]:
    """Fields of a resolved config that its method never reads, the schedule aside."""
    row = row_of(config["method"], config["sparsity"])
    ignored = unread(row._replace(initial=config.get("initial_sparsity", row.initial)))
    fields = {field for field, name in FIELDS.items() if name in ignored}
    if not (row.before and BEFORE[row.before].gradients):
        fields.add("score_batches")
    if config.get("init") == "model":
        fields.add("init_gain")
    if row.name != "lottery":
        fields.add("lottery_levels")
    return fields


def unread_message(config: ConfigDict) -> str | None:
    """A sentence on what a resolved config sets and its method never reads; None if nothing.

    Said once and not refused: a sweep gives the same flags to many methods.
    """
    usual = default()
    usual.method = config.method
    usual = resolve(usual)
    fields = [field for field in sorted(unread_fields(config)) if config[field] != usual[field]]
    subject = f"Method {config.method!r}"
    if not config.fuse and not EXECUTIONS[config.execution].fuses:
        fields, subject = [*fields, "fuse"], f"{subject} in {config.execution} execution"
    if not fields:
        return None
    listed = ", ".join(f"{field}={config[field]!r}" for field in fields)
    return f"{subject} does not read {listed}, which changes nothing."


def check_config(config: ConfigDict) -> None:
    """What `config.validate` cannot see field by field. Raises: as `method` and `check_execution`,
    a ramp that the run ends before, Lottery's levels that do not begin with every connection."""
    images = DATASETS[config.dataset].train_images - config.validation_size
    config, per_epoch = resolve(config), images // config.batch_size
    check(row_of(config.method, config.sparsity))  # a user's row, before it is asked what it reads
    made = method_of(config, per_epoch)
    check_execution(made, config.execution)
    if made.ramps and made.end >= config.epochs * per_epoch:
        raise ConfigError(
            f"rewire_end_epoch must be below epochs, {config.epochs}, for method {made.name!r} "
            f"from sparsity {made.first_sparsity}, which reaches {made.sparsity} then, "
            f"not {config.rewire_end_epoch}."
        )
    if made.name == "lottery" and made.sparsity and config.lottery_levels[:1] != (0.0,):
        raise ConfigError(
            "lottery_levels must begin with 0.0, as its first training is that of every "
            f"connection, not {config.lottery_levels!r}."
        )
