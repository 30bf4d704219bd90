"""Why a layer cannot be sparse: what makes its product another than y = W h + b."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

# The fields of `nn.Dense` and `nn.Conv` that every product of `dst` honours or `obstacle` looks at.
# A sparse layer's weights are drawn as in Sec. 4.1, not by kernel_init.
FIELDS = {
    *("parent", "name", "features", "use_bias", "dtype", "param_dtype", "precision", "kernel_init"),
    *("bias_init", "promote_dtype", "dot_general", "dot_general_cls", "kernel_size", "strides"),
    *("padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask"),
    *("conv_general_dilated", "conv_general_dilated_cls"),
}


def pair(value: Any) -> tuple[int, int]:
    """Strides or dilations as Flax takes them: None, a number or two."""
    if value is None:
        return (1, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


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


def obstacle(module: Any) -> str | None:
    """Why no other product can stand for this layer's own; None if it is the plain one."""
    base: Any = nn.Dense if isinstance(module, nn.Dense) else nn.Conv
    cls: Any = type(module)
    if name := _replaced(cls, base):
        why = f"{cls.__name__} overrides {name}"
        return f"its kernel is reparameterised: {why}" if name == "param" else why
    if module.promote_dtype is not base.promote_dtype:
        return "a custom promote_dtype"
    for field in dataclasses.fields(base):
        if field.name not in FIELDS and getattr(module, field.name) != field.default:
            return f"{field.name} {getattr(module, field.name)!r}, which dst does not know"
    return _dense_obstacle(module) if base is nn.Dense else _conv_obstacle(module)


def _dense_obstacle(module: nn.Dense) -> str | None:
    custom = module.dot_general is not None or module.dot_general_cls is not None
    return "a custom dot_general" if custom else None


def _conv_obstacle(module: nn.Conv) -> str | None:
    size = module.kernel_size
    if isinstance(size, int) or len(size) != 2:
        return f"kernel_size {size}: only 2-D convolutions are covered"
    if module.feature_group_count != 1:
        return f"feature_group_count {module.feature_group_count}"
    if pair(module.input_dilation) != (1, 1):
        return f"input_dilation {module.input_dilation}"
    if isinstance(module.padding, str) and module.padding not in ("SAME", "VALID"):
        return f"padding {module.padding!r}"
    if module.mask is not None:
        return "a mask= of its own"
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "a custom conv_general_dilated"
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
    dtype = jnp.dtype(module.param_dtype)
    if dtype == jnp.float32:
        return None
    return f"param_dtype is {dtype}, allowed is float32 (dtype= sets that of the computation)"
