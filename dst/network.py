"""A network as `dst` sees it: an unmodified Linen model and the kernels in it that are sparse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from dst.arguments import check_network
from dst.axis import across_devices
from dst.errors import ConfigError, quoted
from dst.layers import BUILT_IN, Layer, kind_of
from dst.layers.base import modules
from dst.layers.fit import misfit
from dst.layers.obstacle import jitted, mapped, unlike_float32
from dst.sown import Path, sown

LOGGER = logging.getLogger("dst")

Sparse = TypeVar("Sparse")


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
        _refuse(layer_path(module), f"it is called with {len(given)} arguments, not with h alone")
    return given[0]


def network(
    model: nn.Module,
    *args: Any,
    sparse: Callable[[str], bool] = lambda path: True,
    execution: str = "masked",
    fuse: bool = True,
    **kwargs: Any,
) -> Network:
    """Find the sparse kernels of `model` in `model(*args, **kwargs)`, without computing that.

    Args: example inputs as arrays or shapes; `sparse(path)` says which of the layers are, of those
    kinds that `dst.layers` knows (default: all); `execution` whether they are held as dense arrays
    with masks or truly sparse; `fuse` whether kernels may compute what surrounds a convolution too.
    Raises: ConfigError for a chosen layer that is not covered, for anything under nn.jit. A kernel
    of another kind stays dense, which is logged.
    """
    check_network(model, args, sparse, execution, fuse)
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
            dense[name] = f"not the kernel of {modules()}"
            LOGGER.warning("%s stays dense: it is %s.", name, dense[name])
    for path, layer in found.items():
        if layer and path not in layers:
            _refuse(path, "its kernel is not stored at its own path")
    # JAX gives dicts of layers back sorted by path, which is not always the parameters' order.
    net = Network(model, dict(sorted(layers.items())), dense, shapes, kwargs, execution)
    net = net._replace(fuse=fuse)
    if not net.layers:
        raise ConfigError(f"the model has no {modules()} layer that may be sparse.")
    return net._replace(sown=_sown(net, variables))


def _discover(model, shapes, kwargs, sparse) -> tuple[dict[str, Layer | None], dict[str, Any]]:
    """{path: layer, or None if `sparse` leaves it out} in call order, and the variables' shapes."""
    found: dict[str, Layer | None] = {}
    foreign: set[str] = set()
    untried: dict[str, tuple[Any, Any]] = {}

    def record(module, kind, args, keywords):
        path = layer_path(module)
        if path not in found and is_foreign(module):
            foreign.add(module.name or type(module).__name__)
        elif not sparse(path):
            found[path] = None
        elif not path:
            _refuse(path, "it has no path; put a model that is one layer into a module")
        elif why := kind.obstacle(module) or mapped(module) or unlike_float32(module):
            _refuse(path, why)
        elif path not in found:
            h = input_of(module, args, keywords)
            found[path] = _described(kind, path, module, h)
            if kind not in BUILT_IN:
                untried[path] = module.clone(parent=None), jax.ShapeDtypeStruct(h.shape, h.dtype)

    def discover(next_fun, arguments, keywords, context):
        module = context.module
        if jitted(module):
            raise ConfigError(
                f"{type(module).__name__} {layer_path(module)!r} runs under nn.jit, whose traces "
                "dst cannot look into; leave nn.jit away, since dst compiles the whole step."
            )
        if context.method_name == "__call__" and (kind := kind_of(module)):
            record(module, kind, arguments, keywords)
        return next_fun(*arguments, **keywords)

    # Without jit: what runs under nn.jit and was traced before would not be seen, nor refused.
    with nn.intercept_methods(discover), jax.disable_jit():
        variables = _abstract_init(model, shapes, kwargs)
    for path, call in untried.items():
        if why := misfit(path, found[path], *call):
            _refuse(path, why)
    for name in sorted(foreign):
        LOGGER.warning("%s stays dense: it is applied to variables of its own.", name)
    return found, variables


def _described(kind: type[Layer], path: str, module: nn.Module, h: Any) -> Layer:
    try:
        return kind.describe(path, module, h)
    except Exception as error:  # whatever a kind from outside raises
        _refuse(path, f"{kind.__name__}.describe fails with {quoted(error)}")


def _refuse(path: str, why: str) -> NoReturn:
    raise ConfigError(
        f"layer {path!r} cannot be sparse: {why}; leave it dense with sparse=lambda path: ..."
    )


def _abstract_init(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    init = lambda *a: model.init(jax.random.key(0), *a, **kwargs)  # noqa: E731
    with nn.intercept_methods(across_devices):
        return nn.meta.unbox(flax.core.unfreeze(jax.eval_shape(init, *args)))


def _sown(net: Network, variables: Mapping[str, Any]) -> frozenset[Path]:
    """What the model sows, from calls without the sparse kernels. Raises: kernels read elsewhere.

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
        call = layer_call(net.layers, arguments, keywords, context)
        if call is None or is_foreign(module):
            return next_fun(*arguments, **keywords)
        layer, h = call
        if not module.has_variable("probes", ""):
            _refuse(layer.path, "nn.scan, nn.vmap or nn.RNN shares its kernel between calls")
        return zero_output(layer, module, h)

    def run(collections, mutable=True):
        with nn.intercept_methods(skip):
            return _abstract_apply(net, collections, mutable)

    # Who misses a kernel now reads it elsewhere, as no sparse layer runs here; unless it is the
    # model's own error.
    try:
        again = run(rest)
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
    """The shapes of the variables that the model writes for its example inputs."""

    def run(variables, *args):
        rngs = {name: jax.random.key(0) for name in ("dropout", "params")}
        with nn.intercept_methods(across_devices):
            # Its outputs may be of any kind, no pytree even.
            options = {**net.kwargs, "rngs": rngs, "mutable": mutable}
            return net.model.apply(variables, *args, **options)[1]

    return jax.eval_shape(run, variables, *net.args)


def zero_output(layer: Layer, module: Any, h: Any) -> jax.Array:
    """Zeros in the shape of the layer's output, its kernel untouched."""
    h, given = jnp.asarray(h), getattr(module, "param_dtype", jnp.float32)
    dtype = getattr(module, "dtype", None) or jnp.promote_types(h.dtype, given)
    y = layer.output(h, dtype)
    return jnp.zeros(y.shape, y.dtype)
