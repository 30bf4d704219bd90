"""The optimizer's moments of connections that do not exist: recognised once, held at their start.

Any optax optimizer keeps some arrays in the shape of the parameters. Those that belong to a sparse
kernel are found by name, not by type, so chains, `MultiSteps` and `multi_transform` need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dst.config import ConfigError

Array = jax.Array


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def recognise(opt_state: Any, params: Any, masks: Mapping[str, Any]) -> list[str | None]:
    """The sparse layer of each leaf of `opt_state`, None for what belongs to none.

    A leaf belongs to a parameter if its path ends in the parameter's and it has its shape. Errors:
    a leaf as large as a sparse kernel that belongs to no parameter.
    """
    owners = {
        _names(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    layers = {(*path.split("/"), "kernel"): path for path in masks}
    smallest = min((mask.size for mask in masks.values()), default=math.inf)
    found: list[str | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        names = _names(path)
        tails = [names[i:] for i in range(len(names))]
        owner = next((t for t in tails if owners.get(t) == leaf.shape), None)
        if owner is None and leaf.size >= smallest > 1:
            raise ConfigError(
                f"optimizer state {'/'.join(names)!r} of shape {leaf.shape} belongs to no "
                "parameter of that shape, so it cannot be kept sparse; use an optimizer that works "
                "coordinate by coordinate (SGD, Adam, ...)."
            )
        found.append(layers.get(owner) if owner else None)
    return found


def reset_inactive(opt_state: Any, fresh: Any, owners: list[str | None], keep: Mapping[str, Array]):
    """`opt_state` with `fresh` (the value of `tx.init`) wherever the layer's `keep` is False."""
    leaves, treedef = jax.tree.flatten(opt_state)
    starts = jax.tree.leaves(fresh)
    kept = [
        leaf if path is None else jnp.where(keep[path], leaf, start)
        for leaf, start, path in zip(leaves, starts, owners, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)
