"""How long an experiment takes: the paper's schedule, a 100th of it, or minutes on digits."""

from __future__ import annotations

from typing import Any, NamedTuple

from dst.config import load
from dst.methods.settings import resolve
from experiments.runs import ROOT, Run

BASES = {
    ("cifar10", "resnet"): "configs/cifar10_resnet56.py",
    ("cifar10", "vgg"): "configs/cifar10_vgg16.py",
    ("cifar100", "resnet"): "configs/cifar100_resnet56.py",
    ("cifar100", "vgg"): "configs/cifar100_vgg16.py",
    ("digits", "mlp"): "configs/digits_mlp.py",
}
CIFAR, DIGITS = tuple(BASES)[:4], (("digits", "mlp"),)
SMALL = 64  # units of each hidden layer at smoke scale, times the width


class Scale(NamedTuple):
    """A divisor of the schedule, and what is run if the user does not say."""

    divisor: int
    settings: tuple[tuple[str, str], ...]  # (data set, model)
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]


SCALES = {
    "paper": Scale(1, CIFAR, (0, 1, 2), (0.9, 0.95, 0.98)),
    "short": Scale(100, CIFAR, (0, 1), (0.9, 0.95, 0.98)),
    "smoke": Scale(20, DIGITS, (0, 1), (0.9,)),
}


def shortened(base: str, divisor: int) -> dict[str, Any]:
    """Epochs, learning rate drops and the rewires' period and end, all divided by `divisor`."""
    if divisor == 1:
        return {}
    config = resolve(load(str(ROOT / base)))
    return {
        "epochs": max(1, config.epochs // divisor),
        "lr_drop_epochs": tuple(epoch / divisor for epoch in config.lr_drop_epochs),
        "rewire_every": max(1, config.rewire_every // divisor),
        "rewire_end_epoch": config.rewire_end_epoch / divisor,
        "checkpoint_every": max(50, config.checkpoint_every // divisor),
    }


def run_of(
    scale: str, setting: tuple[str, str], seed: int = 0, width: float = 1.0, **fields
) -> Run:
    """The run of a cell; `fields` win over the schedule, `width` is that of every layer."""
    base = BASES[setting]
    overrides = shortened(base, SCALES[scale].divisor)
    if scale == "short":  # as the committed runs were made
        overrides |= {"model": setting[1], "init_gain": 2.0}
    if scale == "smoke":
        overrides["hidden"] = (round(SMALL * width),) * 2
    elif width != 1:
        overrides["width"] = width
    return Run(base, tuple({**overrides, **fields}.items()), seed)
