"""What a call is given, looked at before anything compiles: one sentence for each mistake."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dst.errors import ConfigError


def check_is(name: str, value: Any, kind: type, made_by: str) -> None:
    """`ConfigError` if the argument `name` is not of that kind, which `made_by` gives."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be what {made_by} gives, not {described(value)}.")


def described(value: Any) -> str:
    """A value in a few words: a short one as it is, an array's type and shape, else its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if inspect.isclass(value) or inspect.isroutine(value):
        what = "class" if inspect.isclass(value) else "function"
        return f"the {what} {value.__name__}"
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"a value of type {where}{kind.__qualname__}"


# ---------------------------------------------------------------------------------------- network
def check_model(model: Any) -> None:
    """A module of flax.linen."""
    if not isinstance(model, nn.Module):
        why = ""
        if inspect.isclass(model) and issubclass(model, nn.Module):
            why = f"; make one: {model.__name__}(...)"
        elif any(kind.__module__.startswith("flax.nnx") for kind in type(model).__mro__):
            why = "; modules of flax.nnx cannot be intercepted, which dst needs"
        raise ConfigError(f"model must be a flax.linen module, not {described(model)}{why}.")


def check_network(model: Any, args: tuple, kwargs: Mapping, execution: Any, fuse: Any) -> None:
    """The arguments of `dst.network`, but those that choose layers."""
    check_model(model)
    if execution not in ("masked", "sparse"):
        raise ConfigError(f"execution must be 'masked' or 'sparse', not {execution!r}.")
    if not isinstance(fuse, bool):
        raise ConfigError(f"fuse must be True or False, not {described(fuse)}.")
    if not args and not kwargs:
        raise ConfigError("dst.network needs an example of the model's inputs: network(model, x).")
    for arg in args:
        for leaf in jax.tree.leaves(arg):
            number = isinstance(leaf, int | float) and not isinstance(leaf, bool) and leaf is arg
            if not number and not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                inside = "" if leaf is arg else f" in a {type(arg).__name__}"
                raise ConfigError(
                    "example inputs must be arrays or jax.ShapeDtypeStruct, not "
                    f"{described(leaf)}{inside}; what is no input goes by keyword, as train=True."
                )


# ------------------------------------------------------------------------------------------- state
def check_key(key: Any) -> None:
    """One random key, new or old."""
    new, old = is_key(key), getattr(key, "dtype", None) == np.uint32
    if not (new and key.shape == ()) and not (old and key.ndim == 1):
        raise ConfigError(f"key must be one key, as jax.random.key(0), not {described(key)}.")


def check_devices(devices: Any) -> None:
    """None for all, or some."""
    some = isinstance(devices, Sequence) and all(isinstance(d, jax.Device) for d in devices)
    if devices is not None and not (some and devices):
        raise ConfigError(
            f"devices must be a list of devices, as jax.devices()[:2], not {described(devices)}."
        )


# -------------------------------------------------------------------------------------------- loss
def takes_key(loss: Any) -> bool:
    """Whether the loss has a parameter `key` that must be given. Raises: what is no loss."""
    if not callable(loss):
        raise ConfigError(f"loss must be a function of (apply, batch), not {described(loss)}.")
    try:
        parameters = inspect.signature(loss).parameters
    except ValueError:  # of a builtin
        return False
    key = parameters.get("key")
    keys = {"key": None} if key and key.default is key.empty and key.kind in _BY_KEYWORD else {}
    try:
        inspect.signature(loss).bind(None, None, **keys)
    except TypeError as error:
        names = ", ".join(map(str, parameters.values()))
        raise ConfigError(
            f"loss must be a function of (apply, batch) or (apply, batch, key), not of ({names})."
        ) from error
    return bool(keys)


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


OWN_METRICS = {"loss", "finite"}  # of a step, beside those of the loss


def check_returned(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """(loss, metrics) of what a loss returns, if it is that: traced numbers."""
    pair = isinstance(returned, tuple | list) and len(returned) == 2
    if not pair or not isinstance(returned[1], Mapping):
        found = described(returned)
        if pair:
            found = f"({described(returned[0])}, {described(returned[1])})"
        raise ConfigError(f"loss must return (mean loss, {{metric: mean}}), not {found}.")
    value, metrics = returned
    if not _is_scalar(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ConfigError(
            f"loss must return one number, the mean over the batch, not {described(value)}."
        )
    for name in OWN_METRICS & metrics.keys():
        raise ConfigError(
            f"metric {name!r} must have another name: what a step returns has its own {name!r}."
        )
    for path, metric in jax.tree.leaves_with_path(dict(metrics)):
        if not _is_scalar(metric):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigError(
                f"metric {name!r} must be one number, the mean over the batch, not "
                f"{described(metric)}."
            )
    return value, metrics


def _is_scalar(value: Any) -> bool:
    number = isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array)
    return number and jnp.shape(value) == () and not is_key(value)


def is_key(value: Any) -> bool:
    """Whether it is a new-style random key, or an array of them."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def form(tree: Any) -> str:
    """How a pytree looks, in short: '(ScaleByAdamState, EmptyState)' and its number of arrays."""
    name = lambda part: type(part).__name__  # noqa: E731
    parts = tree if type(tree) in (tuple, list) else (tree,)
    return f"({', '.join(map(name, parts))}) of {len(jax.tree.leaves(tree))} arrays"
