"""A network as `dst` sees it: an unmodified Linen model and the kernels in it that are sparse."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from dst.config import ConfigError, check_field

LOGGER = logging.getLogger("dst")


class Layer(NamedTuple):
    """A sparse kernel: (n_in, n_out) of `nn.Dense`, (kx, ky, n_in, n_out) of `nn.Conv`."""

    path: str
    kind: str  # "dense" | "conv"
    shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    dilation: tuple[int, int] = (1, 1)

    @property
    def n_in(self) -> int:
        return self.shape[-2]

    @property
    def n_out(self) -> int:
        return self.shape[-1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def pads(self, spatial: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Rows and columns of zeros around an input of this spatial shape."""
        if not isinstance(self.padding, str):
            return self.padding
        extent = [(k - 1) * d + 1 for k, d in zip(self.shape[:2], self.dilation, strict=True)]
        return tuple(lax.padtype_to_pads(spatial, extent, self.strides, self.padding))

    def convolve(self, h: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution: (..., H, W, n_in), (kx, ky, n_in, n_out) -> (..., H', W', n_out)."""
        y = lax.conv_general_dilated(
            h.reshape(-1, *h.shape[-3:]),
            kernel,
            self.strides,
            self.pads(h.shape[-3:-1]),
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(*h.shape[:-3], *y.shape[1:])


class Network(NamedTuple):
    """A model, its sparse layers sorted by path, and how it is called."""

    model: nn.Module
    layers: dict[str, Layer]
    dense: dict[str, str]  # path of a kernel that stays dense -> why
    args: tuple[Any, ...]  # the example inputs, as shapes
    kwargs: dict[str, Any]
    execution: str = "masked"  # or "sparse"

    @property
    def possible(self) -> int:
        """N, the number of possible connections |W|."""
        return sum(layer.size for layer in self.layers.values())


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer whose kernel can be sparse."""
    return isinstance(module, nn.Dense | nn.Conv)


def layer_path(module: nn.Module) -> str:
    """'a/b' for the module whose parameters are params['a']['b']."""
    return "/".join(module.path)


def _pair(value: Any) -> tuple[int, int]:
    if value is None:
        return (1, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


def obstacle(module: Any) -> str | None:
    """Why the probes cannot stand for this layer's product; None if they can."""
    base: Any = nn.Dense if isinstance(module, nn.Dense) else nn.Conv
    if type(module).__call__ is not base.__call__:
        return f"{type(module).__name__} overrides __call__"
    if base is nn.Dense:
        custom = module.dot_general is not None or module.dot_general_cls is not None
        return "a custom dot_general" if custom else None
    size = module.kernel_size
    if isinstance(size, int) or len(size) != 2:
        return f"kernel_size {size}: only 2-D convolutions are covered"
    if module.feature_group_count != 1:
        return f"feature_group_count {module.feature_group_count}"
    if _pair(module.input_dilation) != (1, 1):
        return f"input_dilation {module.input_dilation}"
    if isinstance(module.padding, str) and module.padding not in ("SAME", "VALID"):
        return f"padding {module.padding!r}"
    if module.mask is not None:
        return "a mask= of its own"
    if module.conv_general_dilated is not None or module.conv_general_dilated_cls is not None:
        return "a custom conv_general_dilated"
    return None


def describe(module: Any, h: Any) -> Layer:
    """The layer as static data, once `obstacle` found nothing in the way."""
    path = layer_path(module)
    if isinstance(module, nn.Dense):
        return Layer(path, "dense", (h.shape[-1], module.features))
    padding = module.padding
    if not isinstance(padding, str):
        padding = tuple(_pair(p) for p in ((padding,) * 2 if isinstance(padding, int) else padding))
    shape = (*module.kernel_size, h.shape[-1], module.features)
    return Layer(path, "conv", shape, _pair(module.strides), padding, _pair(module.kernel_dilation))


def network(
    model: nn.Module,
    *args: Any,
    sparse: Callable[[str], bool] = lambda path: True,
    execution: str = "masked",
    **kwargs: Any,
) -> Network:
    """Find the sparse kernels of `model` in `model(*args, **kwargs)`, without computing that.

    Args: example inputs as arrays or shapes; `sparse(path)` says which of the `nn.Dense` and
    `nn.Conv` layers are (default: all); `execution` whether they are held as dense arrays with
    masks or truly sparse. Errors: a chosen layer that the probes do not cover. A kernel of another
    kind stays dense, which is logged.
    """
    check_field("execution", execution)
    shapes = jax.eval_shape(lambda *a: a, *args)
    found, variables = _discover(model, shapes, kwargs, sparse)
    params = traverse_util.flatten_dict(variables.get("params", {}), sep="/")
    layers: dict[str, Layer] = {}
    dense: dict[str, str] = {}
    for name, leaf in params.items():
        path = name.removesuffix("/kernel")
        layer = found.get(path) if path != name else None
        if layer is not None:
            layers[path] = layer
            if leaf.shape != layer.shape:
                _refuse(path, f"its kernel is stacked to {leaf.shape} by nn.scan or nn.vmap")
        elif path != name and path in found:
            dense[name] = "not chosen"
        elif leaf.ndim >= 2 and not name.endswith("bias"):
            dense[name] = "not the kernel of nn.Dense or nn.Conv"
            LOGGER.warning("%s stays dense: it is %s.", name, dense[name])
    for path, layer in found.items():
        if layer and path not in layers:
            _refuse(path, "its kernel is not stored at its own path")
    # JAX gives dicts of layers back sorted by path, which is not always the parameters' order.
    net = Network(model, dict(sorted(layers.items())), dense, shapes, kwargs, execution)
    _check(net, variables)
    return net


def _discover(model, shapes, kwargs, sparse) -> tuple[dict[str, Layer | None], dict[str, Any]]:
    """{path: layer, or None if `sparse` leaves it out} in call order, and the variables' shapes."""
    found: dict[str, Layer | None] = {}
    norms: list[nn.Module] = []  # the WeightNorms and SpectralNorms around the current call

    def discover(next_fun, arguments, keywords, context):
        module = context.module
        if context.method_name == "__call__" and is_layer(module):
            path = layer_path(module)
            if not sparse(path):
                found[path] = None
            elif not path:
                _refuse(path, "it has no path; put a model that is one layer into a module")
            elif why := obstacle(module) or (norms and "its kernel is reparameterised by a norm"):
                _refuse(path, why)
            else:
                found[path] = describe(module, arguments[0] if arguments else keywords["inputs"])
        if not isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            return next_fun(*arguments, **keywords)
        norms.append(module)
        try:
            return next_fun(*arguments, **keywords)
        finally:
            norms.pop()

    # Without jit: a layer under nn.jit that was traced before would not be seen.
    with nn.intercept_methods(discover), jax.disable_jit():
        return found, _abstract_init(model, shapes, kwargs)


def _refuse(path: str, why: str) -> NoReturn:
    raise ConfigError(
        f"layer {path!r} cannot be sparse: {why}; leave it dense with sparse=lambda path: ..."
    )


def _abstract_init(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    init = lambda *a: model.init(jax.random.key(0), *a, **kwargs)  # noqa: E731
    return flax.core.unfreeze(jax.eval_shape(init, *args))


def _check(net: Network, variables: Mapping[str, Any]) -> None:
    """Refuse networks with nothing to make sparse, too many connections, tied or hidden kernels."""
    if not net.layers:
        raise ConfigError("the model has no nn.Dense or nn.Conv layer that may be sparse.")
    if net.execution == "masked" and net.possible >= 2**31:
        raise ConfigError(
            f"the model has {net.possible} possible connections; masked execution allows 2^31 - 1, "
            "execution='sparse' any number."
        )
    if net.execution == "sparse" and "arena" in variables["params"]:
        raise ConfigError(
            "the model has parameters named 'arena', which is where dst keeps its own."
        )
    params = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    without = {k: v for k, v in params.items() if k.removesuffix("/kernel") not in net.layers}
    empty = {(*path.split("/"), ""): jnp.zeros(0) for path in net.layers}
    rest = {
        **variables,
        "params": traverse_util.unflatten_dict(without, sep="/"),
        "probes": traverse_util.unflatten_dict(empty),
    }

    def skip(next_fun, arguments, keywords, context):
        module = context.module
        layer = net.layers.get(layer_path(module))
        if context.method_name != "__call__" or layer is None:
            return next_fun(*arguments, **keywords)
        if not module.has_variable("probes", ""):
            _refuse(layer.path, "nn.scan, nn.vmap or nn.RNN shares its kernel between calls")
        return skipped(layer, module, arguments[0] if arguments else keywords["inputs"])

    def run(rest, *args):
        rngs = {name: jax.random.key(0) for name in ("dropout", "params")}
        return net.model.apply(rest, *args, **net.kwargs, rngs=rngs, mutable=True)

    # init has passed, and no sparse layer runs here: who misses a kernel now, reads it elsewhere.
    try:
        with nn.intercept_methods(skip), jax.disable_jit():
            jax.eval_shape(run, rest, *net.args)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "a sparse kernel is read outside its own layer (weight tying), which raises "
            f"{type(error).__name__} once it is gone; leave that layer dense with sparse=lambda "
            "path: ..."
        ) from error


def skipped(layer: Layer, module: Any, h: Any) -> jax.Array:
    """Zeros in the shape of the layer's output, its kernel untouched."""
    h = jnp.asarray(h)
    dtype = module.dtype or jnp.promote_types(h.dtype, module.param_dtype)
    if layer.kind == "dense":
        return jnp.zeros((*h.shape[:-1], layer.n_out), dtype)
    kernel = jax.ShapeDtypeStruct(layer.shape, dtype)
    y = jax.eval_shape(layer.convolve, jax.ShapeDtypeStruct(h.shape, dtype), kernel)
    return jnp.zeros(y.shape, dtype)
