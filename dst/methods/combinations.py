"""Which fields of a method go together, which it never reads, and in which execution it runs.

A method runs as planned or is refused, here and nowhere else: `dst.method`, `init_state`,
`make_rewire` and the command line ask the same questions, of what the registries declare.
"""

from __future__ import annotations

from collections.abc import Iterable

from dst.connections.execution import EXECUTIONS
from dst.errors import ConfigError, check_value, listed, one_of
from dst.methods.base import Method
from dst.methods.before import BEFORE
from dst.methods.drop import DROPS
from dst.methods.grow import GROWTHS
from dst.methods.heuristics import HEURISTICS
from dst.methods.memory import MEMORIES
from dst.methods.rules import check_values
from dst.methods.share import SHARES


def memories(method: Method) -> tuple[str, ...]:
    """Names of what the method remembers, see `MEMORIES`."""
    dropping = DROPS[method.drop].memory if method.drop else ()
    explored = ("explored",) if method.explored else ()
    return (*GROWTHS[method.score].memory, *dropping, *explored)


def _planned(method: Method) -> bool:
    """Whether the number of connections that go is known beforehand."""
    return bool(method.drop) and DROPS[method.drop].planned


def check(method: Method) -> None:
    """Raises ConfigError: a field's value, or fields that do not go together and would mislead."""
    check_values(method)
    for wrong, sentence in (*_of_sparsity(method), *_of_growth(method)):
        if wrong:
            raise ConfigError(sentence)


def _of_sparsity(method: Method) -> Iterable[tuple[object, str]]:
    """(whether it is so, the sentence) of what may be wrong with how sparsity is reached."""
    name, drop, score = method.name, method.drop, method.score
    planned = [rule for rule, row in DROPS.items() if row.planned]
    return (
        (
            method.first_sparsity > method.sparsity,
            f"initial must be at most {method.sparsity}, the sparsity to reach, "
            f"not {method.initial}.",
        ),
        (
            drop and (method.before or name == "lottery"),
            f"drop must be '' for method {name!r}, which prunes before training, not {drop!r}.",
        ),
        (
            method.before and name == "lottery",
            f"before must be '' for method 'lottery', not {method.before!r}.",
        ),
        (
            score and not drop,
            f"score must be '' for method {name!r}, which drops nothing, not {score!r}.",
        ),
        (
            method.first_sparsity != method.sparsity
            and not (_planned(method) or method.before or name == "lottery"),
            f"drop must be {listed(planned)} for method {name!r}, whose sparsity grows from "
            f"{method.first_sparsity} to {method.sparsity}, not {drop!r}.",
        ),
        (
            drop and not score and (not _planned(method) or method.initial is None),
            f"score must not be '' for method {name!r}, which drops only as many as grow "
            "(or as `initial` has too many).",
        ),
        (
            method.ramps and method.floor * (1 - method.first_sparsity) > 1 - method.sparsity,
            f"floor must be at most {(1 - method.sparsity) / (1 - method.first_sparsity):.6g} for "
            f"method {name!r}, or its sparsity never reaches {method.sparsity}, "
            f"not {method.floor}.",
        ),
    )


def _of_growth(method: Method) -> Iterable[tuple[object, str]]:
    """(whether it is so, the sentence) of what may be wrong with how connections grow."""
    name, score, share, growth = method.name, method.score, method.share, GROWTHS[method.score]
    at_once = score and not growth.draws and method.growth_memory != "streamed"
    return (
        (
            method.keep_counts and score and not _keeps_counts(method),
            f"keep_counts must be False for method {name!r}: to keep them takes a constant "
            "sparsity, a drop rule that is told how many go, and growth that finds the best of "
            "each layer and is not shared out.",
        ),
        (
            method.heuristic and not growth.draws,
            f"heuristic must be '' for method {name!r}, which draws no S (score is {score!r}), "
            f"not {method.heuristic!r}.",
        ),
        (
            growth.draws and not method.heuristic,
            f"heuristic must be {listed(HEURISTICS)} for method {name!r}, which draws S from it, "
            "not ''.",
        ),
        (
            method.growth_memory == "streamed" and growth.gradient != "all",
            f"growth_memory must be 'dense' for method {name!r}, which takes no dense gradient, "
            "not 'streamed'.",
        ),
        (
            share and not at_once,
            "share must be '' for a method that does not score every inactive connection at once, "
            f"not {share!r}.",
        ),
        (
            share and not {*SHARES[share].memory} <= {*growth.memory},
            f"share must be '' or {listed(_free())} for method {name!r}, which keeps no "
            f"{share} of every connection, not {share!r}.",
        ),
    )


