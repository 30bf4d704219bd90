"""A data set and a model of a user's own, from the pages of their rooms, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dst.data
import dst.models
from dst import config as config_lib
from dst.data import DATASETS, Source, Splits, load
from dst.errors import ConfigError
from dst.main import main
from dst.methods.settings import resolve
from dst.models import MODELS, Architecture, build, check_logits
from dst.training.log import read
from experiments.runs import Run, training_steps
from tests.pages import code
from tests.test_train import interrupted_at, result


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What a test registers is gone after it."""
    for names in (DATASETS, MODELS):
        monkeypatch.setattr(names, "_rows", dict(names._rows))
        monkeypatch.setattr(names, "_files", dict(names._files))


def written(folder: Path, name: str, room) -> str:
    """The file of a page."""
    path = folder / name
    path.write_text(code(room))
    return str(path)


def run(path: str, workdir: Path, *fields: str) -> int:
    """`python -m dst.main` with this config."""
    return main(["dst", f"--config={path}", f"--workdir={workdir}", *fields])


# --------------------------------------------------------------------------------- trained, resumed
def test_a_data_set_of_ones_own_is_trained_logged_and_resumed(tmp_path, monkeypatch, capsys):
    """From the page; nothing of the package was changed. A run that was stopped ends the same."""
    path = written(tmp_path, "greys.py", dst.data)
    assert run(path, tmp_path / "whole") == 0
    header, events = read(tmp_path / "whole" / "metrics.jsonl")
    assert header["config"]["dataset"] == "greys"
    assert events[-1]["step"] == 50 and events[-1]["test_accuracy"] > 0.9
    config = resolve(config_lib.load(path))  # a second time: it registers what it has registered
    interrupted_at(20, config, tmp_path / "stopped", monkeypatch)
    assert read(tmp_path / "stopped" / "metrics.jsonl")[1][-1]["step"] == 20
    assert run(path, tmp_path / "stopped") == 0
    assert "Resuming" in capsys.readouterr().err
    assert result(tmp_path / "stopped", config) == result(tmp_path / "whole", config)


def test_the_experiments_take_a_config_of_ones_own(tmp_path):
    """The folder's name and the length of a run, before its data are read."""
    path = written(tmp_path, "greys.py", dst.data)
    one = Run(path, (("epochs", 7),), 3)
    assert one.folder.startswith("greys-mlp-gse-") and one.folder.endswith("-seed3")
    assert training_steps(one.config()) == 70


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_model_of_ones_own_is_trained_in_both_executions(tmp_path, execution):
    path = written(tmp_path, "convnet.py", dst.models)
    flags = ("--config.width=2", "--config.epochs=1", f"--config.execution={execution}")
    assert run(path, tmp_path / "run", *flags) == 0
    header, events = read(tmp_path / "run" / "metrics.jsonl")
    assert header["config"]["model"] == "convnet" and header["config"]["width"] == 2
    assert events[-1]["possible"] == {"Conv_0": 9 * 16, "Dense_0": 16 * 16 * 10}
    assert [e["step"] for e in events if e["event"] == "rewire"] == [10]


def test_what_the_model_does_not_read_is_not_the_runs(tmp_path):
    """Of `depth`, `width` and `hidden` its row lists one, and the folder is that of this one."""
    path = written(tmp_path, "convnet.py", dst.models)
    folder = Run(path, (), 0).folder
    assert Run(path, (("depth", 8), ("hidden", (3,))), 0).folder == folder
    assert Run(path, (("width", 2.0),), 0).folder != folder


