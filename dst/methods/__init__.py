"""The rows of Table 1 and what they are made of: what drops, what grows, where S comes from.

`table.py` is the way in; `drop.py`, `grow.py`, `heuristics.py`, `before.py`, `share.py` and
`memory.py` each end with a registry of rows, functions and what they declare. Nothing here may ask
which execution runs.

A method of your own
====================
Register what is new in your config file, or in a module that it imports, and a row that is made of
it. Here is a rule that drops what is weak beside its layer's size, candidates from a sharper GraBo,
and a score that favours narrow layers. Say this is `ours.py`:

    import jax.numpy as jnp

    from dst.config import default
    from dst.methods import DROPS, GROWTHS, HEURISTICS, METHODS
    from dst.methods import Drop, Growth, Heuristic, Row, by_magnitude, grabo, on_subset


    def squared(view):  # what the weakest have least of: of each entry, >= 0
        return view.w**2


    def sharper(net, state, seen):  # f and g of each layer, >= 0
        return {path: (f**2, g**2) for path, (f, g) in grabo(net, state, seen).items()}


    def narrow_first(layer, G):  # of candidates of one layer, from their gradients, >= 0
        return jnp.abs(G) / layer.n_in


    def source(net, method, planned, loss):
        return on_subset(net, method, planned, loss, score=narrow_first)


    DROPS.register("squared", Drop(by_magnitude, strength=squared))
    HEURISTICS.register("sharper", Heuristic(sharper, sums=True))
    GROWTHS.register("narrow_first", Growth(source, draws=True, gradient="subset"))
    METHODS.register(
        "ours",
        Row("Ours", fields={"drop": "squared", "score": "narrow_first", "heuristic": "sharper"}),
    )


    def get_config():
        config = default()
        config.dataset, config.model, config.hidden = "digits", "mlp", (64,)
        config.method, config.sparsity = "ours", 0.9
        config.epochs, config.rewire_every, config.rewire_end_epoch = 5, 10, 4.0
        return config

Then `python -m dst.main --config=ours.py` trains it, in either execution, and so does
`dst.method("ours", 0.9)`. A rule that knows only itself how many go (`planned=False`), or a memory
of every possible connection, is declared, and then refused in sparse execution in a sentence.
"""

from dst.methods.base import Method
from dst.methods.before import BEFORE, Before
from dst.methods.distributions import DISTRIBUTIONS, Distribution
from dst.methods.drop import DROPS, Drop, by_magnitude
from dst.methods.grow import GROWTHS, Growth
from dst.methods.heuristics import HEURISTICS, Heuristic, grabo
from dst.methods.memory import MEMORIES, Memory
from dst.methods.share import SHARES, Share
from dst.methods.subset import on_subset
from dst.methods.table import METHODS, Row, method

__all__ = [
    "BEFORE",
    "DISTRIBUTIONS",
    "DROPS",
    "GROWTHS",
    "HEURISTICS",
    "MEMORIES",
    "METHODS",
    "SHARES",
    "Before",
    "Distribution",
    "Drop",
    "Growth",
    "Heuristic",
    "Memory",
    "Method",
    "Row",
    "Share",
    "by_magnitude",
    "grabo",
    "method",
    "on_subset",
]
