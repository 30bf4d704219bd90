"""The rows of Table 1, and the related methods: a method is a value made of functions.

| row       | starts with    | drops                    | grows                     | memory      |
| --------- | -------------- | ------------------------ | ------------------------- | ----------- |
| dense     | everything     | -                        | -                         | dense       |
| lottery   | everything     | weakest, between rounds  | -                         | dense       |
| pruning   | everything     | weakest, cubic ramp      | -                         | dense       |
| snip      | everything     | before: |w g|            | -                         | dense, once |
| grasp     | everything     | before: w Hg             | -                         | dense, once |
| grasp_abs | everything     | before: |w Hg|           | -                         | dense, once |
| synflow   | everything     | before: w dR/dw          | -                         | dense, once |
| random    | G(n, M)        | -                        | -                         | sparse      |
| set       | G(n, M)        | weakest                  | by chance                 | sparse      |
| rigl      | G(n, M)        | weakest                  | largest gradient          | dense       |
| gse       | G(n, M)        | weakest                  | largest gradient on S~f g | sparse      |
| gse_v2    | G(n, M), ER    | weakest                  | as gse, |S_l| = c |A_l|   | sparse      |
| snfs      | G(n, M)        | weakest of each layer    | largest momentum          | dense       |
| dsr       | G(n, M)        | below a threshold        | by chance                 | sparse      |
| deepr     | G(n, M), signs | whose sign changed       | by chance                 | sparse      |
| granet    | G(n, M) at 0.5 | weakest, cubic ramp      | largest gradient          | dense       |
| itop      | G(n, M), ERK   | weakest, its schedule    | largest gradient          | dense       |

`rewire.py` has the one step in which those that drop or grow differ, `before.py` what prunes before
training, `lottery.py` the rounds. What drops and what grows are rows of `DROPS` and `GROWTHS`.

Where sources differ, in every row: the drop and the growth are global, S is split over layers by
size, what was just dropped does not return in the same step, the gradient is taken before the drop
on the current batch, grown weights and their moments start at 0, then the ordinary step follows.
What a row chose of its own is its `choice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dst.errors import ConfigError, check_value, near, one_of
from dst.methods.base import Method
from dst.methods.combinations import check, unread
from dst.methods.drop import DROPS
from dst.methods.fields import CALLED
from dst.methods.rules import RULES, check_values
from dst.vocabulary import Names


class Row(NamedTuple):
    """A method as it is listed: what it has of its own among the fields of `Method`."""

    label: str  # in tables and figures
    source: str = ""
    fields: dict[str, Any] = {}  # noqa: RUF012
    passes: str = ""  # in words: what it takes beside the steps
    choice: str = ""  # ours, where sources differ
    to_the_end: bool = False  # explores to the last epoch, where the run does not say otherwise


def _check_row(who: str, row: Row) -> None:
    own = RULES.keys() - {"sparsity"}  # which is a run's
    if unknown := row.fields.keys() - own:
        raise ConfigError(
            f"{who} has no field {min(unknown)!r}; a row may have {', '.join(sorted(own))}."
        )


_RIGL = {"drop": "magnitude", "score": "dense gradient"}
_GSE = {"drop": "magnitude", "score": "gradient", "heuristic": "grabo"}

METHODS = Names(
    "method",
    Row,
    dict(
        dense=Row("Dense"),
        lottery=Row(
            "Lottery",
            "Frankle & Carbin, 2019",
            {"initial": 0.0},
            passes="a whole training a level",
            choice="rewound to step 0; ranked on the last weights; levels 0, 50, 75, 90, 95, 98 %",
        ),
        pruning=Row(
            "Pruning",
            "Zhu & Gupta, 2017",
            {"initial": 0.0, "drop": "magnitude"},
            choice="global, monotone, from step 0; the last update exactly at `rewire_end_epoch`",
        ),
        snip=Row(
            "SNIP",
            "Lee et al., 2019",
            {"initial": 0.0, "before": "snip"},
            passes="one over the training set",
            choice="BN in train mode, its statistics thrown away; scored weights are trained",
        ),
        grasp=Row(
            "GraSP",
            "Wang et al., 2020",
            {"initial": 0.0, "before": "grasp"},
            passes="two over the training set",
            choice="the same; T = 200",
        ),
        grasp_abs=Row(
            "|GraSP|",
            "Lubana & Dick, 2021",
            {"initial": 0.0, "before": "grasp_abs", "temperature": 1.0},
            passes="two over the training set",
            choice="|score| of each weight; T = 1, as in their code (`grasp_temperature`)",
        ),
        synflow=Row(
            "SynFlow",
            "Tanaka et al., 2020",
            {"initial": 0.0, "before": "synflow"},
            passes="100 of one image of ones",
            choice="float64; BN as its positive factor, no biases; `synflow_rounds`",
        ),
        random=Row("Random"),
        set=Row(
            "SET",
            "Mocanu et al., 2018",
            {"drop": "magnitude", "score": "chance"},
            choice="RigL's simplified form, global",
        ),
        rigl=Row(
            "RigL",
            "Evci et al., 2020",
            _RIGL,
            passes="a dense gradient a rewire",
            choice="just-dropped connections do not return; the SGD step follows",
        ),
        gse=Row(
            "GSE (the paper's)",
            "the paper",
            _GSE,
            passes="two a rewire",
            choice="`heuristic`: also `uniform`, `synflow`; `graest` of Heddes et al., 2024",
        ),
        gse_v2=Row(
            "GSE v2",
            "Heddes et al., 2024",
            _GSE
            | {
                "distribution": "er_unfolded",
                "heuristic": "uniform",
                "subset_of": "active",
                "subset_ratio": 1.0,
                "rounds": 1,
            },
            passes="one a rewire",
            choice="|S_l| = |A_l|, drawn once; ER over the unfolded kernel; uniform marginals",
        ),
        snfs=Row(
            "SNFS",
            "Dettmers & Zettlemoyer, 2019",
            {
                "drop": "layer magnitude",
                "score": "momentum",
                "share": "momentum",
                "drop_fraction": 0.5,
            },
            passes="a dense gradient a step",
            choice="just-dropped connections do not return",
        ),
        dsr=Row(
            "DSR",
            "Mostafa & Wang, 2019",
            {"drop": "threshold", "score": "chance", "share": "survivors"},
            choice="the target follows the cosine",
        ),
        deepr=Row(
            "DeepR",
            "Bellec et al., 2018",
            {"drop": "sign", "score": "chance"},
            choice="`l1` is its alpha, no noise; `rewire_every=1` is its period",
        ),
        granet=Row(
            "GraNet",
            "Liu et al., 2021",
            _RIGL | {"initial": 0.5, "distribution": "erk", "drop_fraction": 0.5},
            passes="a dense gradient a rewire",
            choice="from 50 %, cubic; regrows what it has not just dropped",
        ),
        itop=Row(
            "RigL-ITOP",
            "Liu et al., 2021",
            _RIGL
            | {
                "distribution": "erk",
                "drop_fraction": 0.5,
                "last_fraction": 0.005,
                "every": 4000,
                "explored": True,
            },
            to_the_end=True,
            passes="a dense gradient a rewire",
            choice="RigL every 4000 steps to the last epoch; the log tells the share ever explored",
        ),
    ),
    _check_row,
)


def row_of(name: str, sparsity: float = 0.0) -> Method:
    """The method of this name, whatever else it may be given."""
    return Method(name, 0.0 if name == "dense" else sparsity)._replace(**METHODS[name].fields)


def plain(value: Any) -> Any:
    """A NumPy number, as a step count often is, as Python's: a method holds these."""
    return value.item() if isinstance(value, np.generic) else value


