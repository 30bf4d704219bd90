"""The rows of Table 1: a method is a value.

| row    | starts    | candidates           | scored by             | memory of a rewire       |
| ------ | --------- | -------------------- | --------------------- | ------------------------ |
| dense  | all       | -                    | -                     | -                        |
| random | G(n, M)   | -                    | -                     | -                        |
| set    | G(n, M)   | all inactive         | chance                | sparse                   |
| rigl   | G(n, M)   | all inactive         | the dense gradient    | dense                    |
| gse    | G(n, M)   | S from f x g         | the gradient on S     | sparse                   |

`rewire.py` has the one step in which they differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dst.config import ConfigError, Rule, check_field, check_value, choice, number


class Method(NamedTuple):
    """How a network is made sparse and how its connections move."""

    name: str
    sparsity: float  # s, of all possible connections
    distribution: str = "uniform"  # of the sparsity over the layers at the start
    heuristic: str = ""  # f x g that S is drawn from; "": every inactive connection
    score: str = ""  # "chance", "dense gradient" or "gradient"; "": never rewired
    drop_fraction: float = 0.2  # |P| / |A| at step 0; a cosine takes it to 0 at `end`
    floor: float = 0.0  # share of its first connections that a layer always keeps; 0: the paper's
    every: int = 1000  # steps between two rewires
    end: int = 46_800  # the first step that is not rewired any more
    subset_ratio: float = 10.0  # c = |S| / |P|
    rounds: int = 8  # of drawing, to replace duplicates and active connections
    gain: float = 2.0  # variance of a new network's weights x fan-in; 2 is He's

    @property
    def grows(self) -> bool:
        """Whether connections ever move."""
        return bool(self.score)


ROWS: dict[str, dict] = {
    "dense": {},
    "random": {},
    "set": {"score": "chance"},
    "rigl": {"score": "dense gradient"},
    "gse": {"score": "gradient", "heuristic": "grabo"},
}


# What `options` may be: the rule of a config field, or one of their own.
RULES: dict[str, Rule | str] = {
    "distribution": "distribution",
    "heuristic": "heuristic",
    "score": choice("", "chance", "dense gradient", "gradient"),
    "drop_fraction": "drop_fraction",
    "floor": "layer_floor",
    "every": "rewire_every",
    "end": "rewire_every",
    "subset_ratio": "subset_ratio",
    "rounds": "sampling_rounds",
    "gain": number(lambda v: v > 0, "> 0"),
}


def method(name: str, sparsity: float = 0.98, **options) -> Method:
    """A row of Table 1 by name; `options` are fields of `Method`.

    Errors: an unknown name, field or heuristic, or a value out of range.
    """
    check_field("method", name)
    check_field("sparsity", sparsity)
    unknown = options.keys() - Method._fields
    if unknown:
        raise ConfigError(
            f"a method has no field {min(unknown)!r}; it has {', '.join(Method._fields)}."
        )
    # A step count is often NumPy's; a method holds plain numbers.
    options = {f: v.item() if isinstance(v, np.generic) else v for f, v in options.items()}
    for field, value in options.items():
        check_value(field, value, RULES[field])
    if name != "gse":
        options.pop("heuristic", None)
    return Method(name, 0.0 if name == "dense" else sparsity, **{**ROWS[name], **options})