# ----------------------------------------------------------------------------------------- mistakes
IMAGES, LABELS = np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 2
GOOD = Splits(IMAGES, LABELS, IMAGES[:2], LABELS[:2], mean=(0.5,), std=(0.5,))
WRONG = {
    "floats": ({"train_images": IMAGES / 255}, r"^train_images .* uint8 .*, not float64 of shape"),
    "flat": ({"test_images": IMAGES[:2, 0]}, r"of shape \(2, 4, 4, 1\), not uint8 of .*2, 4, 1\)"),
    "too few": (
        {"train_images": IMAGES[:7], "train_labels": LABELS[:7]},
        r"^train_images of dataset 'own' must be uint8 of shape \(8, .*, not uint8 of shape \(7",
    ),
    "none": ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, r"^test_images .* \(1, 4"),
    "no array": ({"train_labels": LABELS.tolist()}, r"^train_labels .* \(8,\), not a list\.$"),
    "one hot": ({"train_labels": np.eye(2)[LABELS]}, r"^train_labels .*, not float64 of shape"),
    "from 1": ({"train_labels": LABELS + 1}, r"^train_labels .* from 0 to 1, not 1 to 2\.$"),
    "colours": ({"mean": (0.1, 0.2, 0.3)}, r"^mean .* a tuple of 1 numbers, .*, not \(0\.1"),
    "one of two": ({"mean": None}, r"^mean of dataset 'own' must be a tuple .*, not None\.$"),
    "no spread": ({"mean": None, "std": None}, r"^std of dataset 'own' .* > 0, .*, not \(0\.0,\)"),
    "augment": ({"augment": ("mixup",)}, r"^augment .* 'flip', 'crop' or 'rotate', not \('mixup'"),
}


def register(read, **row):
    """A data set named 'own'."""
    DATASETS.register("own", Source(**{**dict(train_images=8, image=(4, 4, 1)), **row}, read=read))


def sentence(error) -> str:
    """What the user reads: one line."""
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_a_reader_that_returns_something_else(case):
    fields, message = WRONG[case]
    register(lambda data_dir: GOOD, num_classes=2)
    np.testing.assert_array_equal(load("own").train_labels, LABELS)
    register(lambda data_dir: GOOD._replace(**fields), num_classes=2)
    with pytest.raises(ConfigError, match=message) as error:
        load("own")
    assert "dataset 'own'" in sentence(error)


def test_a_reader_that_fails(tmp_path):
    """Data that are not there are told in a sentence; its own mistakes are its own."""
    register(lambda data_dir: np.load(Path(data_dir) / "none.npz"), num_classes=2)
    with pytest.raises(ConfigError, match=r"^dataset 'own' cannot be read: FileNotFoundError: "):
        load("own", str(tmp_path))
    register(lambda data_dir: (IMAGES, LABELS), num_classes=2)
    with pytest.raises(ConfigError, match=r"'own' must be read as dst\.data\.Splits, not a tuple"):
        load("own")
    register(lambda data_dir: 1 / 0, num_classes=2)
    with pytest.raises(ZeroDivisionError):
        load("own")


def test_statistics_are_those_of_the_training_images():
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    splits = GOOD._replace(train_images=images, test_images=images[:2], mean=None, std=None)
    register(lambda data_dir: splits, num_classes=2, image=(4, 4, 3))
    loaded, scaled = load("own"), images / 255
    np.testing.assert_allclose(loaded.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, scaled.std((0, 1, 2)), rtol=1e-12)
    assert loaded.train_labels.dtype == np.int32


def test_a_class_with_one_image_cannot_be_split():
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    register(lambda data_dir: GOOD._replace(train_labels=labels), num_classes=2)
    with pytest.raises(ConfigError, match=r"^validation_size cannot be 2: .* only 1 member"):
        load("own", validation_size=2)


