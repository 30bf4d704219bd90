"""Dynamic sparse training with guided stochastic exploration, in JAX and Flax."""

from dst.config import ConfigError
from dst.methods import Method, method
from dst.network import Network, network
from dst.plan import due
from dst.rewire import make_rewire
from dst.state import SparseState, init_state, sparsity_of
from dst.update import make_update

__all__ = [
    "ConfigError",
    "Method",
    "Network",
    "SparseState",
    "due",
    "init_state",
    "make_rewire",
    "make_update",
    "method",
    "network",
    "sparsity_of",
]
__version__ = "0.1.0"
