"""CIFAR through TFDS without TensorFlow: prepared from a tiny archive, read back exactly."""

import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, resource

from dst.data import DATASETS, cifar, load
from dst.errors import ConfigError

TRAIN, TEST = 60, 20


# ---- A tiny CIFAR in its own binary layout, as TFDS would have downloaded it -------------------


def _synthetic(name):
    """(images, label, coarse label) of TRAIN + TEST random examples; 10 classes occur."""
    rng = np.random.default_rng(len(name))
    images = rng.integers(0, 256, (TRAIN + TEST, 32, 32, 3), np.uint8)
    label = np.tile(np.arange(10), (TRAIN + TEST) // 10).astype(np.uint8)
    return images, rng.permutation(label[:TRAIN]).tolist() + label[TRAIN:].tolist(), label // 2


def _archive(name, path):
    """Write the data set as the .tar.gz that its authors publish."""
    images, labels, coarse = _synthetic(name)
    first = [labels] if name == "cifar10" else [coarse, labels]
    rows = np.concatenate(
        [
            np.stack(first, 1).astype(np.uint8),
            images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        ],
        axis=1,
    )
    if name == "cifar10":
        prefix, parts = "cifar-10-batches-bin", np.split(rows[:TRAIN], 5)
        files = {f"data_batch_{i + 1}.bin": part.tobytes() for i, part in enumerate(parts)}
        files["test_batch.bin"] = rows[TRAIN:].tobytes()
        names = {"batches.meta.txt": 10}
    else:
        prefix, files = "cifar-100-binary", {"train.bin": rows[:TRAIN].tobytes()}
        files["test.bin"] = rows[TRAIN:].tobytes()
        names = {"fine_label_names.txt": 100, "coarse_label_names.txt": 20}
    files |= {f: "".join(f"c{i}\n" for i in range(n)).encode() for f, n in names.items()}
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{prefix}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Their rows say how many images there are here."""
    rows = {name: DATASETS[name]._replace(train_images=TRAIN) for name in ("cifar10", "cifar100")}
    monkeypatch.setattr(DATASETS, "_rows", {**DATASETS, **rows})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with both data sets, prepared by the real code from a filled download cache."""
    root = tmp_path_factory.mktemp("tfds")
    for name, stem in (("cifar10", "cifar-10"), ("cifar100", "cifar-100")):
        url = f"https://www.cs.toronto.edu/~kriz/{stem}-binary.tar.gz"
        cache = root / "downloads" / name
        cache.mkdir(parents=True)
        file = resource.get_dl_fname(url, checksums.get_all_url_infos()[url].checksum)
        _archive(name, cache / file)
        info = {"original_fname": f"{stem}-binary.tar.gz", "urls": [url], "dataset_names": [name]}
        (cache / f"{file}.INFO").write_text(json.dumps(info))
        assert cifar.main([name, f"--data_dir={root}"]) == 0
    return root


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_round_trip_is_exact_and_in_the_original_order(name, prepared):
    images, labels, _ = _synthetic(name)
    loaded = load(name, str(prepared))
    np.testing.assert_array_equal(loaded.train_images, images[:TRAIN])
    np.testing.assert_array_equal(loaded.test_images, images[TRAIN:])
    np.testing.assert_array_equal(loaded.train_labels, labels[:TRAIN])
    np.testing.assert_array_equal(loaded.test_labels, labels[TRAIN:])
    assert loaded.train_images.dtype == np.uint8 and loaded.train_labels.dtype == np.int32
    assert len(loaded.validation_images) == len(loaded.validation_labels) == 0
    assert loaded.num_classes == (10 if name == "cifar10" else 100)
    assert loaded.augment == (("flip", "crop") if name == "cifar10" else ("crop", "flip", "rotate"))


def test_prepared_data_set_is_tfds_own_and_needs_no_tensorflow(prepared):
    builder = tfds.builder("cifar100", data_dir=prepared)
    assert type(builder).__module__.startswith("tensorflow_datasets.")
    assert builder.is_prepared() and str(builder.version) == "3.0.2"
    assert builder.info.features["label"].names == [f"c{i}" for i in range(100)]
    examples = list(builder.as_data_source("train"))
    images, labels, coarse = _synthetic("cifar100")
    where = [int(example["id"].decode().removeprefix("train_")) for example in examples]
    assert sorted(where) == list(range(TRAIN)) != where  # TFDS shuffles; `load` has to undo it
    for i, example in zip(where, examples, strict=True):
        np.testing.assert_array_equal(example["image"], images[i])
        assert (example["label"], example["coarse_label"]) == (labels[i], coarse[i])
    assert "tensorflow" not in sys.modules


def test_tfds_is_imported_when_it_is_needed():
    """It takes seconds, as scikit-learn does, and no digits need it."""
    code = "import dst.data, sys; print({'tensorflow_datasets', 'sklearn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_missing_data_set_is_one_sentence_with_the_command(tmp_path):
    with pytest.raises(ConfigError) as error:
        load("cifar100", str(tmp_path))
    assert str(error.value).endswith(f"python -m dst.data.cifar cifar100 --data_dir={tmp_path}")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_tfrecord_format_is_one_sentence(prepared, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(prepared / "cifar10" / "3.0.2", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in folder.glob("*array_record*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(
        ConfigError, match=r"array_record.*python -m dst\.data\.cifar cifar10"
    ) as error:
        load("cifar10", str(tmp_path))
    assert "\n" not in str(error.value)


def test_validation_part_is_stratified_fixed_and_taken_off_the_training_set(prepared):
    whole, split = (load("cifar10", str(prepared), size) for size in (0, 20))
    assert np.bincount(split.validation_labels).tolist() == [2] * 10
    assert np.bincount(split.train_labels).tolist() == [4] * 10
    place = {x.tobytes(): i for i, x in enumerate(whole.train_images)}
    train = [place[x.tobytes()] for x in split.train_images]
    held_out = [place[x.tobytes()] for x in split.validation_images]
    assert sorted(train + held_out) == list(range(TRAIN))
    np.testing.assert_array_equal(split.train_labels, whole.train_labels[train])
    np.testing.assert_array_equal(split.validation_labels, whole.train_labels[held_out])
    np.testing.assert_array_equal(split.test_images, whole.test_images)
    again = load("cifar10", str(prepared), 20)
    np.testing.assert_array_equal(split.validation_images, again.validation_images)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path):
    """A local web site that holds the CIFAR-100 archive; its address."""
    (tmp_path / "site").mkdir()
    _archive("cifar100", tmp_path / "site" / "here.tar.gz")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("file", "checksum", "reason"),
    [("gone.tar.gz", None, "HTTP code: 404"), ("here.tar.gz", "0" * 64, "wrong checksum")],
)
def test_failed_download_is_one_sentence(
    file, checksum, reason, site, tmp_path, monkeypatch, capsys
):
    url = f"{site}/{file}"
    original = cifar.Cifar100._cifar_info.fget
    monkeypatch.setattr(
        cifar.Cifar100, "_cifar_info", property(lambda self: original(self)._replace(url=url))
    )
    known = {url: checksums.UrlInfo(size=1, checksum=checksum, filename=file)} if checksum else {}
    monkeypatch.setattr(cifar.Cifar100, "url_infos", known)
    assert cifar.main(["cifar100", f"--data_dir={tmp_path / 'd'}"]) == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("dst: cifar100 cannot be prepared in") and reason in last
    with pytest.raises(ConfigError, match="holds no prepared cifar100"):
        load("cifar100", str(tmp_path / "d"))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cifar.main(["cifar10", f"--data_dir={tmp_path / 'file'}"]) == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("dst: cifar10 cannot be prepared in") and "Not a directory" in last
