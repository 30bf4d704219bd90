"""What a file of `export` holds, who can read it, and that predictions survive the way."""

import functools
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tiny import SGD, Classifier, batch, loss

import dst

IMAGES = batch(7)[0]
EXECUTIONS = ("masked", "sparse")


class MLP(nn.Module):
    """Two layers with biases."""

    hidden: int = 64
    classes: int = 3
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        normal, dtype = nn.initializers.normal(), self.param_dtype
        h = nn.relu(nn.Dense(self.hidden, param_dtype=dtype, bias_init=normal)(x))
        return nn.Dense(self.classes, param_dtype=dtype)(h)


@functools.cache
def network(execution: str) -> dst.Network:
    """The tiny classifier: convolution, batch norm, dense layers, biases."""
    return dst.network(
        Classifier(),
        jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32),
        train=False,
        execution=execution,
    )


@functools.cache
def steps(execution: str):
    """The first state and the compiled `update` and `rewire`."""
    net, method = network(execution), dst.method("gse", 0.8, heuristic="grabo", every=2, end=12)
    state = dst.init_state(net, SGD, method, jax.random.key(3))
    return state, dst.make_update(net, SGD, loss), dst.make_rewire(net, SGD, method, loss)


@functools.cache
def trained(execution: str) -> dst.SparseState:
    """A rewire between two steps: statistics and counts are not those of the start."""
    state, update, rewire = steps(execution)
    state, _ = update(state, batch(0))
    state, _ = rewire(state.replace(step=jnp.int32(2)), batch(1))
    return update(state, batch(2))[0]


def rewired(execution: str) -> dst.SparseState:
    """A state whose newest connections still have weight 0."""
    return steps(execution)[2](trained(execution).replace(step=jnp.int32(4)), batch(3))[0]


def mlp(
    execution: str, n_in: int, sparsity: float, **kwargs
) -> tuple[dst.Network, dst.SparseState]:
    """An MLP at initialisation."""
    net = dst.network(
        MLP(**kwargs), jax.ShapeDtypeStruct((1, n_in), jnp.float32), execution=execution
    )
    return net, dst.init_state(net, SGD, dst.method("random", sparsity), jax.random.key(1))


def matrix(file, name: str) -> sparse.csr_array:
    """A kernel as the docstring of `export` tells a SciPy user to read it."""
    shape = (-1 + len(file[f"{name}/indptr"]), file[f"{name}/shape"][-1])
    return sparse.csr_array(
        (file[f"{name}/data"], file[f"{name}/indices"], file[f"{name}/indptr"]), shape=shape
    )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("read", EXECUTIONS)
@pytest.mark.parametrize("written", EXECUTIONS)
def test_predictions_survive(tmp_path, written, read, dense):
    """Whichever execution writes and reads; bitwise if it is the same one."""
    state, path = trained(written), tmp_path / "net.npz"
    expected = dst.predictor(network(written), state)(IMAGES)
    dst.export(network(written), state, path, dense=dense)
    there = dst.predictor(network(read), path)(IMAGES)
    np.testing.assert_allclose(there, expected, rtol=1e-4, atol=1e-5)
    if written == read:
        np.testing.assert_array_equal(there, expected)
    plain = Classifier().apply(dst.load(path), IMAGES, train=False)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


def test_masked_predictions_are_those_of_the_model():
    state = trained("masked")
    plain = Classifier().apply({"params": state.params, **state.batch_stats}, IMAGES, train=False)
    predicted = dst.predictor(network("masked"), state)(IMAGES)
    np.testing.assert_allclose(predicted, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_scipy_predicts_without_dst(tmp_path, execution):
    net, state = mlp(execution, 200, 0.9)
    dst.export(net, state, tmp_path / "net.npz")
    x = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32)
    with np.load(tmp_path / "net.npz", allow_pickle=False) as file:
        assert file["sparse"].tolist() == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
        assert np.any(file["params/Dense_0/bias"])
        h = np.maximum(x @ matrix(file, "params/Dense_0/kernel") + file["params/Dense_0/bias"], 0)
        logits = h @ matrix(file, "params/Dense_1/kernel") + file["params/Dense_1/bias"]
    np.testing.assert_allclose(logits, dst.predictor(net, state)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_the_file_holds(tmp_path, execution):
    """Every connection, those of weight 0 too, in CSR that SciPy calls canonical."""
    net, state = network(execution), rewired(execution)
    dst.export(net, state, tmp_path / "net.npz")
    connections = zeros = 0
    with np.load(tmp_path / "net.npz", allow_pickle=False) as file:
        for name in file["sparse"].tolist():
            types = {
                part: file[f"{name}/{part}"].dtype.name for part in ("data", "indices", "indptr")
            }
            assert types == {"data": "float32", "indices": "int32", "indptr": "int32"}
            W = matrix(file, name)
            W.check_format(full_check=True)
            assert W.has_canonical_format
            connections, zeros = connections + W.nnz, zeros + np.sum(W.data == 0)
            layer = net.layers[name.removeprefix("params/").removesuffix("/kernel")]
            assert tuple(file[f"{name}/shape"]) == layer.shape
            if execution == "masked":
                mask, kernel = state.masks[layer.path], state.params[layer.path]["kernel"]
                np.testing.assert_array_equal(W.toarray().reshape(layer.shape), kernel)
                pattern = sparse.csr_array((np.ones(W.nnz), W.indices, W.indptr), W.shape)
                np.testing.assert_array_equal(pattern.toarray().reshape(layer.shape), mask)
        rest = {name for name in file.files if "kernel" not in name}
        np.testing.assert_array_equal(
            file["batch_stats/BatchNorm_0/mean"],
            state.batch_stats["batch_stats"]["BatchNorm_0"]["mean"],
        )
    assert connections == net.possible - round(0.8 * net.possible)
    assert zeros > 0
    norm = {f"params/BatchNorm_0/{name}" for name in ("bias", "scale")}
    statistics = {f"batch_stats/BatchNorm_0/{name}" for name in ("mean", "var")}
    biases = {f"params/{path}/bias" for path in net.layers}
    assert rest == {"sparse"} | norm | statistics | biases


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dense_is_plain_flax(tmp_path, execution):
    """The model's own variables, and what `load` makes of the sparse file."""
    state = trained(execution)
    dst.export(network(execution), state, tmp_path / "dense.npz", dense=True)
    dst.export(network(execution), state, tmp_path / "sparse.npz")
    model = Classifier().init(jax.random.key(0), IMAGES, train=False)
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(model, sep="/").items()}
    loaded = traverse_util.flatten_dict(dst.load(tmp_path / "sparse.npz"), sep="/")
    with np.load(tmp_path / "dense.npz", allow_pickle=False) as file:
        assert {name: file[name].shape for name in file.files if name != "sparse"} == shapes
        for name in shapes:
            np.testing.assert_array_equal(file[name], loaded[name])
    if execution == "masked":
        for name, leaf in traverse_util.flatten_dict({"params": state.params}, sep="/").items():
            np.testing.assert_array_equal(loaded[name], leaf)


