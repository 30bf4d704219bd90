"""What becomes of `export`'s files: damaged, of another kind, of another network, half written."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, SGD, Classifier, setup

import dst

NET, _, _, STATE, _ = setup(execution="sparse")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, dict]:
    """The bytes of a file and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "net.npz"
    dst.export(NET, STATE, path)
    return path.read_bytes(), dst.load(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_told_or_read_right(whole, tmp_path_factory, data):
    """A flipped bit or a lost end never gives other weights, nor a traceback."""
    content, variables = whole
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged = content[:at]
    else:
        bit = 1 << data.draw(st.integers(0, 7))
        damaged = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    path.write_bytes(damaged)
    try:
        read = dst.load(path)
    except dst.ConfigError as error:
        assert str(path) in str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_a_header_that_says_less(tmp_path):
    """The one damage that NumPy alone reads without complaint."""
    path = tmp_path / "net.npz"
    wide = dst.network(Classifier(classes=4000), IMAGE, train=False, execution="sparse")
    state = dst.init_state(wide, SGD, dst.method("random", 0.99), jax.random.key(0))
    dst.export(wide, state, path)
    header = b"'shape': (4000,)"
    assert path.read_bytes().count(header) == 1
    path.write_bytes(path.read_bytes().replace(header, b"'shape': (1000,)"))
    with np.load(path) as file:
        assert file["params/Dense_1/bias"].shape == (1000,)
    with pytest.raises(dst.ConfigError, match="damaged"):
        dst.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"sparse": np.array(["params/Dense_1/kernel"])},
        {"data": np.ones(3, np.float32)},
        {"data": np.ones(1), "indices": np.zeros(1, int), "indptr": np.array([0, 1, 2, 2])},
        {"indices": np.array([0, 9], np.int32)},
        {"indices": np.array([0, -1], np.int32)},
        {"indices": np.array([0.0, 1.0])},
        {"indices": np.array([1, 1], np.int32)},
        {"indices": np.array([1, 0], np.int32)},
        {"indptr": np.array([0, 2], np.int32)},
        {"indptr": np.array([0, 2, 0, 2], np.int32)},
        {"indptr": np.array([1, 2, 2, 2], np.int32)},
        {"indptr": np.array([], np.int32)},
        {"shape": np.array([4, 2])},
        {"shape": np.array(3)},
        {"data": np.array([{}, {}])},
    ],
    ids=str,
)
def test_what_is_no_csr_matrix_is_refused(tmp_path, change):
    kernel = "params/Dense_0/kernel"
    csr = {"data": np.ones(2, np.float32), "indices": np.array([0, 1], np.int32)}
    csr |= {"indptr": np.array([0, 2, 2, 2], np.int32), "shape": np.array([3, 2])}

    def write(change):
        entries = {f"{kernel}/{part}": array for part, array in {**csr, **change}.items()}
        listed = entries.pop(f"{kernel}/sparse", np.array([kernel]))
        np.savez(tmp_path / "net.npz", sparse=listed, **entries)

    write({})
    kernel_read = dst.load(tmp_path / "net.npz")["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel_read, [[1, 1], [0, 0], [0, 0]])
    write(change)
    with pytest.raises(dst.ConfigError, match=r"net.npz is damaged, or no file of dst.export\.$"):
        dst.load(tmp_path / "net.npz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a network")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("text", "other.npz", "array.npy"):
        with pytest.raises(
            dst.ConfigError, match=rf"{name} is damaged, or no file of dst.export\.$"
        ):
            dst.predictor(NET, tmp_path / name)
    with pytest.raises(
        dst.ConfigError, match=r"^Cannot read .*none.npz: No such file or directory\.$"
    ):
        dst.load(tmp_path / "none.npz")


def test_a_folder_that_does_not_exist(tmp_path):
    path = tmp_path / "none" / "net.npz"
    with pytest.raises(
        dst.ConfigError, match=r"^Cannot write .*: the folder .*none does not exist\.$"
    ):
        dst.export(NET, STATE, path)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up leaves the file that was there, and nothing else."""
    path = tmp_path / "net.npz"
    path.write_text("what was there")

    def full(file, **entries):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(dst.ConfigError, match=r"^Cannot write .*: No space left on device\.$"):
        dst.export(NET, STATE, path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    dst.export(NET, STATE, path)
    dst.load(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_another_network_is_refused(tmp_path, execution):
    net, _, _, state, _ = setup(execution=execution)
    dst.export(net, state, tmp_path / "net.npz")
    wider = dst.network(Classifier(classes=7), IMAGE, train=False, execution=execution)
    message = r"net.npz is of another network: params/Dense_1/bias is \(5,\), and \(7,\) in this\.$"
    with pytest.raises(dst.ConfigError, match=message):
        dst.predictor(wider, tmp_path / "net.npz")
    bare = dst.network(Classifier(norm=False), IMAGE, train=False, execution=execution)
    message = r"batch_stats/BatchNorm_0/mean is \(6,\), and missing in this\.$"
    with pytest.raises(dst.ConfigError, match=message):
        dst.predictor(bare, tmp_path / "net.npz")
    with pytest.raises(dst.ConfigError, match="not those of the network"):
        dst.export(wider, state, tmp_path / "net.npz")
