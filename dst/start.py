"""The first state of a run: random connections, or the best of all that there could be."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dst.connections.execution import EXECUTIONS, init_rest
from dst.connections.initial import fan_in_weights, random_positions
from dst.connections.moments import recognise
from dst.errors import ConfigError, check_value
from dst.methods.base import Method
from dst.methods.before import BEFORE, Given, Show
from dst.methods.combinations import check, check_execution, memories
from dst.methods.distributions import count_of, first_counts
from dst.methods.given import KEEP, given, kept
from dst.methods.memory import begun, first_memory
from dst.network import Network
from dst.state import SparseState, fresh_progress
from dst.update import Loss

Array = jax.Array


def init_state(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    key: Array,
    *,
    params: Mapping[str, Any] | str | os.PathLike | None = None,
    keep: str = "global",
) -> SparseState:
    """A network of exactly K random connections: G(n, M) masks, fan-in scaled weights (Sec. 4.1).

    Everything but the sparse kernels comes from the model's own initialisers, and the same key
    gives both executions the same network. A method that prunes before training begins with all
    connections, and the state says so: it does not train before `prune_at_init` or a Lottery
    ticket.

    With `params`, dense weights that one has, the K largest are the network: of all layers together
    or, with keep="layer", as many of each as the method's distribution gives (layers named in
    `sparsity_of` always have their own count). They are what `model.init` gives, {"params": ...,
    "batch_stats": ...}, or of a model that has nothing else, what is in "params"; or a file of
    `dst.export`, whose connections are taken as they are if it is sparse. In sparse execution
    nothing is made beside what was given but the K that are kept.

    Raises: an optimizer whose state `dst` cannot keep sparse, a method that cannot run in
    the network's execution, a sparsity that leaves no connection, `params` that are not
    this network's, a sparse file that does not have K connections.
    """
    check(method)
    check_execution(method, net.execution)
    count_of(net, method.sparsity)
    check_value("keep", keep, KEEP)
    if params is None and keep != "global":
        raise ConfigError(f"keep must be 'global' without params, which it is about, not {keep!r}.")
    mask_key, weight_key, model_key, run_key = jax.random.split(key, 4)
    if params is None:
        variables = init_rest(net, model_key)
        counts = first_counts(net, method)
        layers = random_layers(net, method, counts, mask_key, weight_key)
    else:
        rest = jax.eval_shape(functools.partial(init_rest, net), model_key)
        source = given(net, params, rest)
        variables, positions = source.variables, kept(net, method, source, keep, mask_key)
        counts = {path: position.size for path, position in positions.items()}
        layers = ((p, source.values(path, p)) for path, p in positions.items())
    params = variables.pop("params")
    execution = EXECUTIONS[net.execution]
    execution.refuse(net, tx, params)
    A, values = execution.connect(net, counts, layers)
    params = A.put(params, values)
    recognise(jax.eval_shape(tx.init, params), params, values)
    memory_key = jax.random.fold_in(weight_key, len(net.layers))
    own = first_memory(memories(method), method, A, values, memory_key)
    return SparseState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables,
        masks=A,
        opt_state=tx.init(params),
        key=run_key,
        method=own,
        progress=fresh_progress(),
    )


def random_layers(
    net: Network, method: Method, counts: Mapping[str, int], mask_key: Array, weight_key: Array
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each layer the flat positions int64 (M,) and weights float32 (M,) of a random network."""
    for l, (path, layer) in enumerate(net.layers.items()):
        position = random_positions(jax.random.fold_in(mask_key, l), layer.size, counts[path])
        seed, output = jax.random.fold_in(weight_key, l), position % layer.n_out
        yield position, fan_in_weights(seed, output, layer.n_out, method.gain)


def prune_at_init(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    loss: Loss,
    state: SparseState,
    batches: Iterable[Any] = (),
    *,
    devices: list | None = None,
    show: Show | None = None,
) -> SparseState:
    """`state`, which has all connections, with the K that score best by `method.before`.

    `batches` are as for `make_update`, and can be iterated twice; a batch smaller than the first is
    cut to a multiple of the devices. Batch normalisation is in train mode, its new statistics are
    thrown away, and `nn.Dropout` is off. `show` is called after each batch, or round of SynFlow.
    Raises: sparse execution, no batches, scores that are not finite, no flow for SynFlow, a
    sparsity that leaves no connection.
    """
    K = count_of(net, method.sparsity)
    if method.before not in BEFORE:
        raise ConfigError(
            f"method is {method.name!r}, which does not prune before training; allowed are "
            f"{', '.join(BEFORE)}."
        )
    check_execution(method, net.execution)
    active = sum(np.count_nonzero(mask) for mask in state.masks.values())
    if active < K:
        raise ConfigError(
            f"state has {active} connections, fewer than the {K} to keep; it must be a new one "
            "with initial sparsity 0."
        )
    masks = BEFORE[method.before].prune(net, method, loss, state, Given(K, batches, devices, show))
    return start_with(tx, state, masks)


def start_with(tx: optax.GradientTransformation, state: SparseState, masks: Any) -> SparseState:
    """`state` with these masks, exact zeros off them and a fresh optimizer, free to train.

    The rest stays as it is.
    """
    A = state.masks.but({path: jnp.asarray(mask) for path, mask in masks.items()})
    params = A.only_existing(state.params)
    return begun(state).replace(params=params, masks=A, opt_state=tx.init(params))
