"""Why a layer cannot be sparse, whatever its kind: what a module, or Flax around it, changes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

# The fields of the built-in kinds' modules that every product of `dst` honours or an `obstacle`
# looks at. A sparse layer's weights are drawn as in Sec. 4.1, not by kernel_init.
FIELDS = {
    *("parent", "name", "features", "use_bias", "dtype", "param_dtype", "precision", "kernel_init"),
    *("bias_init", "promote_dtype", "dot_general", "dot_general_cls", "kernel_size", "strides"),
    *("padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask"),
    *("conv_general_dilated", "conv_general_dilated_cls", "axis", "batch_dims"),
}


@functools.cache
def _replaced(cls: type[nn.Module], base: type[nn.Module]) -> str | None:
    """A method of `base` that its subclass `cls` replaces, so that its product may be another's."""
    fields = {field.name for field in dataclasses.fields(cls)}
    methods = {name for name in dir(base) if not name.startswith("__")}
    for name in sorted(methods - fields | {"__call__", "__getattr__", "__getattribute__"}):
        own, original = (inspect.getattr_static(c, name, None) for c in (cls, base))
        # Flax's own bookkeeping on each class is neither.
        if own is not original and (inspect.isroutine(original) or isinstance(original, property)):
            return name
    return None


def changed(module: Any, base: Any) -> str | None:
    """Why this module may compute another product than `base`, its class in Flax; None if not."""
    cls: Any = type(module)
    if name := _replaced(cls, base):
        why = f"{cls.__name__} overrides {name}"
        return f"its kernel is reparameterised: {why}" if name == "param" else why
    if module.promote_dtype is not base.promote_dtype:
        return "a custom promote_dtype"
    for field in dataclasses.fields(base):
        if field.name not in FIELDS and getattr(module, field.name) != field.default:
            return f"{field.name} {getattr(module, field.name)!r}, which dst does not know"
    return None


def mapped(module: Any) -> str | None:
    """Why this layer's kernel is not the model's parameter; None if it is.

    `nn.WeightNorm` and `nn.SpectralNorm` map variables too. Nothing but Flax's path says so.
    """
    if not any("map_variables(" in part for part in module.scope.debug_path):
        return None
    return "its kernel is reparameterised by a norm or by nn.map_variables"


def jitted(module: Any) -> bool:
    """Whether this module runs under `nn.jit`. Nothing but Flax's path says so."""
    return module.scope is not None and any("jit(" in part for part in module.scope.debug_path)


def unlike_float32(module: Any) -> str | None:
    """Why this layer's kernel cannot be `dst`'s, which is float32; None if it can."""
    dtype = jnp.dtype(getattr(module, "param_dtype", jnp.float32))
    if dtype == jnp.float32:
        return None
    return f"param_dtype is {dtype}, allowed is float32 (dtype= sets that of the computation)"
