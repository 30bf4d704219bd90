"""The first state of a run: random connections, or the best of all that there could be."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dst.arguments import check_devices, check_is, check_key, takes_key
from dst.connections.execution import EXECUTIONS
from dst.connections.initial import fan_in_weights, random_positions, scaled_to_fan_in
from dst.connections.initialised import init_kernels, init_rest
from dst.connections.moments import recognise
from dst.errors import ConfigError, check_value, choice
from dst.layers import Layer
from dst.loss import Loss
from dst.methods.base import Method
from dst.methods.before import BEFORE, Given, Show
from dst.methods.combinations import check, check_execution, memories
from dst.methods.distributions import count_of, first_counts
from dst.methods.given import KEEP, given, kept
from dst.methods.memory import begun, first_memory
from dst.network import Network
from dst.optimizer import check_optimizer, check_steps
from dst.state import SparseState, fresh_progress

LOGGER = logging.getLogger("dst")

Array = jax.Array

INIT = choice("fan_in", "model")
TOGETHER = 2**22  # weights of kernels that are made at once, if a single one has not more


def init_state(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    key: Array,
    *,
    params: Mapping[str, Any] | str | os.PathLike | None = None,
    keep: str = "global",
    init: str = "fan_in",
) -> SparseState:
    """A network of exactly K random connections: G(n, M) masks, fan-in scaled weights (Sec. 4.1).

    Everything but the sparse kernels comes from the model's own initialisers, and the same key
    gives both executions the same network. A method that prunes before training begins with all
    connections, and the state says so: it does not train before `prune_at_init` or a Lottery
    ticket.

    With init="model" a connection's weight is that of the model's own initialiser, times the root
    of its unit's inputs over its connections: a kernel is made for it, one layer's at a time (or as
    many small ones as have 2^22 weights). A kernel whose `kernel_init` is `nn.initializers.zeros`
    is zero either way.

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
    _check_parts(net, tx, method)
    check_key(key)
    check(method)
    check_execution(method, net.execution)
    count_of(net, method.sparsity)
    check_value("keep", keep, KEEP)
    check_value("init", init, INIT)
    check_init(net, method, init, params is not None)
    if params is None and keep != "global":
        raise ConfigError(f"keep must be 'global' without params, which it is about, not {keep!r}.")
    mask_key, weight_key, model_key, run_key = jax.random.split(key, 4)
    if params is None:
        first = drawn(net, method, init, mask_key, weight_key, model_key)
    else:
        first = taken(net, method, params, keep, mask_key, model_key)
    memory_key = jax.random.fold_in(weight_key, len(net.layers))
    return _begin(net, tx, method, first, memory_key, run_key)


class First(NamedTuple):
    """What a state begins with: the model's other variables, and its connections."""

    variables: dict[str, Any]
    counts: dict[str, int]  # of each layer
    layers: Iterator[tuple[np.ndarray, np.ndarray]]  # flat positions and weights of each


def drawn(
    net: Network, method: Method, init: str, mask_key: Array, weight_key: Array, model_key: Array
) -> First:
    """Random connections, the weights of fan-in or of the model's initialisers."""
    zero: set[str] = set()
    variables = init_rest(net, model_key, functools.partial(note_zeros, zero))
    counts = first_counts(net, method)
    tell_empty(net, counts, 'sparsity_of={"its path": ...} gives it some')
    by_model = init == "model"
    weights = of_model(net, model_key) if by_model else of_fan_in(method, weight_key, zero)
    return First(variables, counts, random_layers(net, counts, mask_key, weights))


def tell_empty(net: Network, counts: Mapping[str, int], advice: str) -> None:
    """Says in the log which layers begin without a connection, so that nothing passes them."""
    for path, count in counts.items():
        if not count and net.layers[path].size:
            LOGGER.warning("%s begins without a connection; %s.", path, advice)


def taken(
    net: Network, method: Method, params: Any, keep: str, mask_key: Array, model_key: Array
) -> First:
    """The largest of the weights that one has, or a file's connections."""
    rest = jax.eval_shape(functools.partial(init_rest, net), model_key)
    source = given(net, params, rest)
    positions = kept(net, method, source, keep, mask_key)
    counts = {path: position.size for path, position in positions.items()}
    tell_empty(net, counts, 'keep="layer" keeps some of each')
    layers = ((p, source.values(path, p)) for path, p in positions.items())
    return First(source.variables, counts, layers)


