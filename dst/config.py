"""What can be set in a run, and to what: `default`, `load`, `validate`, `check_devices`.

What data sets and models there are, and what each needs, the rooms say: `dst.data`, `dst.models`.
"""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dst.connections.execution import EXECUTIONS
from dst.data.table import DATASETS
from dst.errors import (
    YES_OR_NO,
    ConfigError,
    Rule,
    check_value,
    choice,
    integer,
    is_int,
    is_number,
    near,
    number,
    one_of,
    tuple_of,
)
from dst.methods.fields import IN_CONFIG
from dst.methods.heuristics import HEURISTICS
from dst.methods.rules import RULES as OF_METHOD
from dst.methods.table import METHODS
from dst.models.table import MODELS, check_images

# They say where and how often, not what: nothing that is computed depends on them, but for the
# order of sums over the devices. A run may be resumed with other ones.
OPERATIONAL = (
    *("data_dir", "devices", "eval_every", "eval_batch_size"),
    *("checkpoint_every", "checkpoints_kept"),
)


def default() -> ConfigDict:
    """Every field with the paper's setting (section 4.1); files in `configs/` only override."""
    config = ConfigDict()

    # Data.
    config.dataset = "cifar10"  # 'digits', 'cifar10', 'cifar100' or your own: dst/data/__init__.py
    config.data_dir = ""  # TFDS folder; '' is TFDS's own default, ~/tensorflow_datasets
    config.validation_size = 0  # training images held out for early stopping; 0: training loss

    # Model.
    config.model = "resnet"  # 'mlp', 'resnet', 'vgg' or another: dst/models/table.py
    config.depth = 56  # resnet only: 6n+2 layers
    config.width = 1.0  # resnet and vgg: factor on every layer's channels
    config.hidden = (1024, 1024)  # mlp only: units of each hidden layer
    config.precision = "float32"  # of the compute: 'float32' or 'bfloat16'; the state is float32

    # Sparsity. None: the method's own value, which resolve() fills in; the paper's is named.
    config.method = "gse"  # a row of dst/methods/table.py: 'gse' is the paper's; or your own
    # 'masked': dense arrays, every method; 'sparse': memory of the connections that exist; dense,
    # random, set, gse, gse_v2 and a streamed rigl.
    config.execution = "masked"  # 'masked' or 'sparse'
    config.fuse = True  # sparse: batch norm, ReLU, additions and pooling in convolutions' kernels
    config.sparsity = 0.98  # inactive fraction of all kernels, in [0, 1); dense ignores it
    config.initial_sparsity = placeholder(float)  # None: granet's 0.5, else `sparsity`
    config.distribution = placeholder(str)  # 'uniform' (paper), 'er', 'er_unfolded' or 'erk'
    config.sparsity_of = ()  # (glob, sparsity or None) pairs: layers with their own, see dst.method
    config.keep_counts = False  # drop and grow within each layer; else over all together (paper)
    config.heuristic = placeholder(str)  # 'uniform', 'grabo' (gse's), 'synflow' or 'graest'
    config.init = "fan_in"  # of a weight: normal, by the actual fan-in; 'model': its own, scaled
    # The authors' later code has 1, for dense networks too; 2 (He's) is worse on held-out images
    # after 20 epochs, and with it the dense VGG-16 dies: experiments/results/README.md.
    config.init_gain = 1.0  # variance of a new weight x its unit's actual fan-in
    config.growth_memory = "dense"  # of rigl: 'streamed' never holds more than a block of it
    config.drop_fraction = placeholder(float)  # |P| / |A| at step 0, 0.2; annealed by a cosine
    config.dense_layers = ()  # globs of layers' paths that stay dense, such as ('Dense_1', '*/out')
    config.layer_floor = 0.0  # share of its first connections a layer always keeps; 0: the paper's
    config.rewire_every = placeholder(int)  # steps between two rewires, 1000
    config.rewire_end_epoch = placeholder(float)  # the cosine's end, 120: the second lr drop
    config.subset_ratio = placeholder(float)  # |S| / |P|, at least 1; 10
    config.sampling_rounds = placeholder(int)  # draws per rewire that fill S, 8
    config.track_explored = False  # report the share of connections that ever existed (ITOP)
    config.grasp_temperature = placeholder(float)  # 200 for grasp, 1 for grasp_abs
    config.synflow_rounds = placeholder(int)  # of pruning by SynFlow, 100; fewer keep more units
    config.score_batches = 0  # batches that snip and grasp look at; 0: the whole training set
    config.lottery_levels = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98)  # those below `sparsity` come before

    # Optimizer: SGD.
    config.epochs = 200  # passes over the training set
    config.batch_size = 128  # images a step, over all devices together
    config.learning_rate = 0.1  # before the first drop
    config.lr_drop_epochs = (80, 120)  # when the learning rate is multiplied by lr_drop_factor
    config.lr_drop_factor = 0.1  # in (0, 1]
    config.momentum = 0.9  # in [0, 1)
    config.weight_decay = 1e-4  # L2 on every parameter
    config.l1 = 0.0  # L1 on every sparse kernel: DeepR's alpha
    config.patience = 50  # stop after so many epochs without a better loss; 0: never
    config.seed = 0  # of everything random

    # The run.
    config.eval_every = 1  # epochs between two evaluations of the test set
    config.eval_batch_size = 500  # test images a step, over all devices together
    config.checkpoint_every = 1000  # steps between two checkpoints
    config.checkpoints_kept = 2  # at least 2, so that a damaged one can be skipped
    config.devices = 0  # local devices to use, in each process if there are several; 0: all
    return config.lock()


