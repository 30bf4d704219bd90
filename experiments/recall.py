"""How well a density tells large gradients: rank correlation, recall, gradient mass; in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.stats import rankdata

from dst.layers import Layer
from dst.network import Network

ByLayer = Mapping[str, np.ndarray]
Marginals = Mapping[str, tuple[np.ndarray, np.ndarray]]


def density(layer: Layer, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """How many times likelier than by `uniform` each connection is drawn: float64 (n,), mean 1.

    All 0 where nothing can be drawn. The places in a convolution's window are alike.
    """
    f, g = (np.asarray(p, np.float64) for p in (f, g))
    f, g = (p / p.mean() if p.any() else p for p in (f, g))
    return np.broadcast_to(np.outer(f, g), layer.shape).ravel()


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None if either is constant."""
    if not (np.ptp(a) and np.ptp(b)):
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def correlations(
    net: Network, G: ByLayer, inactive: ByLayer, fg: Marginals
) -> tuple[float | None, float | None]:
    """Of the density with |G| over what is inactive: of the network, and the mean of the layers'.

    Layers that have none are left out of the mean. Shapes: G float (n,), inactive bool (n,).
    """
    pairs = [
        (density(layer, *fg[path])[inactive[path]], G[path][inactive[path]])
        for path, layer in net.layers.items()
    ]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return spearman(a, b), mean(spearman(*pair) for pair in pairs if len(pair[0]))


def largest_gradients(G: np.ndarray, inactive: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest |G| that are inactive, of equals the first: int (k,), sorted."""
    return np.argsort(np.where(inactive, -G, np.inf), kind="stable")[:k]


def caught(G: np.ndarray, best: np.ndarray, S: np.ndarray) -> tuple[float, float | None]:
    """Recall and gradient mass of S (positions), `best` being what `largest_gradients` gives.

    The mass is None if every gradient is 0.
    """
    held = np.sort(G[S])[::-1][: len(best)].sum(dtype=np.float64)
    whole = G[best].sum(dtype=np.float64)
    return float(np.isin(best, S).mean()), float(held / whole) if whole else None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None, None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
