"""The ways to take one training step of a sparse layer that `peers` measures.

Each function below `# The peers.` takes a `Sparse` layer and returns its `Peer`. It imports its
library itself: every peer runs in a process of its own, and an ImportError means not installed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

BATCH = 128
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Sparse(NamedTuple):
    """The layer and the batch that every peer gets; connections sorted by (output, input)."""

    size: int
    output: np.ndarray  # int64 (K,)
    input: np.ndarray  # int64 (K,)
    values: np.ndarray  # float32 (K,)
    x: np.ndarray  # float32 (BATCH, size)
    delta: np.ndarray  # float32 (BATCH, size), the gradient of the output

    @property
    def pointer(self) -> np.ndarray:
        """int64 (size + 1,), where each output begins."""
        return np.searchsorted(self.output, np.arange(self.size + 1))

    def dense(self) -> np.ndarray:
        """float32 (size, size), outputs first."""
        weights = np.zeros((self.size, self.size), np.float32)
        weights[self.output, self.input] = self.values
        return weights


class Peer(NamedTuple):
    """One way to take a step.

    step          () -> (y, dx, gradient, values), of which it has waited for all
    connections   where the connections of `Sparse` are in its flat gradient and values
    transposed    whether y and dx are (features, batch)
    """

    step: Callable[[], tuple]
    connections: Any = slice(None)
    transposed: bool = False


def sparse(size: int, density: float) -> Sparse:
    """Uniformly random connections; gradients of the connections have variance one."""
    rng = np.random.default_rng(0)
    position = np.sort(rng.choice(size**2, round(density * size**2), replace=False, shuffle=False))
    values = rng.standard_normal(len(position)) / np.sqrt(density * size)
    x, delta = rng.standard_normal((2, BATCH, size), np.float32)
    delta /= np.sqrt(np.float32(BATCH))
    return Sparse(size, *np.divmod(position, size), values.astype(np.float32), x, delta)


# The peers. Each takes the layer in the layout that its own users would keep it in.


def ours(layer: Sparse, compiled: bool = True, transposed: bool = False) -> Peer:
    """`dst.connections.products` in one of its two tiers, jitted, with values and momentum donated.

    Activations are (batch, features) as a Flax model has them, or left as the product wants them.
    """
    if not compiled:
        os.environ["DST_KERNELS"] = "0"

    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    import dst
    from dst.connections.arena import fill, lay_out, positions
    from dst.connections.backends import cpp as kernels
    from dst.connections.products import product

    if compiled and not kernels.available():
        raise ImportError(kernels.why_not())
    n = layer.size
    model = nn.Sequential([nn.Dense(n, use_bias=False)])
    net = dst.network(model, jax.ShapeDtypeStruct((1, n), jnp.float32))
    (path,) = net.layers
    (part,) = lay_out(net, {path: len(layer.values)})
    arena, values = fill((part,), [(layer.input * n + layer.output, layer.values)])
    inputs, outputs = np.divmod(positions(arena, part)[1], n)

    def forward(values, arena, x):
        y, values = product(part, values, arena, x if transposed else x.T)
        return y if transposed else y.T, values

    def update(values, momentum, arena, x, delta):
        (y, _), back = jax.vjp(lambda values, x: forward(values, arena, x), values, x)
        delta, _ = jax.lax.optimization_barrier((delta, y))  # as a loss would order them
        gradient, dx = back((delta, jnp.zeros_like(values)))
        momentum = MOMENTUM * momentum + gradient
        return values - LEARNING_RATE * momentum, momentum, y, dx

    update = jax.jit(update, donate_argnums=(0, 1))
    x, delta = (jnp.asarray(a.T if transposed else a) for a in (layer.x, layer.delta))
    state = jnp.asarray(values), jnp.zeros(len(values), jnp.float32)

    def step():
        nonlocal state
        *state, y, dx = jax.block_until_ready(update(*state, arena, x, delta))
        return y, dx, state[1], state[0]  # after one step the momentum is the gradient

    return Peer(step, np.lexsort((inputs, outputs)), transposed)


def autograd(layer: Sparse, module: Callable, weights: Any, connections: Any) -> Peer:
    """A PyTorch module's step with torch.optim.SGD; activations (batch, features)."""
    import torch

    x = torch.from_numpy(layer.x).requires_grad_()
    delta = torch.from_numpy(layer.delta)
    optimizer = torch.optim.SGD([weights], LEARNING_RATE, MOMENTUM, fused=True)

    def step():
        x.grad = None
        optimizer.zero_grad()
        y = module(x)
        y.backward(delta)
        optimizer.step()
        return y.detach(), x.grad, weights.grad.view(-1), weights.detach().view(-1)

    return Peer(step, connections)


def sparseprop(layer: Sparse) -> Peer:
    """SparseProp's `SparseLinear`."""
    import torch
    from sparseprop.modules import SparseLinear

    module = SparseLinear(torch.from_numpy(layer.dense()))
    return autograd(layer, module, module.W_val, slice(None))


def sparselab(layer: Sparse) -> Peer:
    """SparseLab's `SparseLinear`, its random connections replaced."""
    import torch
    from sparselab import SparseLinear, layout

    density = len(layer.values) / layer.size**2
    module = SparseLinear(layer.size, layer.size, bias=False, sparsity=1 - density)
    module._csr = layout.from_dense(torch.from_numpy(layer.dense()))
    module._values = torch.nn.Parameter(torch.from_numpy(np.asarray(module._csr.values)))
    padding = np.asarray(module._csr.row_start) - layer.pointer[:-1]  # spare slots before each row
    return autograd(
        layer, module, module._values, padding[layer.output] + np.arange(len(layer.output))
    )