# Fields that may be None, which stands for the method's own value.
OWN_VALUE = tuple(field for field, value in default().items() if value is None)
_RULES: dict[str, Rule] = {
    "dataset": one_of(DATASETS),
    "data_dir": (lambda v: isinstance(v, str), "the path of a folder, as a string"),
    "validation_size": integer(0),
    "model": one_of(MODELS),
    "depth": (lambda v: is_int(v) and v >= 8 and v % 6 == 2, "6n+2 with n >= 1 (8, 14, ... 56)"),
    # Both networks start with 16 channels.
    "width": number(lambda v: v >= 1 / 16, ">= 0.0625, one channel in the first layer"),
    "hidden": tuple_of(
        lambda i: is_int(i) and i >= 1, bool, "a tuple of one or more integers >= 1"
    ),
    "precision": choice("float32", "bfloat16"),
    "method": one_of(METHODS),
    "execution": one_of(EXECUTIONS),
    "fuse": YES_OR_NO,
    "sparsity": OF_METHOD["sparsity"],
    "initial_sparsity": OF_METHOD["initial"],
    "distribution": OF_METHOD["distribution"],
    "sparsity_of": OF_METHOD["sparsity_of"],
    "keep_counts": OF_METHOD["keep_counts"],
    "heuristic": one_of(HEURISTICS),
    "init": choice("fan_in", "model"),
    "init_gain": OF_METHOD["gain"],
    "growth_memory": OF_METHOD["growth_memory"],
    "drop_fraction": OF_METHOD["drop_fraction"],
    "dense_layers": tuple_of(
        lambda v: isinstance(v, str), lambda v: True, "a tuple of globs such as 'encoder/*'"
    ),
    "layer_floor": OF_METHOD["floor"],
    "rewire_every": OF_METHOD["every"],
    "rewire_end_epoch": number(lambda v: v > 0, "> 0"),
    "subset_ratio": OF_METHOD["subset_ratio"],
    "sampling_rounds": OF_METHOD["rounds"],
    "track_explored": OF_METHOD["explored"],
    "grasp_temperature": OF_METHOD["temperature"],
    "synflow_rounds": OF_METHOD["iterations"],
    "score_batches": integer(0),
    "lottery_levels": tuple_of(
        lambda v: is_number(v) and 0 <= v < 1,
        lambda v: all(a < b for a, b in pairwise(v)),
        "a tuple of increasing numbers in [0, 1)",
    ),
    "epochs": integer(1),
    "batch_size": integer(1),
    "learning_rate": number(lambda v: v > 0, "> 0"),
    "lr_drop_epochs": tuple_of(
        lambda i: is_number(i) and i > 0,
        lambda v: all(a < b for a, b in pairwise(v)),
        "a tuple of increasing numbers > 0",
    ),
    "lr_drop_factor": number(lambda v: 0 < v <= 1, "in (0, 1]"),
    "momentum": OF_METHOD["momentum"],
    "weight_decay": number(lambda v: v >= 0, ">= 0"),
    "l1": number(lambda v: v >= 0, ">= 0"),
    "patience": integer(0),
    "seed": integer(0, 2**32 - 1),
    "eval_every": integer(1),
    "eval_batch_size": integer(1),
    "checkpoint_every": integer(1),
    "checkpoints_kept": integer(2),
    "devices": integer(0),
}


