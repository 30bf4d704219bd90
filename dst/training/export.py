"""A network as one NumPy file that others read, and back: `export`, `load`, `predictor`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dst.connections.base import Connections
from dst.connections.execution import EXECUTIONS, forward, init_rest
from dst.connections.files import Kernel, read, to_csr, write
from dst.errors import ConfigError, check_value, one_of
from dst.network import Network
from dst.state import SparseState


def export(
    net: Network, state: SparseState, path: str | os.PathLike, *, dense: bool = False
) -> None:
    """Writes the model's variables to the .npz file `path`, whole or not at all.

    Entries are named like the variables: 'params/Dense_0/bias', 'batch_stats/BatchNorm_0/mean'.
    The entry 'sparse' lists the kernels that are stored as a CSR matrix W (inputs, outputs), of a
    convolution (kx ky n_in, n_out); such a 'params/Dense_0/kernel' is four entries:

        params/Dense_0/kernel/data     float32 (M,), input by input
        params/Dense_0/kernel/indices  int32 (M,), the outputs, rising within an input
        params/Dense_0/kernel/indptr   int32 (inputs + 1,), where each input's connections begin
        params/Dense_0/kernel/shape    int64, of the kernel in Flax: (n_in, n_out) or 4-D

    x @ scipy.sparse.csr_array((data, indices, indptr), shape=shape) is x W of a dense layer. Needs
    O(K) host memory. With `dense`, kernels are plain Flax arrays instead. What NumPy has no type
    for, such as bfloat16, becomes float32. Raises: a folder that does not exist or cannot be
    written, a state of another network.
    """
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


def predictor(net: Network, source: SparseState | str | os.PathLike) -> Callable[..., Any]:
    """`predict(*inputs)`: the outputs of a state, or of a file of `export` in net's execution.

    The model is called with the keyword arguments of `dst.network`, such as train=False. In sparse
    execution no `nn.Dense` kernel is formed, whatever execution wrote the file. What `state.params`
    holds off the masks is left out, as `export` does. Raises: those of `load`, a file of another
    network, a state whose parameters are not those of its connections.
    """

    check_value("execution", net.execution, one_of(EXECUTIONS))

    @jax.jit
    def run(network, *inputs):
        return forward(net, *network, *inputs, **net.kwargs)

    if isinstance(source, SparseState):
        source.masks.refuse_values(source.params)
        params = source.masks.only_existing(source.params)
        return functools.partial(run, (params, source.masks, source.batch_stats))
    return functools.partial(run, _restore(net, source))


def _kernels(state: SparseState) -> Iterator[tuple[str, Kernel]]:
    """The sparse layers' paths and kernels, on the host."""
    state.masks.refuse_values(state.params)
    for layer, position, values in state.masks.on_host(state.params):
        yield layer.path, Kernel(layer.shape, position, values)


def _restore(net: Network, path: str | os.PathLike) -> tuple[Any, Connections, Any]:
    """Parameters, connections and collections of a file, for `forward`."""
    entries, kernels = read(path)
    rest = jax.eval_shape(functools.partial(init_rest, net), jax.random.key(0))
    rest = traverse_util.flatten_dict(rest, sep="/")
    sparse = {f"params/{layer.path}/kernel": layer for layer in net.layers.values()}
    _refuse_another_network(path, {**entries, **kernels}, {**rest, **sparse})
    chosen = [
        kernels.pop(name) if name in kernels else _nonzero(entries.pop(name)) for name in sparse
    ]
    counts = dict(zip(net.layers, (kernel.values.size for kernel in chosen), strict=True))
    connect = EXECUTIONS[net.execution].connect
    A, values = connect(net, counts, (kernel[1:] for kernel in chosen))
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


def _nonzero(kernel: np.ndarray) -> Kernel:
    position = np.flatnonzero(kernel)
    return Kernel(kernel.shape, position, kernel.reshape(-1)[position])


def _readable(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.kind == "V" else array
