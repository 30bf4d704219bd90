"""What a model sows: written anew by every call, so no part of a state.

`self.sow` adds to what is there, in another shape each time; a state has one shape. So what is sown
is left out of it, and handed to the loss that asks: apply(x, mutable=["losses"]), as in Flax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Path = tuple[str, ...]  # ("losses", "Dense_0", "l1")


def entries(collections: Mapping[str, Any]) -> dict[Path, Any]:
    """Every variable of some collections, by its path; what is sown is a tuple."""
    return traverse_util.flatten_dict(dict(collections))


def without(collections: Mapping[str, Any], sown: frozenset[Path]) -> dict[str, Any]:
    """The collections with these entries left out."""
    kept = {path: leaf for path, leaf in entries(collections).items() if path not in sown}
    return traverse_util.unflatten_dict(kept)


def sown(
    variables: Mapping[str, Any],
    again: Mapping[str, Any],
    missing: Callable[[str, list[str]], Any],
) -> frozenset[Path]:
    """The entries of `variables`, as `init` makes them, that the model sows.

    They have another form in `again`, the variables after one more call; or are of a collection
    without which the model runs although it cannot make it: `sow` then does nothing, where
    `variable` raises. `missing(collection, mutable)` is such a call.
    """
    collections = {name: c for name, c in variables.items() if name != "params"}
    after = entries(again)
    found = {p for p, leaf in entries(collections).items() if _form(leaf) != _form(after.get(p))}
    for name in collections:
        try:
            missing(name, [other for other in collections if other != name])
        except Exception:  # whatever the model makes of a variable that it does not find
            continue
        found |= entries({name: collections[name]}).keys()
    return frozenset(found)


def _form(entry: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(entry), [jnp.shape(leaf) for leaf in jax.tree.leaves(entry)]
