"""What a method is: a value, whose names stand for rows of the registries in this room."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """How a network is made sparse and how its connections move."""

    name: str
    sparsity: float  # s, of all possible connections
    initial: float | None = None  # sparsity at the first step; None: s from the first step on
    distribution: str = "uniform"  # of the sparsity over the layers at the start
    # (glob on layers' paths, their own sparsity at the start, or None: all their connections, which
    # never move); the first that matches counts, and `distribution` is of what is left
    sparsity_of: tuple[tuple[str, float | None], ...] = ()
    gain: float = 1.0  # variance of a new network's weights x fan-in; 2 is He's
    before: str = ""  # a row of `BEFORE`, what prunes once, before the first step
    temperature: float = 200.0  # T of GraSP's logits / T
    iterations: int = 100  # n of SynFlow's d_k = (1 - s)^(k/n)
    drop: str = ""  # a row of `DROPS`; "": nothing moves
    score: str = ""  # a row of `GROWTHS`; "": nothing grows
    share: str = ""  # a row of `SHARES`; "": growth is ranked over all layers
    heuristic: str = ""  # a row of `HEURISTICS`, f x g that S is drawn from
    growth_memory: str = "dense"  # of the dense gradient; "streamed": one block of it at a time
    drop_fraction: float = 0.2  # |P| / |A| at step 0; a cosine takes it to `last_fraction` at `end`
    last_fraction: float = 0.0
    floor: float = 0.0  # share of its first connections that a layer always keeps; 0: the paper's
    keep_counts: bool = False  # drop and grow within each layer, the weakest and best of it
    every: int = 1000  # steps between two rewires
    end: int = 46_800  # the first step that is not rewired any more, or a ramp's last one
    subset_ratio: float = 10.0  # c = |S| / |P|, or |S_l| / |A_l|
    subset_of: str = "dropped"  # |S| = c |P|, split by layer size; "active": |S_l| = c |A_l|
    rounds: int = 8  # of drawing, to replace duplicates and active connections
    explored: bool = False  # remember which connections ever existed, and report their share
    momentum: float = (
        0.9  # mu of the momentum v <- mu v + g that is a score (SNFS): the optimizer's
    )

    @property
    def moves(self) -> bool:
        """Whether connections ever change during training."""
        return bool(self.drop)

    @property
    def first_sparsity(self) -> float:
        """The sparsity of the network that `init_state` makes."""
        return self.sparsity if self.initial is None else self.initial

    @property
    def ramps(self) -> bool:
        """Whether the sparsity grows during training, with a last rewire at `end` itself."""
        return self.moves and self.first_sparsity != self.sparsity

    @property
    def waits(self) -> bool:
        """Whether what `init_state` makes must be pruned, or be a ticket's, before it may train."""
        return not self.moves and self.first_sparsity != self.sparsity
