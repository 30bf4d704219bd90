"""Lottery tickets (Frankle and Carbin, 2019): train, keep the largest, start over, several times.

A round trains theta_0 x masks for the whole schedule; `winning` chooses the next round's masks from
the trained weights and `ticket` takes them back to theta_0, which the key gives again:

    masks = None
    for following in [*dst.lottery.levels(0.98)[1:], None]:
        state = train(dst.lottery.ticket(net, tx, method, key, masks))
        masks = masks if following is None else dst.lottery.winning(net, state, following)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dst.connections.execution import EXECUTIONS
from dst.connections.masks import kernels_of
from dst.errors import ConfigError
from dst.methods.base import Method
from dst.methods.before import strongest
from dst.methods.distributions import count_of
from dst.network import Network
from dst.start import init_state, start_with
from dst.state import SparseState

LEVELS = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98)  # section 4.1


def levels(sparsity: float, among: Sequence[float] = LEVELS) -> tuple[float, ...]:
    """Sparsity of each round: the levels below `sparsity`, by default the paper's, and itself."""
    return (*(level for level in among if level < sparsity), sparsity)


def winning(net: Network, state: SparseState, sparsity: float) -> dict[str, np.ndarray]:
    """Masks of the largest |w| among the trained, K of them: global, by stable rank.

    Raises: sparse execution, fewer connections than K or K = 0, weights that are not finite.
    """
    if not EXECUTIONS[net.execution].kind.every_possible:
        raise ConfigError(
            f"execution is {net.execution!r}, but 'lottery' begins with all connections; it must "
            "be 'masked'."
        )
    K = count_of(net, sparsity)
    active = sum(np.count_nonzero(mask) for mask in state.masks.values())
    if active < K:
        raise ConfigError(
            f"sparsity is {sparsity}, which keeps {K} connections, but the state has {active}; a "
            "round must be sparser than the one before."
        )
    kernels = kernels_of(state.params, state.masks)
    magnitude = {path: np.abs(kernel) for path, kernel in kernels.items()}
    return strongest(magnitude, state.masks, K, "the weight")


def ticket(
    net: Network,
    tx: optax.GradientTransformation,
    method: Method,
    key: jax.Array,
    masks: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | str | os.PathLike | None = None,
    init: str = "fan_in",
) -> SparseState:
    """The state at the start of a round: theta_0 of this key on the masks, all else new.

    Without masks it is that of the first round, with all connections, as `method` starts. Weights
    that stay are those of `init_state` bit for bit. `params` and `init` are
    those of `init_state`: theta_0 may be what one has (Chen et al., 2020).
    """
    state = init_state(net, tx, method, key, params=params, init=init)
    return start_with(tx, state, state.masks if masks is None else masks)