@pytest.mark.parametrize(
    ("names", "name", "row", "message"),
    [
        (DATASETS, "digits", None, r"^dataset 'digits' exists already, in dst itself; choose "),
        (
            MODELS,
            "vgg",
            None,
            r"^model 'vgg' exists already, in dst itself; choose another name\.$",
        ),
        (DATASETS, "a-b", None, r"^the name of a dataset must be letters, .*, not 'a-b'\.$"),
        (MODELS, ["own"], None, r"^the name of a model must be letters, .*, not \['own'\]\.$"),
        (MODELS, 3, None, r"^the name of a model must be letters, .*, not 3\.$"),
        (
            DATASETS,
            "own",
            GOOD,
            r"^dataset 'own' must be registered with Source\(\.\.\.\), not with a Splits\.$",
        ),
        (DATASETS, "own", Source(0, (4, 4, 1), 2, print), r"^train_images .* >= 1, not 0\.$"),
        (DATASETS, "own", Source(8, (4, 5, 1), 2, print), r"^image .*H = W, not \(4, 5, 1\)\.$"),
        (DATASETS, "own", Source(8, (4, 4), 2, print), r"^image .*H = W, not \(4, 4\)\.$"),
        (DATASETS, "own", Source(8, (4, 4, 1), 1, print), r"^num_classes .* >= 2, not 1\.$"),
        (DATASETS, "own", Source(8, (4, 4, 1), 2, "x.npz"), r"^read of dataset 'own' .*'x\.npz'"),
        (MODELS, "own", nn.Dense, r"^model 'own' must be registered with Archi"),
        (MODELS, "own", Architecture(print, "width"), r"^reads .* 'hidden', not 'width'\.$"),
        (MODELS, "own", Architecture(print, ("widht",)), r"^reads of model 'own' .*'widht',\)\.$"),
        (MODELS, "own", Architecture(print, (), 0), r"^smallest .* >= 1, not 0\.$"),
    ],
)
def test_what_cannot_be_registered(names, name, row, message):
    before = dict(names)
    with pytest.raises(ConfigError, match=message) as error:
        names.register(name, row)
    sentence(error)
    assert dict(names) == before


def test_two_files_cannot_share_a_name(tmp_path, capsys):
    """The same file may be loaded again; a name that was removed is free."""
    first = written(tmp_path, "greys.py", dst.data)
    second = written(tmp_path, "others.py", dst.data)
    config_lib.load(first)
    config_lib.load(first)
    assert run(second, tmp_path / "run") == 2
    told = f"dst: {second}: dataset 'greys' exists already, in {first}; choose another name.\n"
    assert capsys.readouterr().err == told
    DATASETS.remove("greys")
    config_lib.load(second)
    with pytest.raises(KeyError):
        DATASETS.remove("digits")


def own_config(build, **row):
    """The digits, 8x8, on a model named 'own'."""
    MODELS.register("own", Architecture(build, **row))
    config = config_lib.default()
    config.dataset, config.model = "digits", "own"
    return config


def test_images_that_are_too_small_for_it():
    config = own_config(lambda config, n: nn.Dense(n), smallest=9)
    message = r"^model 'own' takes images of 9x9 or more; for the 8x8 images of dataset 'digits' "
    with pytest.raises(ConfigError, match=f"{message}it must be 'mlp' or 'resnet'") as error:
        config_lib.validate(config)
    sentence(error)


def test_a_field_that_its_row_does_not_list():
    """Two runs that differ in it would have one folder."""
    reads_width = lambda config, n: nn.Dense(round(n * config.width))  # noqa: E731
    build(own_config(reads_width, reads=("width",)), 10)
    message = r"^model 'own' reads config\.width, but its row lists only precision, depth\.$"
    with pytest.raises(ConfigError, match=message):
        build(own_config(reads_width, reads=("depth",)), 10)
    with pytest.raises(AttributeError, match="nn"):  # a mistake of its own
        build(own_config(lambda config, n: jnp.nn.Dense(n)), 10)


def test_what_it_builds(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^model 'own' must be built as a flax.*, not 10\.$"):
        build(own_config(lambda config, n: n), 10)
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)

    class PerPixel(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(10)(x))

    message = r"^model 'own' must give floating-point logits of shape \(1, 10\) for images of "
    with pytest.raises(ConfigError, match=message) as error:
        check_logits("own", PerPixel(), image, 10)
    sentence(error)
    check_logits("mlp", dst.models.MLP((3,), 10), image, 10)
    # On the command line, before the first step.
    own = tmp_path / "own.py"
    page = code(dst.models)
    own.write_text(page.replace("nn.Dense(self.num_classes,", "nn.Dense(self.num_classes + 1,"))
    assert own.read_text() != page
    assert run(str(own), tmp_path / "run") == 2
    assert "logits of shape (1, 10)" in capsys.readouterr().err