def load(path: str | None) -> ConfigDict:
    """The valid config that the Python file's `get_config()` returns, or `ConfigError`."""
    if not path or not Path(path).is_file():
        found = f"there is no file {path!r}" if path else "it is missing"
        raise ConfigError(f"--config must name a file such as configs/digits_mlp.py; {found}.")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config() if callable(get_config) else None
    except ConfigError as error:  # of a name that it registers
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # a file can go wrong in any way; the last line says how
        inner: Any = error
        if error.args and isinstance(error.args[0], KeyError):
            inner = error.args[0].args[0]  # ConfigDict's own sentence, which str(error) would quote
        lines = str(inner).strip().splitlines() or [""]
        raise ConfigError(f"{path}: {type(error).__name__}: {lines[-1]}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path} must have a get_config() that returns a dst.config.default().")
    validate(config)
    return config


def check_name(field: str) -> None:
    """`ConfigError` if there is no such field."""
    if field not in _RULES:
        hint = near(field, _RULES, IN_CONFIG) or "; dst/config.py lists them all."
        raise ConfigError(f'The config has no field "{field}"{hint}')


def check_field(field: str, value: Any) -> None:
    """`ConfigError` if there is no such field or if it cannot have this value."""
    check_name(field)
    if value is not None or field not in OWN_VALUE:
        check_value(field, value, _RULES[field])


def validate(config: ConfigDict) -> None:
    """Returns, or raises `ConfigError` with one sentence: field, value and what is allowed."""
    for field in config:
        check_name(field)
    for field in _RULES:
        if field not in config:
            raise ConfigError(f'The field "{field}" is missing; start from dst.config.default().')
        check_field(field, config[field])
    source = DATASETS[config.dataset]
    left = source.train_images - config.validation_size
    if config.batch_size > left:
        raise ConfigError(
            f"batch_size must be at most {max(left, 0)}, the training images of {config.dataset!r} "
            f"less validation_size {config.validation_size}, not {config.batch_size}."
        )
    check_images(config.model, source.image[0], config.dataset)
    from dst.methods.settings import check_config  # which imports this module

    check_config(config)


def check_devices(config: ConfigDict, available: int, processes: int = 1) -> int:
    """How many of its `available` devices a process uses. Raises: too few; batch not divisible."""
    count = config.devices or available
    if count > available:
        each = "all there are" if processes == 1 else f"all that each of {processes} processes has"
        raise ConfigError(f"devices must be at most {available}, {each}, not {count}.")
    if config.batch_size % (count * processes):
        total = f"{count * processes}" + (f" in {processes} processes" if processes > 1 else "")
        raise ConfigError(
            f"batch_size must be divisible by the number of devices, {total}, "
            f"not {config.batch_size} (--config.devices=1 uses one"
            f"{' of each process' if processes > 1 else ''})."
        )
    return count
