"""What each field of a `Method` may be; what goes together is in `combinations.py`."""

from __future__ import annotations

from dst.errors import (
    YES_OR_NO,
    Rule,
    check_value,
    choice,
    integer,
    listed,
    number,
    one_of,
    tuple_of,
)
from dst.methods.base import Method
from dst.methods.before import BEFORE
from dst.methods.distributions import DISTRIBUTIONS, SPARSITY
from dst.methods.drop import DROPS
from dst.methods.grow import GROWTHS
from dst.methods.heuristics import HEURISTICS
from dst.methods.share import SHARES
from dst.vocabulary import Names


def _or_nothing(names: Names) -> Rule:
    """One of these, or ''."""
    known = one_of(names)[0]
    return lambda v: v == "" or known(v), lambda: listed(["", *(n for n in names if n)])


def _is_pair(pair: object) -> bool:
    """A glob, and None or a sparsity."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
        return False
    return pair[1] is None or SPARSITY[0](pair[1])


FRACTION = number(lambda v: 0 <= v <= 1, "in [0, 1]")
RULES: dict[str, Rule] = {
    "sparsity": SPARSITY,
    "initial": SPARSITY,
    "distribution": one_of(DISTRIBUTIONS),
    "sparsity_of": tuple_of(
        _is_pair,
        lambda v: True,
        "pairs of a glob on layers' paths and None or a number in [0, 1), as (('*/attention/*', "
        "0.9), ('head', None))",
    ),
    "gain": number(lambda v: v > 0, "> 0"),
    "before": _or_nothing(BEFORE),
    "temperature": number(lambda v: v > 0, "> 0"),
    "iterations": integer(1),
    "drop": _or_nothing(DROPS),
    "score": one_of(GROWTHS),
    "share": _or_nothing(SHARES),
    "heuristic": _or_nothing(HEURISTICS),
    "growth_memory": choice("dense", "streamed"),
    "drop_fraction": FRACTION,
    "last_fraction": FRACTION,
    "floor": number(lambda v: 0 <= v < 1, "in [0, 1)"),
    "keep_counts": YES_OR_NO,
    "every": integer(1),
    "end": integer(1),
    "subset_ratio": number(lambda v: v >= 1, ">= 1"),
    "subset_of": choice("dropped", "active"),
    "rounds": integer(1, 1024),  # times at most 2^20 draws
    "explored": YES_OR_NO,
    "momentum": number(lambda v: 0 <= v < 1, "in [0, 1)"),
}


def check_values(method: Method) -> None:
    """Raises ConfigError: a field that no method may have so."""
    for field, rule in RULES.items():
        value = getattr(method, field)
        if value is not None or field != "initial":
            check_value(field, value, rule)
