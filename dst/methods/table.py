"""The rows of Table 1, and the related methods: a method is a value.

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

`rewire.py` has the one step in which those that drop or grow differ, `scores.py` what prunes before
training, `lottery.py` the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dst.config import check_field, default, field_rule
from dst.data.table import DATASETS
from dst.errors import ConfigError, Rule, check_value, choice
from dst.methods.combinations import check, check_execution, unread
from dst.models.table import never_reads


class Method(NamedTuple):
    """How a network is made sparse and how its connections move."""

    name: str
    sparsity: float  # s, of all possible connections
    initial: float | None = None  # sparsity at the first step; None: s from the first step on
    distribution: str = "uniform"  # of the sparsity over the layers at the start
    gain: float = 2.0  # variance of a new network's weights x fan-in; 2 is He's
    before: str = ""  # score of `scores.py` that prunes once, before the first step
    temperature: float = 200.0  # T of GraSP's logits / T
    iterations: int = 100  # n of SynFlow's d_k = (1 - s)^(k/n)
    drop: str = ""  # "magnitude", "layer magnitude", "threshold" or "sign"; "": nothing moves
    score: str = ""  # "chance", "gradient", "dense gradient" or "momentum"; "": nothing grows
    share: str = ""  # growth over layers: by rank of all; "momentum" or "survivors" of each layer
    heuristic: str = ""  # f x g that S is drawn from; "": every inactive connection
    growth_memory: str = "dense"  # of the dense gradient; "streamed": one block of it at a time
    drop_fraction: float = 0.2  # |P| / |A| at step 0; a cosine takes it to `last_fraction` at `end`
    last_fraction: float = 0.0
    floor: float = 0.0  # share of its first connections that a layer always keeps; 0: the paper's
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


_RIGL = {"drop": "magnitude", "score": "dense gradient"}
_GSE = {"drop": "magnitude", "score": "gradient", "heuristic": "grabo"}

ROWS: dict[str, dict] = {
    "dense": {},
    "lottery": {"initial": 0.0},
    "pruning": {"initial": 0.0, "drop": "magnitude"},
    "snip": {"initial": 0.0, "before": "snip"},
    "grasp": {"initial": 0.0, "before": "grasp"},
    "grasp_abs": {"initial": 0.0, "before": "grasp_abs", "temperature": 1.0},
    "synflow": {"initial": 0.0, "before": "synflow"},
    "random": {},
    "set": {"drop": "magnitude", "score": "chance"},
    "rigl": _RIGL,
    "gse": _GSE,
    "gse_v2": _GSE
    | {
        "distribution": "er_unfolded",
        "heuristic": "uniform",
        "subset_of": "active",
        "subset_ratio": 1.0,
        "rounds": 1,
    },
    "snfs": {
        "drop": "layer magnitude",
        "score": "momentum",
        "share": "momentum",
        "drop_fraction": 0.5,
    },
    "dsr": {"drop": "threshold", "score": "chance", "share": "survivors"},
    "deepr": {"drop": "sign", "score": "chance"},
    "granet": _RIGL | {"initial": 0.5, "distribution": "erk", "drop_fraction": 0.5},
    "itop": _RIGL
    | {
        "distribution": "erk",
        "drop_fraction": 0.5,
        "last_fraction": 0.005,
        "every": 4000,
        "explored": True,
    },
}

# What `options` may be: the rule of a config field, or one of their own.
RULES: dict[str, Rule | str] = {
    "initial": "initial_sparsity",
    "distribution": "distribution",
    "gain": "init_gain",
    "before": choice("", "snip", "grasp", "grasp_abs", "synflow"),
    "temperature": "grasp_temperature",
    "iterations": "rewire_every",
    "drop": choice("", "magnitude", "layer magnitude", "threshold", "sign"),
    "score": choice("", "chance", "gradient", "dense gradient", "momentum"),
    "share": choice("", "momentum", "survivors"),
    "heuristic": choice("", "uniform", "grabo", "synflow", "graest"),
    "growth_memory": "growth_memory",
    "drop_fraction": "drop_fraction",
    "last_fraction": "drop_fraction",
    "floor": "layer_floor",
    "every": "rewire_every",
    "end": "rewire_every",
    "subset_ratio": "subset_ratio",
    "subset_of": choice("dropped", "active"),
    "rounds": "sampling_rounds",
    "explored": "track_explored",
    "momentum": "momentum",
}

# Config fields that a method may have its own value of: the field of `Method`.
OWN = {
    "initial_sparsity": "initial",
    "distribution": "distribution",
    "grasp_temperature": "temperature",
    "heuristic": "heuristic",
    "drop_fraction": "drop_fraction",
    "rewire_every": "every",
    "subset_ratio": "subset_ratio",
    "sampling_rounds": "rounds",
}
# All config fields that a method reads, beside the schedule, which is the run's.
FIELDS = {
    **{field: name for field, name in OWN.items() if name != "every"},
    "init_gain": "gain",
    "growth_memory": "growth_memory",
    "layer_floor": "floor",
    "track_explored": "explored",
}
END_EPOCH = 120.0  # the paper's second learning rate drop; ITOP explores to the last epoch


def method(name: str, sparsity: float = 0.98, **options) -> Method:
    """A row of Table 1 by name; `options` are fields of `Method`.

    `every` and `end` are a run's schedule, which any method takes. Errors: an unknown name, field
    or heuristic, a value out of range, fields that do not go together or that it never reads.
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
        if value is not None or field != "initial":
            rule = RULES[field]
            check_value(field, value, field_rule(rule) if isinstance(rule, str) else rule)
    row = Method(name, 0.0 if name == "dense" else sparsity)._replace(**ROWS[name])
    made = row._replace(**options)
    if made.initial != row.initial and made.drop != "magnitude":
        raise ConfigError(f"initial must be {row.initial} for method {name!r}, not {made.initial}.")
    check(made)
    for field in sorted(unread(made) & options.keys()):
        if options[field] != getattr(row, field):
            raise ConfigError(
                f"{field} must be {getattr(row, field)!r} for method {name!r}, which does not read "
                f"it, not {options[field]!r}."
            )
    return made


