"""The first state of a run: random connections, or the best of all that there could be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dst.arguments import check_devices, check_is, check_key, takes_key
from dst.connections.execution import EXECUTIONS, init_rest
from dst.connections.initial import fan_in_weights, random_positions
from dst.connections.moments import recognise
from dst.errors import ConfigError
from dst.loss import Loss
from dst.methods.base import Method
from dst.methods.before import BEFORE, Given, Show
from dst.methods.combinations import check, check_execution, memories
from dst.methods.distributions import count_of, first_counts
from dst.methods.memory import begun, first_memory
from dst.network import Network
from dst.optimizer import check_optimizer, check_steps
from dst.state import SparseState, fresh_progress

Array = jax.Array


def init_state(
    net: Network, tx: optax.GradientTransformation, method: Method, key: Array
) -> SparseState:
    """A network of exactly K random connections: G(n, M) masks, fan-in scaled weights (Sec. 4.1).

    Everything but the sparse kernels comes from the model's own initialisers, and the same key
    gives both executions the same network. A method that prunes before training begins with all
    connections, and the state says so: it does not train before `prune_at_init` or a Lottery
    ticket. Raises: an optimizer whose state `dst` cannot keep sparse, a method that cannot run in
    the network's execution, a sparsity that leaves no connection.
    """
    _check_parts(net, tx, method)
    check_key(key)
    check(method)
    check_execution(method, net.execution)
    count_of(net, method.sparsity)
    mask_key, weight_key, model_key, run_key = jax.random.split(key, 4)
    counts = first_counts(net, method)

    def layers():
        for l, (layer, count) in enumerate(zip(net.layers.values(), counts.values(), strict=True)):
            position = random_positions(jax.random.fold_in(mask_key, l), layer.size, count)
            seed, output = jax.random.fold_in(weight_key, l), position % layer.n_out
            yield position, fan_in_weights(seed, output, layer.n_out, method.gain)

    variables = init_rest(net, model_key)
    params = variables.pop("params")
    execution = EXECUTIONS[net.execution]
    check_steps(tx, params)
    execution.refuse(net, tx, params)
    A, values = execution.connect(net, counts, layers())
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
    _check_parts(net, tx, method)
    takes_key(loss)
    check_is("state", state, SparseState, "dst.init_state(net, tx, method, key)")
    check_devices(devices)
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


def _check_parts(net: Any, tx: Any, method: Any) -> None:
    """Raises ConfigError: an argument of another kind."""
    check_is("net", net, Network, "dst.network(model, x)")
    check_optimizer(tx)
    check_is("method", method, Method, "dst.method(name, sparsity=...)")


def start_with(tx: optax.GradientTransformation, state: SparseState, masks: Any) -> SparseState:
    """`state` with these masks, exact zeros off them and a fresh optimizer, free to train.

    The rest stays as it is.
    """
    A = state.masks.but({path: jnp.asarray(mask) for path, mask in masks.items()})
    params = A.only_existing(state.params)
    return begun(state).replace(params=params, masks=A, opt_state=tx.init(params))
