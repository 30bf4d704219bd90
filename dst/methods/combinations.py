"""Which fields of a method go together, which it never reads, and in which execution it runs.

A method runs as planned or is refused, here and nowhere else: `dst.method`, `init_state`,
`make_rewire` and the command line ask the same questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dst.errors import ConfigError

if TYPE_CHECKING:
    from dst.methods.table import Method


def check(method: Method) -> None:
    """Errors: fields that do not go together, so that one would change nothing or mislead."""
    name, drop, score, share = method.name, method.drop, method.score, method.share
    for wrong, sentence in (
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
            and not (drop == "magnitude" or method.before or name == "lottery"),
            f"drop must be 'magnitude' for method {name!r}, whose sparsity grows from "
            f"{method.first_sparsity} to {method.sparsity}, not {drop!r}.",
        ),
        (
            drop and not score and (drop != "magnitude" or method.initial is None),
            f"score must not be '' for method {name!r}, which drops only as many as grow "
            "(or as `initial` has too many).",
        ),
        (
            method.heuristic and score != "gradient",
            f"heuristic must be '' for method {name!r}, which draws no S (score is {score!r}), "
            f"not {method.heuristic!r}.",
        ),
        (
            score == "gradient" and not method.heuristic,
            f"heuristic must be 'uniform', 'grabo', 'synflow' or 'graest' for method {name!r}, "
            "which draws S from it, not ''.",
        ),
        (
            method.growth_memory == "streamed" and score != "dense gradient",
            f"growth_memory must be 'dense' for method {name!r}, which takes no dense gradient, "
            "not 'streamed'.",
        ),
        (
            share and (not score or method.heuristic or method.growth_memory == "streamed"),
            "share must be '' for a method that does not score every inactive connection at once, "
            f"not {share!r}.",
        ),
        (
            share == "momentum" and score != "momentum",
            f"share must be '' or 'survivors' for method {name!r}, which keeps no momentum of "
            "every connection, not 'momentum'.",
        ),
    ):
        if wrong:
            raise ConfigError(sentence)


def check_execution(method: Method, execution: str) -> None:
    """Errors: a method that cannot run as planned in this execution."""
    if execution == "sparse" and (why := _obstacle(method)):
        what, instead = why
        raise ConfigError(
            f"method {method.name!r} cannot run in execution 'sparse', because {what}; use "
            f"{instead}execution 'masked'."
        )


def _obstacle(method: Method) -> tuple[str, str] | None:
    """Why it cannot run on an arena, and what beside masked execution helps; None if it can.

    An arena holds K connections, always as many, and nothing of those that do not exist.
    """
    score, first, last = method.score, method.first_sparsity, method.sparsity
    if method.before:
        return "it scores every possible connection before training", ""
    if method.name == "lottery":
        return "it begins with every possible connection", ""
    if first != last:
        return f"its sparsity grows from {first} to {last}, and there it is constant", ""
    if method.drop not in ("", "magnitude"):
        return f"its drop is {method.drop!r} and not 'magnitude'", ""
    if method.share:
        return f"it shares growth out to the layers by {method.share}", ""
    if score == "momentum":
        return "it keeps the momentum of every possible connection", ""
    if score == "dense gradient" and method.growth_memory != "streamed":
        what = "it takes the gradient of every possible connection at once"
        return what, "growth_memory='streamed' or "
    if method.explored:
        return "it remembers every connection that ever existed (explored)", ""
    return None


def unread(method: Method) -> set[str]:
    """Fields that this method never reads, whatever they are.

    `every` and `end` are the schedule of a run, which any method takes.
    """
    fields = {
        "temperature": method.before in ("grasp", "grasp_abs"),
        "iterations": method.before == "synflow",
        "distribution": method.name != "dense" and method.initial != 0,
        "floor": method.drop == "magnitude",
        "explored": method.moves,
        "growth_memory": method.score == "dense gradient",
        "heuristic": method.score == "gradient",
        "momentum": method.score == "momentum",
        **dict.fromkeys(("subset_ratio", "subset_of", "rounds"), bool(method.heuristic)),
        **dict.fromkeys(("drop_fraction", "last_fraction"), _plans(method)),
    }
    return {field for field, read in fields.items() if not read}


def _plans(method: Method) -> bool:
    """Whether |G| or |S| of an event follow from the drop fraction; a sign asks nobody."""
    draws = bool(method.heuristic) and method.subset_of == "dropped"
    return bool(method.score) and (method.drop != "sign" or draws)
