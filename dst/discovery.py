"""Which kernels of a model are sparse: those of its layers that can be, found without computing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from dst.arguments import check_network, described
from dst.axis import across_devices
from dst.errors import ConfigError, quoted
from dst.layers import BUILT_IN, Layer, kind_of
from dst.layers.base import modules
from dst.layers.fit import misfit
from dst.layers.obstacle import jitted, mapped, unlike_float32
from dst.network import Left, Network, input_of, is_foreign, layer_path, refuse, skipping
from dst.sown import Path, sown

LOGGER = logging.getLogger("dst")
Globs = str | Sequence[str]


class Unfit(Exception):
    """A layer that cannot be sparse after all: its path, and why."""


class Choice(NamedTuple):
    """Which layers are to be sparse; those that `sparse` names are refused if they cannot be."""

    sparse: Callable[[str], bool] | tuple[str, ...] | None
    dense: tuple[str, ...]

    def takes(self, path: str) -> bool:
        """Whether this layer is to be sparse."""
        if any(fnmatchcase(path, glob) for glob in self.dense):
            return False
        if callable(self.sparse):
            return bool(self.sparse(path))
        return self.sparse is None or any(fnmatchcase(path, glob) for glob in self.sparse)

    def leave(self, path: str, why: str) -> str:
        """`why`, of a layer that cannot be sparse. Raises ConfigError: it was named."""
        if self.sparse is not None:
            refuse(path, why)
        return why

    def refuse_unmatched(self, paths: Sequence[str]) -> None:
        """Raises ConfigError: a glob that is of no layer."""
        named = () if self.sparse is None or callable(self.sparse) else self.sparse
        for field, globs in (("sparse", named), ("dense", self.dense)):
            for glob in globs:
                if not any(fnmatchcase(path, glob) for path in paths):
                    raise ConfigError(
                        f"{field} is {glob!r}, which matches no layer; the model has "
                        f"{', '.join(map(repr, paths))}."
                    )


def network(
    model: nn.Module,
    *args: Any,
    sparse: Callable[[str], bool] | Globs | None = None,
    dense: Globs = (),
    execution: str = "masked",
    fuse: bool = True,
    **kwargs: Any,
) -> Network:
    """Find the sparse kernels of `model` in `model(*args, **kwargs)`, without computing that.

    Args: example inputs as arrays or shapes; `execution` whether kernels are held as dense arrays
    with masks or truly sparse; `fuse` whether kernels may compute what surrounds a convolution too.
    All layers of the kinds that `dst.layers` knows are sparse, but those whose paths match a glob
    of `dense`; what cannot be stays dense, which is logged. `sparse`, globs or a function of a
    path, names which are, and a layer that it names is refused if it cannot be.
    Raises: ConfigError for such a layer, a glob that matches none, anything under nn.jit.
    """
    check_network(model, args, kwargs, execution, fuse)
    shapes = jax.eval_shape(lambda *a: a, *args)
    choice = Choice(sparse if callable(sparse) or sparse is None else _globs(sparse), _globs(dense))
    found, variables = _discover(model, shapes, kwargs, choice)
    choice.refuse_unmatched([path for path in found if path])
    kernels, left = _sorted_out(found, variables, choice)
    # JAX gives dicts of layers back sorted by path, which is not always the parameters' order.
    layers = dict(sorted(kernels.items()))
    net = Network(model, layers, left, shapes, kwargs, execution, fuse=fuse)
    while net.layers:
        try:
            net = net._replace(sown=_sown(net, variables))
        except Unfit as unfit:
            path, why = unfit.args
            net = _without(net, path, choice.leave(path, why))
            continue
        for name, kernel in net.dense.items():
            if kernel.why != NOT_CHOSEN:
                LOGGER.warning("%s stays dense: %s.", name, kernel.why)
        return net
    raise ConfigError(
        f"the model has no {modules()} layer that may be sparse{_reasons(net.dense)}."
    )


NOT_CHOSEN = "not chosen"


def _reasons(left: Mapping[str, Left]) -> str:
    """Why all weights stay dense: of each reason an example, and how many there are."""
    of: dict[str, list[str]] = {}
    for name, kernel in left.items():
        of.setdefault(kernel.why, []).append(name)
    found = (
        f"; {names[0]} stays dense{f', as {len(names) - 1} others,' if names[1:] else ''}: {why}"
        for why, names in of.items()
    )
    return "".join(islice(found, 3))


def _globs(given: Globs) -> tuple[str, ...]:
    if not (isinstance(given, Sequence) and all(isinstance(glob, str) for glob in given)):
        found = repr(given) if isinstance(given, Sequence) else described(given)
        raise ConfigError(f"globs of layers must be strings such as 'encoder/*', not {found}.")
    return (given,) if isinstance(given, str) else tuple(given)


def _without(net: Network, path: str, why: str) -> Network:
    layers = {other: layer for other, layer in net.layers.items() if other != path}
    left = {**net.dense, f"{path}/kernel": Left(net.layers[path].shape, why)}
    return net._replace(layers=layers, dense=left)


def _sorted_out(
    found: Mapping[str, Layer | str], variables: Mapping[str, Any], choice: Choice
) -> tuple[dict[str, Layer], dict[str, Left]]:
    """The layers whose kernels are parameters of their own, and all other weights."""
    params = traverse_util.flatten_dict(variables.get("params", {}), sep="/")
    kernels: dict[str, Layer] = {}
    left: dict[str, Left] = {}
    for name, leaf in params.items():
        path = name.removesuffix("/kernel")
        layer = found.get(path) if path != name else None
        if isinstance(layer, str):
            left[name] = Left(leaf.shape, layer)
        elif layer is None:
            if leaf.ndim >= 2 and not name.endswith("bias"):
                left[name] = Left(leaf.shape, f"not the kernel of {modules()}")
        elif leaf.shape != layer.shape:
            why = f"its kernel is stacked to {leaf.shape} by nn.scan or nn.vmap"
            left[name] = Left(leaf.shape, choice.leave(path, why))
        else:
            kernels[path] = layer
    for path, layer in found.items():
        if isinstance(layer, Layer) and f"{path}/kernel" not in params:
            why = choice.leave(path, "its kernel is not stored at its own path")
            LOGGER.warning("%s stays dense: %s.", path, why)
    return kernels, left


def _discover(
    model: nn.Module, shapes: Any, kwargs: Mapping[str, Any], choice: Choice
) -> tuple[dict[str, Layer | str], dict[str, Any]]:
    """{path: layer, or why it stays dense} in call order, and the variables' shapes."""
    found: dict[str, Layer | str] = {}
    foreign: set[str] = set()
    untried: dict[str, tuple[Any, Any]] = {}

    def record(module, kind, args, keywords):
        path = layer_path(module)
        if path not in found and is_foreign(module):
            foreign.add(module.name or type(module).__name__)
        elif not choice.takes(path):
            found[path] = NOT_CHOSEN
        elif not path:
            raise ConfigError(
                "the model is one layer, which has no path; put it into a module of its own."
            )
        elif why := _obstacle(kind, module, [*args, *keywords.values()]):
            found[path] = choice.leave(path, why)
        elif path not in found:
            h = input_of(module, args, keywords)
            found[path] = _described(kind, path, module, h, choice)
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
        if not isinstance(found[path], str) and (why := misfit(path, found[path], *call)):
            found[path] = choice.leave(path, why)
    for name in sorted(foreign):
        LOGGER.warning("%s stays dense: it is applied to variables of its own.", name)
    return found, variables


