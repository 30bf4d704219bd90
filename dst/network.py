"""A network as `dst` sees it: an unmodified Linen model and the kernels in it that are sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dst.errors import ConfigError
from dst.layers import Layer, kind_of
from dst.layers.base import name_of
from dst.sown import Path

Sparse = TypeVar("Sparse")


class Left(NamedTuple):
    """A kernel that stays dense, or another weight of two axes or more."""

    shape: tuple[int, ...]
    why: str

    @property
    def size(self) -> int:
        """Its weights."""
        return math.prod(self.shape)


class Network(NamedTuple):
    """A model, its sparse layers sorted by path, and how it is called."""

    model: nn.Module
    layers: dict[str, Layer]
    dense: dict[str, Left]  # by the parameter's path
    args: tuple[Any, ...]  # the example inputs, as shapes
    kwargs: dict[str, Any]
    execution: str = "masked"  # or "sparse"
    sown: frozenset[Path] = frozenset()  # what the model sows, which no state holds
    fuse: bool = True  # whether sparse kernels may compute several operations at once

    @property
    def possible(self) -> int:
        """N, the number of possible connections |W|."""
        return sum(layer.size for layer in self.layers.values())

    @property
    def weights(self) -> int:
        """N and what stays dense: all parameters but biases and others of one axis."""
        return self.possible + sum(left.size for left in self.dense.values())

    def overall(self, sparsity: float) -> float:
        """The sparsity of all weights, from that of the layers that are sparse."""
        return sparsity * self.possible / self.weights

    def summary(self, state: Any = None) -> None:
        """Prints a row a weight of two axes or more, and the totals; of a state its connections.

        The overall sparsity counts what stays dense, too.
        """
        counts = {} if state is None else _counts(state.masks)
        print("\n".join(_rows(self, counts)))


def _counts(connections: Any) -> dict[str, int]:
    paths = [part.layer.path for part in connections.parts]
    return dict(zip(paths, map(int, connections.counts()), strict=True))


def _rows(net: Network, counts: Mapping[str, int]) -> list[str]:
    """The lines of `Network.summary`, columns aligned."""
    table = [("kernel", "kind", "shape", "possible", "connections")]
    for path, layer in net.layers.items():
        kind, size = name_of(layer.module_type), f"{layer.size:,}"
        held = f"{counts[path]:,} ({counts[path] / layer.size:.2%})" if counts else "sparse"
        table.append((f"{path}/kernel", kind, _shape(layer.shape), size, held))
    for name, left in net.dense.items():
        table.append((name, "", _shape(left.shape), f"{left.size:,}", f"dense: {left.why}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    widths[-1] = 0
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    N, weights = net.possible, net.weights
    lines.append(f"{N:,} of {weights:,} weights can be sparse, {N / weights:.2%}.")
    if counts:
        active = sum(counts.values())
        lines.append(
            f"Sparsity {1 - active / N:.2%} of these, overall {(N - active) / weights:.2%}: "
            f"{active:,} connections and {weights - N:,} dense weights."
        )
    return lines


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def layer_path(module: nn.Module) -> str:
    """'a/b' for the module whose parameters are params['a']['b']."""
    return "/".join(module.path)


def is_foreign(module: nn.Module) -> bool:
    """Whether a layer is applied to variables of its own, where the model's kernels do not exist.

    As `nn.Dense(3).apply(variables, h)` inside a model, whose path may be that of another layer.
    """
    return module.has_variable("params", "kernel")


def layer_call(
    layers: Mapping[str, Sparse], args: tuple, kwargs: Mapping[str, Any], context: Any
) -> tuple[Sparse, Any] | None:
    """Of an intercepted call: which of `layers`, by path, it is, and its input; None if none.

    A layer that is applied to variables of its own may have the path of another: `is_foreign`.
    """
    module = context.module
    if context.method_name != "__call__" or kind_of(module) is None:
        return None
    layer = layers.get(layer_path(module))
    return None if layer is None else (layer, input_of(module, args, kwargs))


def input_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """h, however a layer is called. Raises: ConfigError if it is called with more."""
    given = [*args, *kwargs.values()]
    if len(given) != 1:
        refuse(layer_path(module), f"it is called with {len(given)} arguments, not with h alone")
    return given[0]


def refuse(path: str, why: str) -> NoReturn:
    """Raises ConfigError: a layer that cannot be sparse, and how to leave it dense."""
    raise ConfigError(
        f"layer {path!r} cannot be sparse: {why}; leave it dense with dense={path!r}."
    )


def skipping(
    layers: Mapping[str, Layer],
    see: Callable[[Layer, Any, Any, jax.Array, Callable[[], Any]], Any],
    another: Callable[[Any], bool] = is_foreign,
) -> Any:
    """A context in which sparse layers give zeros, their kernels untouched.

    see(layer, module, h, y, call) is told of each: y are the zeros, call() is what the module would
    do. What is `another` module, of the same path, runs as ever.
    """

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        found = layer_call(layers, args, kwargs, context)
        if found is None or another(module):
            return next_fun(*args, **kwargs)
        layer, h = found
        y = zero_output(layer, module, h)
        see(layer, module, h, y, lambda: next_fun(*args, **kwargs))
        return y

    return nn.intercept_methods(interceptor)


def zero_output(layer: Layer, module: Any, h: Any) -> jax.Array:
    """Zeros in the shape of the layer's output, its kernel untouched."""
    h, given = jnp.asarray(h), getattr(module, "param_dtype", jnp.float32)
    dtype = getattr(module, "dtype", None) or jnp.promote_types(h.dtype, given)
    y = layer.output(jax.eval_shape(layer.inputs, h), dtype)
    return layer.outputs(jnp.zeros(y.shape, y.dtype))
