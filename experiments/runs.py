"""A run of an experiment: its config, the folder that its config and seed name, what became of it.

A folder is named DATASET-MODEL-METHOD-HASH-seedSEED. HASH is that of the fields that differ from
the defaults, without those that the method and the model ignore and without those that change
nothing that is computed, so one config is one folder however it was asked for.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dst.config import OPERATIONAL, check_field, default, load, validate
from dst.data import DATASETS
from dst.data.pipeline import steps_per_epoch
from dst.errors import ConfigError
from dst.methods.lottery import levels
from dst.methods.settings import never_read, resolve
from dst.models import MODELS
from dst.training.log import read

BEFORE_IT = {"init_gain": 2.0}  # what runs had before there was a field, if not its default
ROOT = Path(__file__).parents[1]
# Measured on CPU, a user's model aside; only for progress and ETA.
STEP_COST = {"vgg": 1.0, "resnet": 7.0, "mlp": 0.1}


class Run(NamedTuple):
    """A config file, what is overridden in it, and the seed."""

    base: str  # "configs/cifar100_vgg16.py"
    overrides: tuple[tuple[str, Any], ...]
    seed: int

    @functools.cache  # noqa: B019, a sweep's runs live as long as the process
    def config(self) -> ConfigDict:
        """The whole config, every value known. Raises: ConfigError."""
        config = load(str(ROOT / self.base))
        for field, value in (*self.overrides, ("seed", self.seed)):
            check_field(field, value)
            config[field] = value
        validate(config)
        return resolve(config)

    @property
    @functools.cache  # noqa: B019, asked for at every look at a sweep's progress
    def folder(self) -> str:
        """The name of its folder."""
        return folder_of(self.config())

    def command(self, out: Path) -> list[str]:
        """What runs it, or resumes it, from the project's folder."""
        fields = (*self.overrides, ("seed", self.seed))
        flags = [flag(field, value) for field, value in fields]
        workdir = f"--workdir={out / self.folder}"
        return [sys.executable, "-m", "dst.main", f"--config={self.base}", *flags, workdir]

    def shown(self, out: Path) -> str:
        """The command to copy into a shell."""
        return shlex.join(["python", *self.command(out)[1:]])


class Finished(NamedTuple):
    """A run that is over, as its log tells."""

    run: Run
    config: dict[str, Any]  # with every value that was used
    end: dict[str, Any]  # the last line
    events: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Top-1 test accuracy after the last step, in %."""
        return 100 * self.end["test_accuracy"]

    @property
    def possible(self) -> int:
        """|W|, of all layers."""
        return sum(self.end["possible"].values())

    @property
    def active(self) -> int:
        """|A| at the end, of all layers."""
        return sum(self.end["active"].values())


# ---------------------------------------------------------------------------------- hash and folder
def folder_of(config: ConfigDict) -> str:
    """The name of the folder of a resolved config."""
    text = json.dumps(identity(config), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{config.dataset}-{config.model}-{config.method}-{name}-seed{config.seed}"


def identity(config: ConfigDict) -> dict[str, Any]:
    """The fields that make a run what it is, seed excluded: those that differ from the defaults."""
    return {**differing(config, default()), "method": config.method}


def differing(config: ConfigDict, base: ConfigDict) -> dict[str, Any]:
    """Fields that count, seed excluded, and that `base` with the same method has not."""
    base = base.copy_and_resolve_references()
    base.method = config.method
    usual = resolve(base)
    ignored = {"seed", "method", *OPERATIONAL, *never_read(config)}
    fields = {f: (_plain(v), _plain(usual[f])) for f, v in config.items() if f not in ignored}
    return {f: value for f, (value, usually) in fields.items() if value != usually}


def _plain(value: Any) -> Any:
    """1 and 1.0 are the same number, a list the same as a tuple."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def flag(field: str, value: Any) -> str:
    """A field and its value as the command line wants them."""
    text = value if isinstance(value, str) else repr(value).replace(" ", "")
    return f"--config.{field}={text}"


def override(argument: str) -> tuple[str, Any]:
    """`--config.FIELD=VALUE` as a field and its value. Raises: ConfigError."""
    name, equals, text = argument.partition("=")
    if not (name.startswith("--config.") and equals):
        raise ConfigError(
            f"There must be nothing but the options of --help and --config.FIELD=VALUE, "
            f"not {argument!r}."
        )
    field = name.removeprefix("--config.")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    check_field(field, value)
    return field, value


# -------------------------------------------------------------------------------- what became of it
def finished(run: Run, out: Path) -> Finished | None:
    """The run in `out` if it is over, else None. Raises: ConfigError if the log is another's."""
    path = out / run.folder / "metrics.jsonl"
    if not path.exists():
        return None
    header, events = read(path)
    if not events or events[-1]["event"] != "end":
        return None
    if (found := folder_of(logged(header))) != run.folder:
        raise ConfigError(f"{path} must be the log of {run.folder}, not of {found}.")
    return Finished(run, header["config"], events[-1], events)


def _filled(fields: Mapping[str, Any]) -> ConfigDict:
    """The paper's config with these fields; lists, as in a log, stand for tuples."""
    config = default()
    for field, value in fields.items():
        config[field] = tuple(value) if isinstance(value, list) else value
    return config


def configured(**fields: Any) -> ConfigDict:
    """The paper's config with these fields, which are a user's. Raises: ConfigError."""
    config = _filled(fields)
    validate(config)
    return resolve(config)


def logged(header: Mapping[str, Any]) -> ConfigDict:
    """The config of a log's first line; fields that are newer than it have what it ran with.

    It was valid when it was run; since then it is resolved, and a method's "" is no user's value.
    """
    return resolve(_filled({**BEFORE_IT, **header["config"]}))


def trainings(config: ConfigDict) -> tuple[float, ...]:
    """The sparsity of each training of a run: Lottery's rounds, else the only one."""
    if config.method == "lottery":
        return levels(config.sparsity, config.lottery_levels)
    return (config.sparsity,)


def training_steps(config: ConfigDict) -> int:
    """Update steps of one training."""
    images = DATASETS[config.dataset].train_images - config.validation_size
    return config.epochs * steps_per_epoch(images, config.batch_size)


def total_steps(run: Run) -> int:
    """Update steps of the run, all rounds of Lottery together."""
    return len(trainings(run.config())) * training_steps(run.config())


def work(run: Run) -> float:
    """How much there is to compute, in steps of VGG-16: weighs the runs of a sweep."""
    config = run.config()
    width = config.width if "width" in MODELS[config.model].reads else 1.0
    return total_steps(run) * STEP_COST.get(config.model, 1.0) * width**2


def share_done(run: Run, out: Path) -> float:
    """The part of the run that its logs tell of, from 0 to 1."""
    folder = out / run.folder
    logs = [folder / "metrics.jsonl", *folder.glob("rounds/*/metrics.jsonl")]
    told = [read(log)[1] for log in logs if log.exists() and log.stat().st_size]
    steps = sum(max((event["step"] for event in events), default=0) for events in told)
    return min(1.0, steps / total_steps(run))
