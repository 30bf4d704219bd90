"""The numbers of the paper, for the tables that stand beside ours: top-1 test accuracy in %."""

from __future__ import annotations

SPARSITIES = (0.9, 0.95, 0.98)
SETTINGS = (("cifar10", "resnet"), ("cifar10", "vgg"), ("cifar100", "resnet"), ("cifar100", "vgg"))

# Networks of ours that stand beside one of the paper's.
VARIANTS = {"vgg_dropout": "vgg"}

# Table 1: per method ResNet-56 and VGG-16 on CIFAR-10, then on CIFAR-100, at 90, 95 and 98 %.
_TABLE1 = {
    "lottery": "89.18 87.90 84.40 87.82 86.12 82.42 61.58 57.44 48.82 53.67 48.10 38.36",
    "pruning": "90.20 89.09 86.71 88.52 87.70 86.20 66.62 63.77 57.13 57.89 55.20 45.93",
    "random": "88.85 86.88 73.98 83.11 77.59 58.95 60.68 51.64 31.43 46.83 37.39 21.29",
    "snip": "89.89 88.29 84.67 87.15 84.19 72.78 62.15 56.33 43.48 52.80 45.85 16.09",
    "grasp": "87.48 86.58 81.88 85.97 84.58 80.24 58.13 52.78 37.83 51.56 46.45 35.19",
    "grasp_abs": "89.19 87.51 82.04 85.89 82.10 34.73 42.60 22.38 11.74 52.04 44.25 01.00",
    "synflow": "89.70 88.42 85.14 87.72 85.78 80.03 61.79 54.06 35.27 53.04 47.25 35.02",
    "set": "89.89 88.29 84.67 86.10 83.34 73.12 63.90 58.04 45.91 52.77 44.82 29.82",
    "rigl": "90.55 89.29 85.62 88.33 86.24 81.09 64.91 59.88 49.00 54.82 49.01 37.16",
    "gse": "90.56 89.29 86.08 87.80 86.14 80.58 64.72 60.05 49.14 54.76 48.68 37.17",
}
_DENSE = (91.87, 89.31, 68.80, 62.50)

# Table 2, CIFAR-100: width -> accuracy.
WIDTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
_TABLE2 = {
    "resnet": (68.80, 71.46, 72.07, 72.56, 72.21, 72.75, 72.70),
    "vgg": (62.50, 65.86, 67.18, 67.86, 68.37, 68.32, 68.45),
}


def setting_of(dataset: str, model: str) -> tuple[str, str]:
    """(data set, model) under the paper's name, also of a network that stands beside its own."""
    return dataset, VARIANTS.get(model, model)


def table1(setting: tuple[str, str], method: str, sparsity: float) -> float | None:
    """A cell of Table 1, (data set, model); None if the paper has none."""
    setting = setting_of(*setting)
    if setting not in SETTINGS:
        return None
    column = SETTINGS.index(setting)
    if method == "dense":
        return _DENSE[column]
    if method not in _TABLE1 or sparsity not in SPARSITIES:
        return None
    return float(_TABLE1[method].split()[3 * column + SPARSITIES.index(sparsity)])


def table2(setting: tuple[str, str], width: float) -> float | None:
    """A cell of Table 2; None if the paper has none."""
    dataset, model = setting_of(*setting)
    if dataset != "cifar100" or width not in WIDTHS:
        return None
    return _TABLE2[model][WIDTHS.index(width)]