def _begin(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    first: First,
    memory_key: Array,
    run_key: Array,
) -> SparseState:
    variables = dict(first.variables)
    params = variables.pop("params")
    execution = EXECUTIONS[net.execution]
    check_steps(tx, params)
    execution.refuse(net, tx, params)
    A, values = execution.connect(net, first.counts, first.layers)
    params = A.put(params, values)
    recognise(jax.eval_shape(tx.init, params), params, values)
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


def check_init(net: Network, method: Method, init: str, given: bool) -> None:
    """Raises ConfigError: what the model's own initialisers do not go together with."""
    if init != "model":
        return
    if given:
        raise ConfigError("init must be 'fan_in' with params, which are the weights, not 'model'.")
    if method.gain != 1:
        raise ConfigError(
            f"gain must be 1.0 with init='model', whose variance is the model's, not {method.gain}."
        )
    largest = max(net.layers.values(), key=lambda layer: layer.size)
    if largest.size >= 2**31:
        raise ConfigError(
            f"init must be 'fan_in', not 'model', which makes each layer's dense kernel: that of "
            f"{largest.path!r} has {largest.size} weights; allowed are 2^31 - 1."
        )


# (l, layer, flat positions int64 (M,)) -> weights float32 (M,)
Weights = Callable[[int, Layer, np.ndarray], np.ndarray]


def random_layers(
    net: Network, counts: Mapping[str, int], key: Array, weights: Weights
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each layer the flat positions int64 (M,) and weights float32 (M,) of a random network."""
    for l, (path, layer) in enumerate(net.layers.items()):
        position = random_positions(jax.random.fold_in(key, l), layer.size, counts[path])
        yield position, weights(l, layer, position)


def of_fan_in(method: Method, key: Array, zero: Collection[str]) -> Weights:
    """Normal weights of variance gain / fan-in, or zeros in the layers `zero`."""

    def weights(l: int, layer: Layer, position: np.ndarray) -> np.ndarray:
        if layer.path in zero:
            return np.zeros(position.size, np.float32)
        output = position % layer.n_out
        return fan_in_weights(jax.random.fold_in(key, l), output, layer.n_out, method.gain)

    return weights


def note_zeros(zero: set[str], path: str, module: Any) -> None:
    """Adds the path of a module that begins with zeros."""
    if getattr(module, "kernel_init", None) is nn.initializers.zeros:
        zero.add(path)


def of_model(net: Network, key: Array) -> Weights:
    """Weights of the model's own initialisers, scaled to the connections of each unit.

    Layers are asked for in their order; the kernels of a group are made at once.
    """
    groups: list[list[str]] = []
    room = 0
    for path, layer in net.layers.items():
        if layer.size > room:
            groups.append([])
            room = max(layer.size, TOGETHER)
        groups[-1].append(path)
        room -= layer.size
    group_of = {path: frozenset(group) for group in groups for path in group}
    made: dict[str, Array] = {}

    def weights(l: int, layer: Layer, position: np.ndarray) -> np.ndarray:
        if layer.path not in made:
            made.update(init_kernels(net, key, group_of[layer.path]))
        kernel = np.asarray(made.pop(layer.path)).reshape(layer.dims)
        return scaled_to_fan_in(kernel, position)

    return weights


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
    check_is("state", state, SparseState, "dst.init_state(net, tx, method, key)")
    check_devices(devices)
    K = count_of(net, method.sparsity)
    if method.before not in BEFORE:
        raise ConfigError(
            f"method is {method.name!r}, which does not prune before training; allowed are "
            f"{', '.join(BEFORE)}."
        )
    if BEFORE[method.before].gradients:
        takes_key(loss)
        several(batches)
    check_execution(method, net.execution)
    active = sum(np.count_nonzero(mask) for mask in state.masks.values())
    if active < K:
        raise ConfigError(
            f"state has {active} connections, fewer than the {K} to keep; it must be a new one "
            "with initial sparsity 0."
        )
    masks = BEFORE[method.before].prune(net, method, loss, state, Given(K, batches, devices, show))
    return start_with(tx, state, masks)


def several(batches: Any) -> None:
    """Raises ConfigError: one batch where an iterable of them must be."""
    one = isinstance(batches, Mapping)
    if isinstance(batches, tuple):
        one = any(isinstance(part, jax.Array | np.ndarray) for part in batches)
    if one or not isinstance(batches, Iterable):
        raise ConfigError(
            "batches must be an iterable of batches, such as [batch], not a "
            f"{type(batches).__name__}{' of arrays' if one else ''}."
        )


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
