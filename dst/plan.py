"""What is known of a run's rewires beforehand: when, how many are dropped, how many sampled."""

from __future__ import annotations

import numpy as np

from dst.masks import active_count
from dst.methods import Method
from dst.network import Network
from dst.schedules import drop_counts, events, largest_remainder
from dst.state import first_counts


def plan(net: Network, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """|P_t| (E,) and |S_{l,t}| (E, L) of every rewire event, exact integers, and a last row of 0.

    |P_t| = floor(p_t K); |S_t| = min(ceil(c |P_t|), N) is split over layers in proportion to |W_l|.
    """
    K = active_count(net.possible, method.sparsity)
    sizes = [layer.size for layer in net.layers.values()]
    P = drop_counts(K, method.drop_fraction, method.every, method.end)
    P = np.append(np.minimum(P, net.possible - K), 0).astype(np.int32)
    asked = np.ceil(method.subset_ratio * P).astype(np.int64)
    S = np.stack([largest_remainder(int(s), sizes, sizes) for s in asked])
    return P, S.astype(np.int32)


def floors(net: Network, method: Method) -> np.ndarray:
    """Connections that the drop leaves each layer, int64 (L,): floor(floor x its first count)."""
    first = np.array([*first_counts(net, method).values()], np.int64)
    # Rounded: 0.29 * 100 is 28.999999999999996 in float64.
    return np.floor(np.round(method.floor * first, 6)).astype(np.int64)


def due(method: Method, step: int) -> bool:
    """Whether `method` rewires before this step's update: at every, 2 every, ... below the end."""
    return method.grows and step in events(method.every, method.end)
