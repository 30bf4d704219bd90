"""Which backend computes: the only place that asks for the platform and for the C++ kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dst.connections.backends import cpp as kernels
from dst.layers.base import Layer

Array = jax.Array


def on_cpu() -> bool:
    """Whether the C++ kernels run here: on a CPU, if they were built."""
    return jax.default_backend() == "cpu" and kernels.available()


def compiled(values: Array) -> bool:
    """Whether the C++ kernels compute this: where they run, in float32."""
    return on_cpu() and values.dtype == jnp.float32


def tier() -> str:
    """Which of the two tiers computes here, in words, for the log."""
    if jax.default_backend() != "cpu":
        return "pure JAX"
    return "compiled kernels" if kernels.available() else f"pure JAX, as {kernels.why_not()}"


def covered(layer: Layer, values: Any, x: Any) -> bool:
    """Whether the C++ kernels convolve this: a convolution, `compiled`, of 32 x 32 taps at most.

    XLA fails to compile their layout for a map of no images.
    """
    floats = layer.convolves and x.dtype == jnp.float32 and compiled(values)
    return floats and max(layer.dims[-4:-2]) <= kernels.MOST_TAPS and x.size > 0