def torch_masked(layer: Sparse) -> Peer:
    """Dense arrays in PyTorch; the gradient is masked, so the weights stay so."""
    import torch

    weights = torch.nn.Parameter(torch.from_numpy(layer.dense()))
    mask = (weights != 0).float()

    def only_existing(weights):
        weights.grad.mul_(mask)

    weights.register_post_accumulate_grad_hook(only_existing)
    connections = layer.output * layer.size + layer.input
    return autograd(layer, lambda x: torch.nn.functional.linear(x, weights), weights, connections)


def torch_csr(layer: Sparse) -> Peer:
    """PyTorch's sparse CSR with its autograd, whose weight gradient is a dense matrix.

    torch.optim.SGD refuses CSR parameters ("Sparse CSR tensors do not have is_contiguous"), so the
    update takes the connections out of that gradient and is written by hand.
    """
    import torch

    n = layer.size
    weights = _torch_csr(torch, layer.pointer, layer.input, layer.values, n).requires_grad_()
    values = weights.detach().values()
    momentum = torch.zeros_like(values)
    flat = torch.from_numpy(layer.output * n + layer.input)
    x = torch.from_numpy(layer.x).requires_grad_()
    delta = torch.from_numpy(layer.delta)

    def step():
        x.grad = weights.grad = None
        y = torch.nn.functional.linear(x, weights)
        y.backward(delta)
        gradient = weights.grad.view(-1)[flat]
        momentum.mul_(MOMENTUM).add_(gradient)
        values.sub_(momentum, alpha=LEARNING_RATE)
        return y.detach(), x.grad, gradient, values

    return Peer(step)


def torch_csr_by_hand(layer: Sparse) -> Peer:
    """PyTorch's (MKL's) CSR products without its autograd: an expert's step.

    The transposed structure is kept and its values are gathered every step, since a product with
    `weights.t()` is ten times slower; the weight gradient is `torch.sparse.sampled_addmm`.
    """
    import torch

    n = layer.size
    order = np.lexsort((layer.output, layer.input))
    begin = np.searchsorted(layer.input[order], np.arange(n + 1))
    weights = _torch_csr(torch, layer.pointer, layer.input, layer.values, n)
    across = _torch_csr(torch, begin, layer.output[order], layer.values[order], n)
    gradient = _torch_csr(torch, layer.pointer, layer.input, np.zeros_like(layer.values), n)
    values, momentum = weights.values(), torch.zeros(len(layer.values))
    order = torch.from_numpy(order)
    x, delta = torch.from_numpy(layer.x.T.copy()), torch.from_numpy(layer.delta.T.copy())

    def step():
        y = weights @ x
        torch.index_select(values, 0, order, out=across.values())
        dx = across @ delta
        torch.sparse.sampled_addmm(gradient, delta, x.t(), beta=0.0, out=gradient)
        momentum.mul_(MOMENTUM).add_(gradient.values())
        values.sub_(momentum, alpha=LEARNING_RATE)
        return y, dx, gradient.values(), values

    return Peer(step, transposed=True)


def _torch_csr(torch: Any, pointer: np.ndarray, column: np.ndarray, values: np.ndarray, n: int):
    """A square CSR tensor with the int32 indices that MKL takes without a copy."""
    structure = [torch.from_numpy(part.astype(np.int32)) for part in (pointer, column)]
    return torch.sparse_csr_tensor(
        *structure, torch.from_numpy(values.copy()), (n, n), check_invariants=False
    )


def scipy_csr(layer: Sparse) -> Peer:
    """SciPy's CSR as in the SET code, gradient in NumPy; on one thread, SciPy has no other."""
    import scipy.sparse

    n, chunk = layer.size, 2048  # connections: two gathers of 1 MiB
    column, output = layer.input.astype(np.int32), layer.output
    weights = scipy.sparse.csr_array((layer.values.copy(), column, layer.pointer), shape=(n, n))
    x, delta = layer.x.T.copy(), layer.delta.T.copy()
    gradient, momentum = np.zeros_like(layer.values), np.zeros_like(layer.values)

    def step():
        nonlocal momentum
        y, dx = weights @ x, weights.T @ delta
        for i in range(0, len(output), chunk):
            part = slice(i, i + chunk)
            np.einsum("kb,kb->k", x[column[part]], delta[output[part]], out=gradient[part])
        momentum = MOMENTUM * momentum + gradient
        weights.data -= LEARNING_RATE * momentum
        return y, dx, gradient, weights.data

    return Peer(step, transposed=True)


PEERS: dict[str, Callable[[Sparse], Peer]] = {
    "dst": ours,
    "dst, (features, batch)": functools.partial(ours, transposed=True),
    "dst, pure JAX": functools.partial(ours, compiled=False),
    "sparseprop": sparseprop,
    "sparselab": sparselab,
    "torch dense, masked": torch_masked,
    "torch CSR, autograd": torch_csr,
    "torch CSR, by hand": torch_csr_by_hand,
    "scipy CSR": scipy_csr,
}