def test_a_wide_layer_is_never_dense(tmp_path):
    """65536 x 65536 would be 16 GiB: not written, not read, not predicted from a dense array."""
    n, path = 2**16, tmp_path / "wide.npz"
    net, state = mlp("sparse", n, 1 - 2**-20, hidden=n, classes=2)
    x = np.random.default_rng(0).normal(size=(2, n)).astype(np.float32)
    tracemalloc.start()
    dst.export(net, state, path)
    predicted = np.asarray(dst.predictor(net, path)(x))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert path.stat().st_size < 4 * 2**20
    with np.load(path, allow_pickle=False) as file:
        W, V = (matrix(file, f"params/Dense_{i}/kernel") for i in (0, 1))
        h = np.maximum(x @ W + file["params/Dense_0/bias"], 0)
        assert W.nnz > 3000
        np.testing.assert_allclose(h @ V + file["params/Dense_1/bias"], predicted, atol=1e-5)


def test_bfloat16_parameters(tmp_path):
    """NumPy has no bfloat16; the file says float32, a predictor has the model's type again."""
    path, x = tmp_path / "net.npz", jnp.ones((2, 20), jnp.bfloat16)
    model, second = MLP(param_dtype=jnp.bfloat16), lambda path: path == "Dense_1"
    net = dst.network(model, x, sparse=second)
    state = dst.init_state(net, SGD, dst.method("random", 0.5), jax.random.key(1))
    dst.export(net, state, path)
    assert state.params["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert dst.load(path)["params"]["Dense_0"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(dst.predictor(net, path)(x), dst.predictor(net, state)(x))


# -------------------------------------------------------------------------------- damage and misuse
@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, dict]:
    """The bytes of a file and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "net.npz"
    dst.export(network("sparse"), trained("sparse"), path)
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
    dst.export(*mlp("sparse", 2, 0.5, hidden=4000), path, dense=True)
    header = b"'shape': (4000,)"
    assert path.read_bytes().count(header) == 1
    path.write_bytes(path.read_bytes().replace(header, b"'shape': (1000,)"))
    with np.load(path) as file:
        assert file["params/Dense_0/bias"].shape == (1000,)
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
            dst.predictor(network("sparse"), tmp_path / name)
    with pytest.raises(
        dst.ConfigError, match=r"^Cannot read .*none.npz: No such file or directory\.$"
    ):
        dst.load(tmp_path / "none.npz")


def test_a_folder_that_does_not_exist(tmp_path):
    path = tmp_path / "none" / "net.npz"
    with pytest.raises(
        dst.ConfigError, match=r"^Cannot write .*: the folder .*none does not exist\.$"
    ):
        dst.export(network("masked"), trained("masked"), path)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up leaves the file that was there, and nothing else."""
    path = tmp_path / "net.npz"
    path.write_text("what was there")

    def full(file, **entries):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(dst.ConfigError, match=r"^Cannot write .*: No space left on device\.$"):
        dst.export(network("masked"), trained("masked"), path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    dst.export(network("masked"), trained("masked"), path)
    dst.load(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_another_network_is_refused(tmp_path, execution):
    dst.export(network(execution), trained(execution), tmp_path / "net.npz")
    image = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    wider = dst.network(Classifier(classes=7), image, train=False, execution=execution)
    message = r"net.npz is of another network: params/Dense_1/bias is \(5,\), and \(7,\) in this\.$"
    with pytest.raises(dst.ConfigError, match=message):
        dst.predictor(wider, tmp_path / "net.npz")
    bare = dst.network(Classifier(norm=False), image, train=False, execution=execution)
    message = r"batch_stats/BatchNorm_0/mean is \(6,\), and missing in this\.$"
    with pytest.raises(dst.ConfigError, match=message):
        dst.predictor(bare, tmp_path / "net.npz")
    with pytest.raises(dst.ConfigError, match="not those of the network"):
        dst.export(wider, trained(execution), tmp_path / "net.npz")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_layer_may_be_sparse_in_one_network_and_dense_in_the_other(tmp_path, execution):
    """The file is read by connections, not by who held them how."""
    image = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
    some = dst.network(
        Classifier(), image, train=False, execution=execution, sparse=lambda path: path == "Dense_0"
    )
    dst.export(network(execution), trained(execution), tmp_path / "net.npz")
    expected = dst.predictor(network(execution), trained(execution))(IMAGES)
    predicted = dst.predictor(some, tmp_path / "net.npz")(IMAGES)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