def _keeps_counts(method: Method) -> bool:
    """Whether its drop and growth can be within each layer."""
    constant = method.first_sparsity == method.sparsity
    within = GROWTHS[method.score].by_layer and not method.share
    return constant and _planned(method) and bool(method.score) and within


def _free() -> list[str]:
    """What growth can be shared by, whatever is remembered."""
    return [share for share, row in SHARES.items() if not row.memory]


def check_execution(method: Method, execution: str) -> None:
    """Raises ConfigError: no such execution, a method that cannot run in it as planned."""
    check_value("execution", execution, one_of(EXECUTIONS))
    if not EXECUTIONS[execution].kind.every_possible and (why := _obstacle(method)):
        what, instead = why
        raise ConfigError(
            f"method {method.name!r} cannot run in execution {execution!r}, because {what}; use "
            f"{instead}execution 'masked'."
        )


def _obstacle(method: Method) -> tuple[str, str] | None:
    """Why it cannot run on an arena, and what beside masked execution helps; None if it can.

    An arena holds K connections, always as many, and nothing of those that do not exist.
    """
    first, last = method.first_sparsity, method.sparsity
    if method.before:
        instead = (
            "a file of what it leaves (dst.export) as params of dst.init_state with 'random', or "
        )
        return "it scores every possible connection before training", instead
    if method.name == "lottery":
        return "it begins with every possible connection", ""
    if first != last:
        return f"its sparsity grows from {first} to {last}, and there it is constant", ""
    if method.drop and not DROPS[method.drop].planned:
        return f"its drop is {method.drop!r}, which does not say beforehand how many go", ""
    if method.share:
        return f"it shares growth out to the layers by {method.share}", ""
    for name in memories(method):
        if MEMORIES[name].needs:
            return MEMORIES[name].needs, ""
    return GROWTHS[method.score].obstacle(method)


def unread(method: Method) -> set[str]:
    """Fields that this method never reads, whatever they are.

    `every` and `end` are the schedule of a run, which any method takes.
    """
    growth = GROWTHS[method.score]
    pruning = BEFORE[method.before].reads if method.before else ()
    fields = {
        "temperature": "temperature" in pruning,
        "iterations": "iterations" in pruning,
        "distribution": method.name != "dense" and method.initial != 0,
        "sparsity_of": method.name not in ("dense", "lottery")
        and method.first_sparsity == method.sparsity,
        "keep_counts": _keeps_counts(method),
        "floor": bool(method.drop) and DROPS[method.drop].floors,
        "explored": method.moves,
        "growth_memory": growth.gradient == "all",
        "heuristic": growth.draws,
        "momentum": "momentum" in memories(method),
        **dict.fromkeys(("subset_ratio", "subset_of", "rounds"), bool(method.heuristic)),
        **dict.fromkeys(("drop_fraction", "last_fraction"), _plans(method)),
    }
    return {field for field, read in fields.items() if not read}


def _plans(method: Method) -> bool:
    """Whether |G| or |S| of an event follow from the drop fraction; a sign asks nobody."""
    draws = bool(method.heuristic) and method.subset_of == "dropped"
    return bool(method.score) and (DROPS[method.drop].asks or draws)
