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

from dst.config import check_field
from dst.errors import ConfigError, quoted
from dst.layers.obstacle import jitted, mapped, obstacle, pair, unlike_float32
from dst.sown import Path, sown

LOGGER = logging.getLogger("dst")


class Layer(NamedTuple):
    """A sparse kernel: (n_in, n_out) of `nn.Dense`, (kx, ky, n_in, n_out) of `nn.Conv`."""

    path: str
    kind: str  # "dense" | "conv"
    shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    dilation: tuple[int, int] = (1, 1)
    precision: Any = None  # the module's, see `jax.lax.Precision`

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
            precision=self.precision,
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
    sown: frozenset[Path] = frozenset()  # what the model sows, which no state holds
    fuse: bool = True  # whether sparse kernels may compute several operations at once

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


def is_foreign(module: nn.Module) -> bool:
    """Whether a layer is applied to variables of its own, where the model's kernels do not exist.

    As `nn.Dense(3).apply(variables, h)` inside a model, whose path may be that of another layer.
    """
    return module.has_variable("params", "kernel")


def describe(module: Any, h: Any) -> Layer:
    """The layer as static data, once `obstacle` found nothing in the way."""
    path = layer_path(module)
    if isinstance(module, nn.Dense):
        shape = (h.shape[-1], module.features)
        return Layer(path, "dense", shape, precision=module.precision)
    padding = module.padding
    if not isinstance(padding, str):
        padding = tuple(pair(p) for p in ((padding,) * 2 if isinstance(padding, int) else padding))
    shape = (*module.kernel_size, h.shape[-1], module.features)
    strides, dilation = pair(module.strides), pair(module.kernel_dilation)
    return Layer(path, "conv", shape, strides, padding, dilation, module.precision)


def network(
    model: nn.Module,
    *args: Any,
    sparse: Callable[[str], bool] = lambda path: True,
    execution: str = "masked",
    fuse: bool = True,
    **kwargs: Any,
) -> Network:
    """Find the sparse kernels of `model` in `model(*args, **kwargs)`, without computing that.

    Args: example inputs as arrays or shapes; `sparse(path)` says which of the `nn.Dense` and
    `nn.Conv` layers are (default: all); `execution` whether they are held as dense arrays with
    masks or truly sparse; `fuse` whether its kernels may compute what surrounds a convolution, too.
    Errors: a chosen layer that the probes do not cover, anything under
    nn.jit. A kernel of another kind stays dense, which is logged.
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
    net = net._replace(fuse=fuse)
    if not net.layers:
        raise ConfigError("the model has no nn.Dense or nn.Conv layer that may be sparse.")
    return net._replace(sown=_sown(net, variables))


def _discover(model, shapes, kwargs, sparse) -> tuple[dict[str, Layer | None], dict[str, Any]]:
    """{path: layer, or None if `sparse` leaves it out} in call order, and the variables' shapes."""
    found: dict[str, Layer | None] = {}
    foreign: set[str] = set()

    def record(module, h):
        path = layer_path(module)
        if path not in found and is_foreign(module):
            foreign.add(module.name or type(module).__name__)
        elif not sparse(path):
            found[path] = None
        elif not path:
            _refuse(path, "it has no path; put a model that is one layer into a module")
        elif why := obstacle(module) or mapped(module) or unlike_float32(module):
            _refuse(path, why)
        else:
            found.setdefault(path, describe(module, h))

    def discover(next_fun, arguments, keywords, context):
        module = context.module
        if jitted(module):
            raise ConfigError(
                f"{type(module).__name__} {layer_path(module)!r} runs under nn.jit, whose traces "
                "dst cannot look into; leave nn.jit away, since dst compiles the whole step."
            )
        if context.method_name == "__call__" and is_layer(module):
            record(module, arguments[0] if arguments else keywords["inputs"])
        return next_fun(*arguments, **keywords)

    # Without jit: what runs under nn.jit and was traced before would not be seen, nor refused.
    with nn.intercept_methods(discover), jax.disable_jit():
        variables = _abstract_init(model, shapes, kwargs)
    for name in sorted(foreign):
        LOGGER.warning("%s stays dense: it is applied to variables of its own.", name)
    return found, variables


def _refuse(path: str, why: str) -> NoReturn:
    raise ConfigError(
        f"layer {path!r} cannot be sparse: {why}; leave it dense with sparse=lambda path: ..."
    )


def _abstract_init(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    init = lambda *a: model.init(jax.random.key(0), *a, **kwargs)  # noqa: E731
    return nn.meta.unbox(flax.core.unfreeze(jax.eval_shape(init, *args)))


def _sown(net: Network, variables: Mapping[str, Any]) -> frozenset[Path]:
    """What the model sows, from calls without the sparse kernels. Errors: kernels read elsewhere.

    And whatever the model itself raises when it is applied to its example inputs.
    """
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
        layer = net.layers.get(layer_path(module)) if is_layer(module) else None
        if context.method_name != "__call__" or layer is None or is_foreign(module):
            return next_fun(*arguments, **keywords)
        if not module.has_variable("probes", ""):
            _refuse(layer.path, "nn.scan, nn.vmap or nn.RNN shares its kernel between calls")
        return skipped(layer, module, arguments[0] if arguments else keywords["inputs"])

    def run(collections, mutable=True):
        with nn.intercept_methods(skip):
            return _abstract_apply(net, collections, mutable)

    # Who misses a kernel now reads it elsewhere, as no sparse layer runs here; unless it is the
    # model's own error.
    try:
        _, again = run(rest)
    except ConfigError:
        raise
    except Exception as error:
        _abstract_apply(net, variables, True)
        raise ConfigError(
            "a sparse kernel is read outside its own layer (weight tying), which raises "
            f"{quoted(error)} once it is gone; leave that layer dense with sparse=lambda path: ..."
        ) from error
    missing = lambda c, mutable: run({k: rest[k] for k in rest if k != c}, mutable)  # noqa: E731
    return sown(variables, again, missing)


def _abstract_apply(net: Network, variables: Mapping[str, Any], mutable: Any) -> Any:
    """The shapes of what the model gives for its example inputs."""

    def run(variables, *args):
        rngs = {name: jax.random.key(0) for name in ("dropout", "params")}
        return net.model.apply(variables, *args, **net.kwargs, rngs=rngs, mutable=mutable)

    return jax.eval_shape(run, variables, *net.args)


def skipped(layer: Layer, module: Any, h: Any) -> jax.Array:
    """Zeros in the shape of the layer's output, its kernel untouched."""
    h = jnp.asarray(h)
    dtype = module.dtype or jnp.promote_types(h.dtype, module.param_dtype)
    if layer.kind == "dense":
        return jnp.zeros((*h.shape[:-1], layer.n_out), dtype)
    kernel = jax.ShapeDtypeStruct(layer.shape, dtype)
    y = jax.eval_shape(layer.convolve, jax.ShapeDtypeStruct(h.shape, dtype), kernel)
    return jnp.zeros(y.shape, dtype)
