"""Dynamic sparse training with guided stochastic exploration, in JAX and Flax."""

from dst.connections.carry import carry
from dst.discovery import network
from dst.errors import ConfigError
from dst.loss import weighted_mean
from dst.methods import lottery
from dst.methods.base import Method
from dst.methods.plan import due
from dst.methods.table import method
from dst.network import Network
from dst.rewire import make_rewire
from dst.start import init_state, prune_at_init
from dst.state import SparseState, sparsity_of
from dst.training.export import export, load, predictor
from dst.update import make_update

__all__ = [
    "ConfigError",
    "Method",
    "Network",
    "SparseState",
    "carry",
    "due",
    "export",
    "init_state",
    "load",
    "lottery",
    "make_rewire",
    "make_update",
    "method",
    "network",
    "predictor",
    "prune_at_init",
    "sparsity_of",
    "weighted_mean",
]
__version__ = "0.1.0"