def method(name: str, sparsity: float = 0.98, **options) -> Method:
    """A row of Table 1 by name; `options` are fields of `Method`.

    `every` and `end` are a run's schedule, which any method takes: a rewire every 1000 steps up to
    step 46,800, as the paper has it, unless you say otherwise. `sparsity_of` may be a dict:
    {"*/attention/*": 0.9, "head": None} gives the layers whose paths a glob matches (the first that
    does) that sparsity at the start, None all connections for good; the others share what is left
    of K. Raises: an unknown name, field or heuristic, a value out of range, fields that do not go
    together or that it never reads.
    """
    check_value("method", name, one_of(METHODS))
    unknown = options.keys() - Method._fields
    if unknown:
        hint = near(min(unknown), Method._fields, CALLED)
        raise ConfigError(
            f"a method has no field {min(unknown)!r}{hint}; it has {', '.join(Method._fields)}."
        )
    sparsity, options = plain(sparsity), {f: plain(v) for f, v in options.items()}
    if isinstance(options.get("sparsity_of"), Mapping):  # a method is hashable
        options["sparsity_of"] = tuple((g, plain(s)) for g, s in options["sparsity_of"].items())
    row = row_of(name, sparsity)
    made = row._replace(**options)
    check_values(made._replace(sparsity=sparsity))  # that of a dense network is not read
    if made.initial != row.initial and not (made.drop and DROPS[made.drop].planned):
        raise ConfigError(f"initial must be {row.initial} for method {name!r}, not {made.initial}.")
    check(made)
    for field in sorted(unread(made) & options.keys()):
        if options[field] != getattr(row, field):
            raise ConfigError(
                f"{field} must be {getattr(row, field)!r} for method {name!r}, which does not read "
                f"it, not {options[field]!r}."
            )
    return made