def _obstacle(kind: type[Layer], module: nn.Module, given: list[Any]) -> str | None:
    if len(given) != 1:
        return f"it is called with {len(given)} arguments, not with h alone"
    return kind.obstacle(module) or mapped(module) or unlike_float32(module)


def _described(
    kind: type[Layer], path: str, module: nn.Module, h: Any, choice: Choice
) -> Layer | str:
    try:
        return kind.describe(path, module, h)
    except Exception as error:  # whatever a kind from outside raises
        return choice.leave(path, f"{kind.__name__}.describe fails with {quoted(error)}")


def _abstract_init(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    init = lambda *a: model.init(jax.random.key(0), *a, **kwargs)  # noqa: E731
    with nn.intercept_methods(across_devices):
        return nn.meta.unbox(flax.core.unfreeze(jax.eval_shape(init, *args)))


def _sown(net: Network, variables: Mapping[str, Any]) -> frozenset[Path]:
    """What the model sows, from calls without the sparse kernels. Raises Unfit: one is read there.

    And whatever the model itself raises when it is applied to its example inputs.
    """
    rest, run = _kernels_gone(net, variables)
    # Who misses a kernel now reads it elsewhere, as no sparse layer runs here; unless it is the
    # model's own error.
    try:
        again = run(rest)
    except (ConfigError, Unfit):
        raise
    except Exception as error:
        _abstract_apply(net, variables, True)
        why = f"its kernel is read outside it (weight tying), which raises {quoted(error)}"
        raise Unfit(_read_elsewhere(net, variables), f"{why} once it is gone") from error
    missing = lambda c, mutable: run({k: rest[k] for k in rest if k != c}, mutable)  # noqa: E731
    return sown(variables, again, missing)


def _kernels_gone(net: Network, variables: Mapping[str, Any]) -> tuple[dict[str, Any], Callable]:
    """The variables without the sparse kernels; run(variables, mutable), which needs none."""
    params = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    without = {k: v for k, v in params.items() if k.removesuffix("/kernel") not in net.layers}
    empty = {(*path.split("/"), ""): jnp.zeros(0) for path in net.layers}
    rest = {
        **variables,
        "params": traverse_util.unflatten_dict(without, sep="/"),
        "probes": traverse_util.unflatten_dict(empty),
    }

    def own(layer: Layer, module: nn.Module, *call: Any) -> None:
        if not module.has_variable("probes", ""):
            raise Unfit(layer.path, "nn.scan, nn.vmap or nn.RNN shares its kernel between calls")

    def run(collections: Mapping[str, Any], mutable: Any = True) -> Any:
        with skipping(net.layers, own):
            return _abstract_apply(net, collections, mutable)

    return rest, run


def _read_elsewhere(net: Network, variables: Mapping[str, Any]) -> str:
    """The path of a layer without whose kernel the model does not run, found by halving."""

    def runs(paths: list[str]) -> bool:
        some = net._replace(layers={path: net.layers[path] for path in paths})
        rest, run = _kernels_gone(some, variables)
        try:
            run(rest)
        except Exception:  # whatever the model makes of a kernel that it does not find
            return False
        return True

    paths = list(net.layers)
    while len(paths) > 1:
        half = paths[: len(paths) // 2]
        paths = paths[len(half) :] if runs(half) else half
    return paths[0]


def _abstract_apply(net: Network, variables: Mapping[str, Any], mutable: Any) -> Any:
    """The shapes of the variables that the model writes for its example inputs."""

    def run(variables, *args):
        rngs = {name: jax.random.key(0) for name in ("dropout", "params")}
        with nn.intercept_methods(across_devices):
            # Its outputs may be of any kind, no pytree even.
            options = {**net.kwargs, "rngs": rngs, "mutable": mutable}
            return net.model.apply(variables, *args, **options)[1]

    return jax.eval_shape(run, variables, *net.args)
