"""A first network from weights that one has: the largest of dense ones, or those of a sparse file.

All of it is on the host. Weights are looked at a piece at a time, so that nothing is made beside
what was given but what is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dst.connections.files import Kernel, read
from dst.connections.initial import random_positions
from dst.errors import ConfigError, choice
from dst.methods.base import Method
from dst.methods.distributions import count_of, first_counts, own_sparsity
from dst.network import Network
from dst.sown import without

KEEP = choice("global", "layer")
PIECE = 2**16  # weights looked at at a time
HALF = 2**16  # of a float32's bits

Positions = dict[str, np.ndarray]  # of each layer int64 (M,), rising


class Given(NamedTuple):
    """What was given, as far as this network has it."""

    who: str  # in sentences
    kernels: dict[str, np.ndarray | Kernel]  # by layer path, in the order of the layers
    variables: dict[str, Any]  # all else

    def values(self, path: str, position: np.ndarray) -> np.ndarray:
        """The weights of a layer at what `kept` gives: float32 (M,)."""
        kernel = self.kernels[path]
        if isinstance(kernel, Kernel):
            return kernel.values
        return np.asarray(kernel).reshape(-1)[position]


def given(net: Network, source: Any, rest: Mapping[str, Any]) -> Given:
    """The user's variables, or a file's; `rest` are the shapes of those that are no sparse kernels.

    Raises ConfigError: neither, a variable that is missing, or that this network has not, or has in
    another shape or dtype, weights that are not finite, and what `files.read` raises.
    """
    of_file = isinstance(source, str | os.PathLike)
    who = f"{os.fspath(source)}" if of_file else "params"
    found = _of_file(net, source) if of_file else _of_user(net, source)
    ours = traverse_util.flatten_dict(dict(rest), sep="/")
    kernels = {f"params/{path}/kernel": layer.shape for path, layer in net.layers.items()}
    ours |= {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in kernels.items()}
    for name in sorted({*found, *ours}):
        was, now = (_described(of.get(name), dtypes=not of_file) for of in (found, ours))
        if was != now:
            what = f"{name} as {was}" if was else f"no {name}"
            raise ConfigError(
                f"{who} has {what}, which the network has {f'as {now}' if now else 'not'}."
            )
    chosen = {path: found.pop(f"params/{path}/kernel") for path in net.layers}
    for path, kernel in chosen.items():
        values = kernel.values if isinstance(kernel, Kernel) else kernel
        if not all(np.isfinite(piece).all() for _, piece in _pieces(values)):
            raise ConfigError(
                f"{who} must have finite weights, but some of layer {path!r} is NaN or infinite."
            )
    # Copies: a step may take the state's memory, which the user's must not be.
    leaves = {name: jnp.array(leaf, ours[name].dtype) for name, leaf in found.items()}
    return Given(who, chosen, {"params": {}, **traverse_util.unflatten_dict(leaves, sep="/")})


def _of_file(net: Network, path: str | os.PathLike) -> dict[str, Any]:
    entries, kernels = read(path)
    own = {f"params/{path}/kernel" for path in net.layers}
    return {
        **entries,
        # What is dense in this network, or has every connection, is a plain array.
        **{
            name: kernel if name in own and kernel.values.size < _size(kernel) else kernel.dense()
            for name, kernel in kernels.items()
        },
    }


def _size(kernel: Kernel) -> int:
    return int(np.prod(kernel.shape, dtype=np.int64))


def _of_user(net: Network, params: Any) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ConfigError(
            "params must be the model's variables as Flax holds them, a dict {'params': ...} or "
            f"what is in it, or the path of a file of dst.export, not a {type(params).__name__}."
        )
    variables = flax.core.unfreeze(nn.meta.unbox(params))
    if not isinstance(variables.get("params"), Mapping):
        variables = {"params": variables}
    return traverse_util.flatten_dict(without(variables, net.sown), sep="/")


def _described(leaf: Any, dtypes: bool) -> str:
    """Its type and shape; without the type, as a file has float32 for what NumPy knows no type."""
    if leaf is None or not hasattr(leaf, "shape"):
        return "" if leaf is None else f"a {type(leaf).__name__}"
    return f"{leaf.dtype} {tuple(leaf.shape)}" if dtypes else str(tuple(leaf.shape))


# ------------------------------------------------------------------------------- which are kept
def kept(net: Network, method: Method, source: Given, keep: str, key: jax.Array) -> Positions:
    """The connections to begin with: a sparse file's own, or the largest of what is given.

    `keep` says whether these are the largest of the network ("global"; layers that have a sparsity
    of their own aside) or as many of each layer as `distribution` gives ("layer"). Of equals some
    by chance. Raises ConfigError: a sparse file that has other numbers of connections.
    """
    counts, K = first_counts(net, method), count_of(net, method.first_sparsity)
    if any(isinstance(kernel, Kernel) for kernel in source.kernels.values()):
        return _as_in_file(net, method, source, counts)
    weights = {path: np.asarray(kernel) for path, kernel in source.kernels.items()}
    if method.keep_counts and keep == "global":
        raise ConfigError(
            "keep must be 'layer' for a method with keep_counts=True, whose drop and growth are "
            "planned for the counts that its distribution gives, not 'global'."
        )
    own = {path for path, _ in own_sparsity(net.layers, method.sparsity_of)}
    single = net.layers.keys() if keep == "layer" else own
    found: Positions = {}
    for l, path in enumerate(net.layers):
        if path in single:
            some = {path: weights[path]}
            found |= largest(some, counts[path], jax.random.fold_in(key, l))
    others = {path: w for path, w in weights.items() if path not in found}
    if others:
        left = K - sum(counts[path] for path in found)
        found |= largest(others, left, jax.random.fold_in(key, len(net.layers)))
    return {path: found[path] for path in net.layers}


def _as_in_file(
    net: Network, method: Method, source: Given, counts: Mapping[str, int]
) -> Positions:
    found = {
        path: kernel.position if isinstance(kernel, Kernel) else np.arange(kernel.size)
        for path, kernel in source.kernels.items()
    }
    K, M = sum(counts.values()), sum(position.size for position in found.values())
    if M != K:
        raise ConfigError(
            f"{source.who} has {M} connections, but method {method.name!r} begins with {K}, at "
            f"sparsity {method.first_sparsity} of {net.possible} possible ones; "
            "params=dst.load(path) keeps the largest weights."
        )
    own = [path for path, _ in own_sparsity(net.layers, method.sparsity_of)]
    for path in net.layers if method.keep_counts else own:
        if found[path].size != counts[path]:
            raise ConfigError(
                f"{source.who} has {found[path].size} connections in layer {path!r}, but method "
                f"{method.name!r} begins with {counts[path]} there; "
                "params=dst.load(path) keeps the largest weights."
            )
    return found


def largest(weights: Mapping[str, np.ndarray], k: int, key: jax.Array) -> Positions:
    """The flat positions of the k largest |w| of all these kernels; of equals some by chance.

    Float32 kernels of any shapes, finite. Memory: O(k).
    """
    if k == sum(w.size for w in weights.values()):
        return {path: np.arange(w.size) for path, w in weights.items()}
    cut, more, equal = _cut(weights.values(), k)
    chosen = random_positions(key, equal, k - more)  # among the equal ones, in their order
    found: Positions = {}
    seen = 0
    for path, w in weights.items():
        parts = [np.zeros(0, np.int64)]
        for start, piece in _pieces(w):
            magnitude = _bits(piece)
            ties = np.flatnonzero(magnitude == cut)
            begin, end = np.searchsorted(chosen, [seen, seen + ties.size])
            some = ties[chosen[begin:end] - seen]
            seen += ties.size
            parts.append(start + np.sort(np.append(np.flatnonzero(magnitude > cut), some)))
        found[path] = np.concatenate(parts)
    return found


def _pieces(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The flat array piece by piece, and where each begins."""
    flat = np.asarray(array).reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield start, flat[start : start + PIECE]


def _bits(piece: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of |w|: uint32 (n,)."""
    return np.abs(piece).view(np.uint32)


def _cut(weights: Iterable[np.ndarray], k: int) -> tuple[int, int, int]:
    """The k-th largest |w| as `_bits`, and how many are larger and equal; two passes."""
    weights = list(weights)

    def count(of: Any) -> np.ndarray:
        total = np.zeros(HALF, np.int64)
        for w in weights:
            for _, piece in _pieces(w):
                total += np.bincount(of(_bits(piece)), minlength=HALF)
        return total

    def find(counted: np.ndarray, k: int) -> tuple[int, int]:
        """The highest cell of which, with those above, there are k, and how many are above."""
        reached = np.cumsum(counted[::-1])
        above = int(np.searchsorted(reached, max(k, 1)))
        return HALF - 1 - above, int(reached[above - 1]) if above else 0

    high, more = find(count(lambda bits: bits >> 16), k)
    counted = count(lambda bits: bits[bits >> 16 == high] & (HALF - 1))
    low, within = find(counted, k - more)
    return high * HALF + low, more + within, int(counted[low])
