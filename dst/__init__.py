"""Dynamic sparse training with guided stochastic exploration, in JAX and Flax.

    net = dst.network(model, x)
    method = dst.method("gse", sparsity=0.95, every=50, end=200)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    update, rewire = dst.make_update(net, tx, loss), dst.make_rewire(net, tx, method, loss)
    if dst.due(method, step):
        state, report = rewire(state, batch)
    state, metrics = update(state, batch)

- Which layers, how sparse: `dst.network(model, x, dense="head")`, `dst.method(...,
  sparsity_of={"*/attention/*": 0.9, "head": None}, keep_counts=True)`.
- Start from weights: `dst.init_state(..., params=variables)` keeps the largest, of a file of
  `dst.export` its connections; `init="model"` uses the model's own initialisers.
- A model with a flag: `dst.network(model, x, train=False)`, which predicts so, and in the loss
  `apply(x, train=True)`; what batch normalisation then writes is kept, and random streams of any
  name are there. `loss(apply, batch, key)` gets a key a step. On several devices means are
  averaged: a weighted one is `dst.weighted_mean(values, weights)`, and
  `BatchNorm(axis_name=...)` sees the whole batch.
- An average beside the state follows a rewire by `dst.carry(average, before, state)` and predicts
  by `dst.predictor(net, state, params=average)`.
- Methods that prune before training take `dst.prune_at_init(net, tx, method, loss, state,
  batches)`, masked; truly sparse, what they leave trains from its file, `dst.export(net, state,
  file)`, by `dst.init_state(sparse_net, tx, dst.method("random", sparsity), key, params=file)`. For
  Lottery's loop see `dst.lottery`.
- Truly sparse: `dst.network(..., execution="sparse")`; `dst.export`, `dst.load` and
  `dst.predictor` for what was trained. A run of the command line leaves such a file, `network.npz`.
- A state is a pytree of arrays: orbax saves it, and restores it into one that `init_state` makes.
"""

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