def resolve(config: ConfigDict) -> ConfigDict:
    """A locked copy in which what follows from other fields is filled in.

    A field that is None has the method's own value, its source's; `method='dense'` trains every
    connection, so its sparsity is 0, whatever the file that it overrides says.
    """
    resolved = config.copy_and_resolve_references()
    own = Method(config.method, config.sparsity)._replace(**ROWS[config.method])
    for field, name in OWN.items():
        if resolved[field] is None:
            resolved[field] = getattr(own, name)
    if resolved.rewire_end_epoch is None:
        resolved.rewire_end_epoch = float(config.epochs) if config.method == "itop" else END_EPOCH
    if resolved.method == "dense":
        resolved.sparsity = 0.0
    return resolved.lock()


def method_of(config: ConfigDict, steps_per_epoch: int) -> Method:
    """The row of Table 1 that a resolved config names, its epochs turned into steps.

    What the method never reads keeps the row's value.
    """
    ignored = unread_fields(config)
    options = {name: config[field] for field, name in FIELDS.items() if field not in ignored}
    if config.method == "itop":
        options["explored"] = True
    if ROWS[config.method].get("score") == "momentum":
        options["momentum"] = config.momentum
    options |= {"every": config.rewire_every, "end": end_of(config, steps_per_epoch)}
    return method(config.method, config.sparsity, **options)


def end_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """The step at which a resolved config's rewires end. Errors: none before it."""
    end = round(config.rewire_end_epoch * steps_per_epoch)
    if end < 1:
        raise ConfigError(
            f"rewire_end_epoch must be at least one step of an epoch's {steps_per_epoch}, "
            f"not {config.rewire_end_epoch}."
        )
    return end


def never_read(config: Mapping[str, Any]) -> set[str]:
    """Fields that a run of this resolved config's model and method never reads."""
    fields = never_reads(config["model"])
    if "drop" not in ROWS[config["method"]]:
        fields |= {"rewire_every", "rewire_end_epoch"}
    if config["method"] == "dense":
        fields.add("sparsity")
    return fields | unread_fields(config)


def unread_fields(config: Mapping[str, Any]) -> set[str]:
    """Fields of a resolved config that its method never reads, the schedule aside."""
    name = config["method"]
    row = Method(name, 0.0)._replace(**ROWS[name])
    ignored = unread(row._replace(initial=config.get("initial_sparsity", row.initial)))
    fields = {field for field, name in FIELDS.items() if name in ignored}
    if row.before not in ("snip", "grasp", "grasp_abs"):
        fields.add("score_batches")
    if row.name != "lottery":
        fields.add("lottery_levels")
    return fields


def told_unread(config: ConfigDict) -> str | None:
    """A sentence on what a resolved config sets and its method never reads; None if nothing.

    Said once and not refused: a sweep gives the same flags to many methods.
    """
    usual = default()
    usual.method = config.method
    usual = resolve(usual)
    fields = [field for field in sorted(unread_fields(config)) if config[field] != usual[field]]
    subject = f"Method {config.method!r}"
    if config.execution == "masked" and not config.fuse:
        fields, subject = [*fields, "fuse"], f"{subject} in masked execution"
    if not fields:
        return None
    listed = ", ".join(f"{field}={config[field]!r}" for field in fields)
    return f"{subject} does not read {listed}, which changes nothing."


def check_config(config: ConfigDict) -> None:
    """What `config.validate` cannot see field by field. Errors: as `method` and `check_execution`,
    a ramp that the run ends before, Lottery's levels that do not begin with every connection."""
    images = DATASETS[config.dataset].train_images - config.validation_size
    config, per_epoch = resolve(config), images // config.batch_size
    if (config.initial_sparsity or 0.0) > config.sparsity:
        raise ConfigError(
            f"initial_sparsity must be at most {config.sparsity}, the sparsity to reach, "
            f"not {config.initial_sparsity}."
        )
    made = method_of(config, per_epoch)
    check_execution(made, config.execution)
    if made.ramps and made.end >= config.epochs * per_epoch:
        raise ConfigError(
            f"rewire_end_epoch must be below epochs, {config.epochs}, for method {made.name!r} "
            f"from sparsity {made.first_sparsity}, which reaches {made.sparsity} then, "
            f"not {config.rewire_end_epoch}."
        )
    if made.name == "lottery" and made.sparsity and config.lottery_levels[:1] != (0.0,):
        raise ConfigError(
            "lottery_levels must begin with 0.0, as its first training is that of every "
            f"connection, not {config.lottery_levels!r}."
        )
