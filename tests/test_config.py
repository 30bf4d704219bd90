"""Every mistake in a config gets one sentence; every file of configs/ is valid."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dst import config as config_lib
from dst.errors import ConfigError
from dst.methods.settings import OWN, resolve
from experiments.paper import setting_of

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.py"))


def changed(**fields) -> ConfigDict:
    """The default, with values that a ConfigDict itself might refuse."""
    return ConfigDict({**config_lib.default().to_dict(), **fields})


BAD = {
    "dataset": ["mnist", "", None],
    "data_dir": [3, None],
    "validation_size": [-1, 1.5, True],
    "model": ["resnet56"],
    "depth": [57, 2, 56.0, -4],
    "width": [0, -1.0, 0.05, math.nan, math.inf, True, "1"],
    "hidden": [(), (0,), (1.5,), (True,), 1024, ("a",), [64]],
    "precision": ["float16"],
    "fuse": [1],
    "method": ["RigL", "", None],
    "execution": ["dense", "Sparse", None],
    "heuristic": ["nope", 3],
    "sparsity": [1.2, 1.0, -0.1, math.nan, math.inf, "0.9", False, None],
    "initial_sparsity": [1.0, -0.1, math.nan, "0.5"],
    "distribution": ["ERK", 1],
    "sparsity_of": [("head",), (("head", 1.0),), (("head", True),), ((3, 0.5),), None],
    "keep_counts": [1, None],
    "init": ["zeros", None],
    "init_gain": [0, -1.0, math.inf, None],
    "growth_memory": ["Streamed", "", None],
    "track_explored": [1, None],
    "grasp_temperature": [0, -1.0, math.inf],
    "synflow_rounds": [0, 1.5, True],
    "score_batches": [-1, 1.0, None],
    "lottery_levels": [(0.5, 0.5), (0.9, 0.5), (1.0,), ("a",), 0.5, [0.0, 0.5]],
    "drop_fraction": [-0.1, 1.1, math.nan],
    "layer_floor": [-0.1, 1.0, math.nan, True],
    "dense_layers": ["head", ["head"], (1,)],
    "rewire_every": [0, 1e3],
    "rewire_end_epoch": [0, -1, math.nan],
    "subset_ratio": [0.9, math.nan, math.inf],
    "sampling_rounds": [0, True],
    "epochs": [0, 1.0, True, math.nan],
    "batch_size": [0, 128.0, 50_001],
    "learning_rate": [0.0, -1.0, math.nan, math.inf],
    "lr_drop_epochs": [(80, 80), (120, 80), (0, 3), ("1",), 80, (True, 2)],
    "lr_drop_factor": [0.0, 1.5, math.nan],
    "momentum": [1.0, -0.1, math.nan],
    "weight_decay": [-1e-4, math.nan],
    "l1": [-1e-4, math.nan, None],
    "patience": [-1, 0.5],
    "seed": [-1, 0.0, 2**32, True],
    "eval_every": [0],
    "eval_batch_size": [0],
    "checkpoint_every": [0],
    "checkpoints_kept": [1],
    "devices": [-1, 1.0],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_told_in_one_sentence(field, value):
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(changed(**{field: value}))
    sentence = str(caught.value)
    assert sentence.startswith(f"{field} must be ")
    assert str(value) in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_every_field_has_bad_values_and_a_comment():
    assert set(BAD) == set(config_lib.default())
    source = Path(config_lib.__file__).read_text()
    for field in BAD:
        assert re.search(rf"^    config\.{field} = .*  # \S", source, re.MULTILINE), field


GOOD = [
    {},
    {"sparsity": 0.0},
    {"sparsity": 0},
    {"epochs": 1, "rewire_end_epoch": 120},
    {"lr_drop_epochs": ()},
    {"hidden": (5,), "model": "mlp", "dataset": "digits"},
    {"depth": 8},
    {"layer_floor": 0},
    {"layer_floor": 0.99},
    *({"execution": "sparse", "method": n} for n in ("dense", "random", "set", "gse", "gse_v2")),
    *({"execution": "masked", "method": name} for name in config_lib.METHODS),
    {"execution": "sparse", "method": "rigl", "growth_memory": "streamed"},
    {"method": "pruning", "rewire_end_epoch": 1.5, "epochs": 2},
    {"lottery_levels": ()},
    {"lottery_levels": (0, 0.5), "method": "lottery"},
    {"initial_sparsity": 0.98, "execution": "sparse"},
    {"initial_sparsity": 0.5, "rewire_end_epoch": 199.0},
    {"initial_sparsity": 0.5, "method": "itop", "rewire_end_epoch": 199.0},
    # Said in the log, see test_methods.
    {"method": "set", "heuristic": "grabo", "growth_memory": "streamed"},
    *({field: None} for field in OWN),
    {"seed": 2**32 - 1},
    {"batch_size": 40_000, "validation_size": 10_000},
]


@pytest.mark.parametrize("fields", GOOD)
def test_good_values_pass(fields):
    config_lib.validate(changed(**fields))


def test_mistakes_that_need_two_fields():
    with pytest.raises(ConfigError, match=r"batch_size must be at most 127, .* not 128\."):
        config_lib.validate(changed(validation_size=49_873))
    with pytest.raises(ConfigError, match=r"model 'vgg' .* dataset 'digits'"):
        config_lib.validate(changed(model="vgg", dataset="digits"))
    with pytest.raises(ConfigError, match=r"^initial_sparsity must be at most 0\.5, .* not 0\.9\."):
        config_lib.validate(changed(sparsity=0.5, initial_sparsity=0.9))
    with pytest.raises(
        ConfigError, match=r"^initial_sparsity must be None for method 'dsr', not 0\.9\."
    ):
        config_lib.validate(changed(method="dsr", initial_sparsity=0.9))
    with pytest.raises(ConfigError, match=r"^rewire_end_epoch must be at least one step .* 390"):
        config_lib.validate(changed(rewire_end_epoch=0.001))
    for levels in ((), (0.5, 0.9)):
        with pytest.raises(ConfigError, match=r"^lottery_levels must begin with 0\.0, .*, not \("):
            config_lib.validate(changed(method="lottery", lottery_levels=levels))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "pruning"},
        {"method": "granet"},
        {"initial_sparsity": 0.5},
        {"method": "rigl", "initial_sparsity": 0.0},
        {"method": "itop", "initial_sparsity": 0.5},  # explores to the last epoch
        {"method": "set", "initial_sparsity": 0.5, "rewire_end_epoch": 119.9999},
    ],
    ids=str,
)
def test_a_ramp_that_ends_after_the_run_is_refused(fields):
    """By what the method does: from which sparsity to which; at its last step it would not be."""
    with pytest.raises(ConfigError, match=r"^rewire_end_epoch must be below epochs, 120, .* from "):
        config_lib.validate(changed(epochs=120, **fields))
    if fields.get("method") != "itop":
        config_lib.validate(changed(epochs=121, **fields))
    config_lib.validate(changed(epochs=120, **{**fields, "initial_sparsity": 0.98}))


def test_a_method_that_an_execution_does_not_run_is_refused():
    """Options too, whose method alone would pass; test_every_method has every row."""
    for fields in (
        {"method": "rigl"},
        {"initial_sparsity": 0.5},
        {"track_explored": True},
        {"method": "granet", "growth_memory": "streamed"},
    ):
        sentence = rf"^method '{fields.get('method', 'gse')}' cannot run in execution 'sparse', "
        with pytest.raises(ConfigError, match=sentence) as caught:
            config_lib.validate(changed(execution="sparse", **fields))
        assert str(caught.value).endswith("execution 'masked'.")


def test_unknown_and_missing_fields():
    with pytest.raises(ConfigError, match='no field "sparsty"; did you mean "sparsity"'):
        config_lib.validate(changed(sparsty=0.5))
    partial = changed()
    del partial.momentum
    with pytest.raises(ConfigError, match='"momentum" is missing'):
        config_lib.validate(partial)


def test_devices():
    assert config_lib.check_devices(changed(), 4) == 4
    assert config_lib.check_devices(changed(devices=2, batch_size=6), 4) == 2
    with pytest.raises(ConfigError, match=r"devices must be at most 4, .* not 8\."):
        config_lib.check_devices(changed(devices=8), 4)
    with pytest.raises(ConfigError, match=r"batch_size must be divisible by .* 4, not 126 "):
        config_lib.check_devices(changed(batch_size=126), 4)
    assert config_lib.check_devices(changed(devices=3, batch_size=12), 4, processes=2) == 3
    with pytest.raises(ConfigError, match=r"at most 4, all that each of 2 processes has, not 8\."):
        config_lib.check_devices(changed(devices=8), 4, processes=2)
    with pytest.raises(ConfigError, match=r"devices, 8 in 2 processes, not 12 .* of each process"):
        config_lib.check_devices(changed(batch_size=12), 4, processes=2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_files_are_valid_and_say_their_command(path):
    config = config_lib.load(str(path))
    config_lib.validate(config)
    # The paper lets the cosine end at the second drop of the learning rate.
    config = resolve(config)
    assert config.rewire_end_epoch == config.lr_drop_epochs[1] < config.epochs
    text = path.read_text()
    assert f"python -m dst.main --config=configs/{path.name}" in text
    assert text.count("Expected") >= 1 and "ime: " in text
    if config.model != "mlp":  # of which the paper has none
        _, model = setting_of(config.dataset, config.model)
        assert path.stem.startswith(f"{config.dataset}_{model}")
        left_open = {"init_gain": 1 / 3} if model == "vgg" else {}
        own = {"dataset": config.dataset, "model": config.model, **left_open}
        assert config.to_dict() == {**resolve(config_lib.default()).to_dict(), **own}


def test_the_papers_files_exist():
    assert {path.stem for path in CONFIGS} >= {
        "digits_mlp",
        "cifar10_resnet56",
        "cifar10_vgg16",
        "cifar100_resnet56",
        "cifar100_vgg16",
    }


def test_the_defaults_are_the_papers():
    config = resolve(config_lib.default())
    assert (config.epochs, config.batch_size, config.learning_rate) == (200, 128, 0.1)
    assert (config.lr_drop_epochs, config.lr_drop_factor) == ((80, 120), 0.1)
    assert (config.momentum, config.weight_decay, config.patience) == (0.9, 1e-4, 50)
    assert (config.drop_fraction, config.rewire_every, config.subset_ratio) == (0.2, 1000, 10.0)
    assert (config.layer_floor, config.execution) == (0.0, "masked")
    assert (config.method, config.heuristic, config.distribution) == ("gse", "grabo", "uniform")
