"""A network as one NumPy file that others read, and back: `export`, `load`, `predictor`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dst.arguments import check_is, check_model, described
from dst.axis import across_devices
from dst.connections.base import Connections
from dst.connections.execution import EXECUTIONS, forward
from dst.connections.files import Kernel, read, to_csr, write
from dst.connections.initialised import init_rest
from dst.errors import ConfigError, check_value, one_of, quoted
from dst.network import Network
from dst.state import SparseState
from dst.update import refuse_other_layers


def export(
    net: Network,
    state: SparseState,
    path: str | os.PathLike,
    *,
    dense: bool = False,
    params: Any = None,
) -> None:
    """Writes the model's variables to the .npz file `path`, whole or not at all.

    Entries are named like the variables: 'params/Dense_0/bias', 'batch_stats/BatchNorm_0/mean'.
    The entry 'sparse' lists the kernels that are stored as a CSR matrix W (inputs, outputs), of a
    convolution (kx ky n_in, n_out), of attention as `nn.DenseGeneral` multiplies; such a
    'params/Dense_0/kernel' is four entries:

        params/Dense_0/kernel/data     float32 (M,), input by input
        params/Dense_0/kernel/indices  int32 (M,), the outputs, rising within an input
        params/Dense_0/kernel/indptr   int32 (inputs + 1,), where each input's connections begin
        params/Dense_0/kernel/shape    int64, of the kernel in Flax: such as (n_in, n_out)

    x @ scipy.sparse.csr_array((data, indices, indptr), shape=shape) is x W of a dense layer. Needs
    O(K) host memory. With `dense`, kernels are plain Flax arrays instead. What NumPy has no type
    for, such as bfloat16, becomes float32. `params` is written in place of state.params, as an
    average of them is. Raises: a folder that does not exist or cannot be written, a state of
    another network.
    """
    check_is("net", net, Network, "dst.network(model, x)")
    state = _with(state, params)
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"Cannot write {path}: the folder {path.parent} does not exist.")
    kernels = dict(_kernels(state))
    shapes = {path: layer.shape for path, layer in net.layers.items()}
    if {path: kernel.shape for path, kernel in kernels.items()} != shapes:
        raise ConfigError("Cannot export a state whose sparse layers are not those of the network.")
    own = {f"params/{owner}/kernel" for owner in state.masks.kernels(state.params)}
    entries = traverse_util.flatten_dict({"params": state.params, **state.batch_stats}, sep="/")
    entries = {name: leaf for name, leaf in entries.items() if name not in own}
    sparse = {f"params/{layer}/kernel": kernel for layer, kernel in kernels.items()}
    for name, kernel in sparse.items():
        entries |= {name: kernel.dense()} if dense else to_csr(name, kernel)
    entries = {name: _readable(leaf) for name, leaf in entries.items()}
    write(path, {"sparse": np.array([] if dense else list(sparse), np.str_), **entries})


def load(path: str | os.PathLike) -> dict[str, Any]:
    """The variables in a file of `export` for `model.apply(variables, x)`: every kernel is dense.

    Raises: a file that is missing, damaged or of another kind.
    """
    entries, kernels = read(path)
    entries |= {name: kernel.dense() for name, kernel in kernels.items()}
    return traverse_util.unflatten_dict(entries, sep="/")


def predictor(
    net: Network,
    source: SparseState | str | os.PathLike,
    *,
    params: Any = None,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """`predict(*inputs)`: the outputs of a state, or of a file of `export` in net's execution.

    The model is called with the keyword arguments of `dst.network`, such as train=False, and with
    `kwargs`, of Flax's apply too. In sparse execution no `nn.Dense` kernel is formed, whatever
    execution wrote the file. What `state.params` holds off the masks is left out, as `export` does.
    `params` takes the place of state.params: an average of them, or what an optimizer evaluates,
    as optax.contrib.schedule_free_eval_params. `model` takes the place of net.model: one with the
    same parameters that is otherwise made for prediction, as Net(deterministic=True). Raises: those
    of `load`, a file or state of another network, a model with other parameters, a state whose
    parameters are not those of its connections, outputs that are no pytree of arrays.
    """
    check_is("net", net, Network, "dst.network(model, x)")
    check_value("execution", net.execution, one_of(EXECUTIONS))
    if model is None and not kwargs:
        run = _as_in_network(Same(net))
    else:
        called = net if model is None else _with_model(net, model, kwargs)
        run = _program(called, {**net.kwargs, **kwargs})
    if isinstance(source, SparseState):
        state = _with(source, params)
        refuse_other_layers(net, state)
        state.masks.refuse_values(state.params)
        existing = state.masks.only_existing(state.params)
        return functools.partial(run, (existing, state.masks, state.batch_stats))
    if params is not None or not isinstance(source, str | os.PathLike):
        what = "with params=, a state" if params is not None else "a state, or a file of dst.export"
        raise ConfigError(f"source must be {what}, not {described(source)}.")
    return functools.partial(run, _restore(net, source))


class Same(NamedTuple):
    """A network as a key: itself, not one that is equal, which dicts in it do not tell."""

    net: Network

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.net is other.net

    def __hash__(self) -> int:
        return id(self.net)


@functools.lru_cache(maxsize=8)
def _as_in_network(of: Same) -> Callable[..., Any]:
    """Compiled once, however many states of a network predict, as after every epoch."""
    return _program(of.net, of.net.kwargs)


# What a model that is called as in training does: writes its statistics, draws dropout.
IN_TRAINING = (flax.errors.ModifyScopeVariableError, flax.errors.InvalidRngError)


def _program(net: Network, options: Mapping[str, Any]) -> Callable[..., Any]:
    """(parameters, connections, collections), inputs -> the model's outputs; jitted."""

    @jax.jit
    def run(network, *inputs, **stray):
        if stray:
            raise ConfigError(
                f"a predictor takes inputs alone, not {', '.join(stray)}=; give keyword arguments "
                "to dst.predictor(net, source, ...)."
            )
        try:
            outputs = forward(net, *network, *inputs, **options)
        except IN_TRAINING as error:
            called = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "nothing"
            raise ConfigError(
                f"the model fails to predict with {quoted(error)}; it was called with {called}, "
                "and dst.predictor(net, source, train=False), or what its flag is, overrides that."
            ) from error
        for leaf in jax.tree.leaves(outputs):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
                raise ConfigError(
                    f"the model returns {described(leaf)}, which is no pytree of arrays; "
                    "flax.struct.dataclass makes one of a class."
                )
        return outputs

    return run


