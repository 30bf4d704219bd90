"""Whether a layer of a kind from outside is what its module computes, found by trying both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from dst.errors import quoted
from dst.layers.base import Layer
from dst.layers.conv import Conv

Array = jax.Array

MOST = 16  # connections whose gradient is compared


def misfit(path: str, layer: Any, module: Any, h: Any) -> str | None:
    """Why `layer` is not this module, called alone on an h of this shape and type; None if it is.

    On random numbers: y, that it is linear in the kernel, and all that the kind computes otherwise
    than the protocol's defaults.
    """
    kind, rng = type(layer).__name__, np.random.default_rng(0)
    draw = lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype)  # noqa: E731
    if not isinstance(layer, Layer) or layer.path != path:
        return f"the describe of its kind gives {layer!r}, no layer of this path"
    if not jnp.issubdtype(h.dtype, jnp.floating):
        return f"its input is {h.dtype}; allowed are floats"
    try:
        hash(layer)
    except TypeError as error:
        return f"{kind} has a field that cannot be hashed ({quoted(error)})"
    try:
        variables = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), h))
        variables, x = jax.tree.map(draw, variables), draw(h)
        y = module.apply(variables, x)
    except Exception as error:
        return f"its module does not run alone ({quoted(error)})"
    if why := _other_variables(layer, variables):
        return why
    try:
        return next(_differences(layer, module, variables["params"], x, y), None)
    except Exception as error:
        return f"{kind} fails with {quoted(error)}"


def _other_variables(layer: Layer, variables: Any) -> str | None:
    """Why the module's variables are not a kernel of the layer's shape and a bias."""
    kernel = variables.get("params", {}).get("kernel")
    if getattr(kernel, "shape", None) != layer.shape or len(layer.dims) < 2:
        shape = getattr(kernel, "shape", "missing")
        return f"its kernel is {shape}, where {type(layer).__name__} describes {layer.shape}"
    if kernel.dtype != jnp.float32:
        return f"its kernel is {kernel.dtype}, allowed is float32"
    names = {f"{name}/{leaf}" for name, c in variables.items() for leaf in c}
    if more := sorted(names - {"params/kernel", "params/bias"}):
        return f"it has {', '.join(more)} beside kernel and bias"
    return None


def _differences(layer: Layer, module: Any, params: Any, h: Array, y: Array) -> Iterator[str]:
    """What is not as the module, which gives y, and the defaults have it, a sentence each."""
    kind, kernel, bias = type(layer).__name__, params["kernel"], params.get("bias")
    h, y, kernel = layer.inputs(h), layer.units(y), kernel.reshape(layer.dims)
    low, kernel_low, bias = promote_dtype(h, kernel, bias, dtype=getattr(module, "dtype", None))
    for name, apply in _products(layer).items():
        found = apply(low, kernel_low)
        if bias is not None and found.shape[-1:] == (bias.size,):
            found += bias.reshape((1,) * (found.ndim - 1) + (-1,))
        if found.shape != y.shape:
            yield f"{kind}.{name} gives {found.shape}, the module {y.shape}"
        elif not _close(found, y):
            yield f"{kind}.{name} is another product than the module's"
    other = kernel**2
    if not _close(layer.apply(h, kernel + other), layer.apply(h, kernel) + layer.apply(h, other)):
        yield f"{kind}.apply is not linear in the kernel"
    for x, n in ((h, layer.channels), (y, layer.n_out)):
        if (shape := layer.sums(x, jnp.float32).shape) != (n,):
            yield f"{kind}.sums gives {shape} of {x.shape}, not one for each of {n} units"
    G = Layer.kernel_gradient(layer, *Layer.by_unit(layer, h, y)).reshape(-1, layer.n_out)
    column = jnp.arange(min(MOST, layer.columns), dtype=jnp.int32)
    output, units = column % layer.n_out, layer.by_unit(h, y)
    if not _close(layer.gradient_at(*units, column, output), G[column, output]):
        yield f"{kind}.gradient_at is not the gradient of its apply"
    corner, size = [*jnp.zeros(4, jnp.int32)], (min(MOST, layer.n_in), min(MOST, layer.n_out))
    if not _close(layer.gradient_block(*units, corner, size), G[: size[0], : size[1]]):
        yield f"{kind}.gradient_block is not the gradient of its apply"


def _products(layer: Layer) -> dict[str, Any]:
    """All ways in which y may be computed."""
    found = {"apply": layer.apply, "apply_fast": layer.apply_fast}
    if layer.matrix:
        found["matrix"] = lambda h, kernel: jnp.tensordot(h, kernel, 1)
    if layer.convolves:
        found["convolves"] = lambda h, kernel: Conv.apply(cast(Conv, layer), h, kernel)
    return found


def _close(a: Array, b: Array) -> bool:
    """Equal but for rounding, as a share of the largest number."""
    tolerance = max(1e-4, 16 * float(jnp.finfo(b.dtype).eps))
    return bool(jnp.abs(a - b).max() <= tolerance * jnp.abs(b).max())
