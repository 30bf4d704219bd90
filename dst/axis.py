"""The axis of the devices, whatever a model calls it."""

from __future__ import annotations

import re
from typing import Any

import jax

from dst.errors import ConfigError

AXIS = "devices"  # of every step of training; nothing else runs on an axis


def bound(name: str) -> bool:
    """Whether an axis of that name is there, in a step or by the model's own nn.vmap."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def across_devices(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    """Interceptor: an axis that a model's normalisation names, such as "batch", is the devices'.

    As BatchNorm(axis_name="batch") asks for: statistics are those of the whole batch in a step,
    and in prediction those of what is given. An axis that the model itself makes stays its own.
    Raises: groups that are not of the devices, any other use of an axis that does not exist.
    """
    module = context.module
    names = _names(module)
    if all(map(bound, names)):
        return _call(next_fun, args, kwargs, module)
    there = dict.fromkeys(name if bound(name) else AXIS for name in names)
    # On one device there is nothing to average: so it is plain batch normalisation, and fused.
    there.pop(AXIS, None) if not bound(AXIS) or jax.lax.axis_size(AXIS) == 1 else _groups(module)
    given = module.axis_name
    object.__setattr__(module, "axis_name", tuple(there) or None)  # modules are frozen
    try:
        return _call(next_fun, args, kwargs, module)
    finally:
        object.__setattr__(module, "axis_name", given)


def _names(module: Any) -> tuple[str, ...]:
    """The axes of a module that is made as those of flax.linen.normalization."""
    if not {"axis_name", "axis_index_groups"} <= type(module).__dataclass_fields__.keys():
        return ()
    names = module.axis_name
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _groups(module: Any) -> None:
    groups, devices = module.axis_index_groups, jax.lax.axis_size(AXIS)
    if groups is not None and sorted(i for group in groups for i in group) != [*range(devices)]:
        raise ConfigError(
            f"axis_index_groups of {type(module).__name__} {'/'.join(module.path)!r} must hold "
            f"each of the {devices} devices once, not {groups}."
        )


def _call(next_fun: Any, args: tuple, kwargs: dict, module: Any) -> Any:
    try:
        return next_fun(*args, **kwargs)
    except NameError as error:
        found = re.search(r"unbound axis name: (\w+)", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"{type(module).__name__} {'/'.join(module.path)!r} uses the axis {found[1]!r}, which "
            f"does not exist; the devices are the axis {AXIS!r}, in steps of training only (which "
            "axis_name of flax's normalisation means whatever it says)."
        ) from error