def _with(state: SparseState, params: Any) -> SparseState:
    """The state with these parameters, if there are any. Raises: others than its own in shape."""
    check_is("state", state, SparseState, "dst.init_state(net, tx, method, key)")
    if params is None:
        return state
    shapes = lambda tree: [(p, jnp.shape(a)) for p, a in jax.tree.leaves_with_path(tree)]  # noqa: E731
    if shapes(params) != shapes(state.params):
        raise ConfigError(
            "params must hold arrays at the paths of state.params and in their shapes."
        )
    return state.replace(params=params)


def _with_model(net: Network, model: Any, kwargs: Mapping[str, Any]) -> Network:
    """The network of another model. Raises: one whose parameters are not those of its own."""
    check_model(model)
    own = {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}

    def shapes(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        init = lambda *args: model.init(jax.random.key(0), *args, **options)  # noqa: E731
        with nn.intercept_methods(across_devices):
            params = nn.meta.unbox(jax.eval_shape(init, *net.args))["params"]
        return traverse_util.flatten_dict({"params": params}, sep="/")

    ours = shapes(net.model, net.kwargs)
    _refuse_another_network("model", shapes(model, {**net.kwargs, **own}), ours)
    return net._replace(model=model)


def _kernels(state: SparseState) -> Iterator[tuple[str, Kernel]]:
    """The sparse layers' paths and kernels, on the host."""
    state.masks.refuse_values(state.params)
    for layer, position, values in state.masks.on_host(state.params):
        yield layer.path, Kernel(layer.shape, layer.n_out, position, values)


def _restore(net: Network, path: str | os.PathLike) -> tuple[Any, Connections, Any]:
    """Parameters, connections and collections of a file, for `forward`."""
    entries, kernels = read(path)
    rest = jax.eval_shape(functools.partial(init_rest, net), jax.random.key(0))
    rest = traverse_util.flatten_dict(rest, sep="/")
    sparse = {f"params/{layer.path}/kernel": layer for layer in net.layers.values()}
    _refuse_another_network(path, {**entries, **kernels}, {**rest, **sparse})
    chosen = [
        kernels.pop(name) if name in kernels else _nonzero(entries.pop(name), layer.n_out)
        for name, layer in sparse.items()
    ]
    counts = dict(zip(net.layers, (kernel.values.size for kernel in chosen), strict=True))
    connect = EXECUTIONS[net.execution].connect
    A, values = connect(net, counts, (kernel[2:] for kernel in chosen))
    entries |= {name: kernel.dense() for name, kernel in kernels.items()}  # dense in this network
    leaves = {name: jnp.asarray(array) for name, array in entries.items()}
    for name in rest.keys() & leaves.keys():  # what was bfloat16 becomes that again
        leaves[name] = leaves[name].astype(rest[name].dtype)
    collections = traverse_util.unflatten_dict(leaves, sep="/")
    return A.put(collections.pop("params", {}), values), A, collections


def _refuse_another_network(path: str | os.PathLike, theirs: Mapping, ours: Mapping) -> None:
    for name in sorted({*theirs, *ours}):
        was, now = (getattr(a.get(name), "shape", "missing") for a in (theirs, ours))
        if was != now:
            raise ConfigError(f"{path} is of another network: {name} is {was}, and {now} in this.")


def _nonzero(kernel: np.ndarray, outputs: int) -> Kernel:
    position = np.flatnonzero(kernel)
    return Kernel(kernel.shape, outputs, position, kernel.reshape(-1)[position])


def _readable(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.kind == "V" else array
