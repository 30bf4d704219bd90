"""The user's optimizer: what it must be, and what a step gives it."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dst.arguments import described
from dst.errors import ConfigError, quoted


def check_optimizer(tx: Any) -> None:
    """Anything that has `init` and `update`, as optax's have."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        call = f"; call it: {tx.__name__}(...)" if inspect.isroutine(tx) else ""
        raise ConfigError(
            f"tx must be an optimizer of optax, as optax.adam(1e-3), not {described(tx)}{call}."
        )


def check_steps(tx: optax.GradientTransformation, params: Any) -> None:
    """Raises: an optimizer that must be given more than a step gives it, such as value_fn.

    Asked with shapes. What else it raises is its own, and raised where it meets all parameters.
    """
    step = lambda p, v: extended(tx).update(p, tx.init(p), p, value=v, grad=p)  # noqa: E731
    value = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        jax.eval_shape(step, jax.eval_shape(lambda: params), value)
    except Exception as error:
        if not isinstance(error, TypeError) or "required keyword-only" not in str(error):
            return
        raise ConfigError(
            f"the optimizer fails with {quoted(error)}; a step gives it the gradient, its state, "
            "the parameters and, if it asks, value= (the loss) and grad=, but no function to call."
        ) from error


def extended(tx: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer as one that may be given value= and grad=, whether it reads them or not."""
    takes = inspect.signature(tx.update).parameters.values()
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes)  # optax.MultiSteps
    if passes_on or isinstance(tx, optax.GradientTransformationExtraArgs):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
