"""What a file of `export` holds, who can read it, and that predictions survive the way."""

import functools
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy import sparse
from tiny import IMAGE, SGD, Classifier, batch, loss, setup

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
        return nn.Dense(self.classes)(h)  # a sparse layer's kernel is float32


@functools.cache
def run(execution: str):
    """The tiny classifier (every kind of layer), its first state, `update` and `rewire`."""
    net, tx, method, state, _ = setup(heuristic="grabo", execution=execution)
    return net, state, dst.make_update(net, tx, loss), dst.make_rewire(net, tx, method, loss)


def network(execution: str) -> dst.Network:
    """The tiny classifier."""
    return run(execution)[0]


@functools.cache
def trained(execution: str) -> dst.SparseState:
    """A rewire between two steps: statistics and counts are not those of the start."""
    _, state, update, rewire = run(execution)
    state, _ = update(state, batch(0))
    state, _ = rewire(state.replace(step=jnp.int32(2)), batch(1))
    return update(state, batch(2))[0]


def rewired(execution: str) -> dst.SparseState:
    """A state whose newest connections still have weight 0."""
    return run(execution)[3](trained(execution).replace(step=jnp.int32(4)), batch(3))[0]


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


def test_all_states_of_a_network_predict_with_one_program():
    """As after every epoch; another network has its own."""
    traced = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traced.append(x.shape)
            return nn.Dense(2)(x)

    x = jnp.ones((3, 4))
    nets = [dst.network(Counted(), x[:1]) for _ in range(2)]
    states = [
        dst.init_state(nets[0], SGD, dst.method("set", 0.5), jax.random.key(seed))
        for seed in range(2)
    ]
    traced.clear()
    pairs = zip([nets[0], *nets], [*states, states[1]], strict=True)
    first, again, other = (dst.predictor(net, state)(x) for net, state in pairs)
    assert traced == [x.shape] * 2 and (first != again).any()
    np.testing.assert_array_equal(other, again)


def test_masked_predictions_are_those_of_the_model():
    state = trained("masked")
    plain = Classifier().apply({"params": state.params, **state.batch_stats}, IMAGES, train=False)
    predicted = dst.predictor(network("masked"), state)(IMAGES)
    np.testing.assert_allclose(predicted, plain, rtol=1e-4, atol=1e-5)


def test_what_is_off_the_masks_predicts_nothing(tmp_path):
    """Weights from elsewhere put into a state: predictor and export of it agree, NaN included."""
    net, state = network("masked"), trained("masked")
    dense = jax.tree.map(lambda leaf: leaf + 1, state.params)
    mask = state.masks["Dense_0"]
    dense["Dense_0"]["kernel"] = jnp.where(mask, 1, jnp.nan)
    dst.export(net, state.replace(params=dense), tmp_path / "net.npz")
    predicted = dst.predictor(net, state.replace(params=dense))(IMAGES)
    np.testing.assert_array_equal(predicted, dst.predictor(net, tmp_path / "net.npz")(IMAGES))
    assert np.isfinite(predicted).all()


def test_plain_parameters_in_a_sparse_state_are_told(tmp_path):
    """Not by a KeyError: in sparse execution one vector holds the values of all connections."""
    net, state = network("sparse"), trained("sparse")
    plain = Classifier().init(jax.random.key(0), IMAGES, train=False)["params"]
    longer = {**state.params, "arena": {"kernel": jnp.zeros(1000)}}
    for params, found in ((plain, "missing"), (longer, r"\(1000,\)")):
        sentence = rf"^state\.params\['arena'\]\['kernel'\] is {found}, but must be \(258,\): "
        wrong = state.replace(params=params)
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.export(net, wrong, tmp_path / "net.npz")
        with pytest.raises(dst.ConfigError, match=sentence):
            dst.predictor(net, wrong)


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


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_layer_may_be_sparse_in_one_network_and_dense_in_the_other(tmp_path, execution):
    """The file is read by connections, not by who held them how."""
    some = dst.network(
        Classifier(), IMAGE, train=False, execution=execution, sparse=lambda path: path == "Dense_0"
    )
    dst.export(network(execution), trained(execution), tmp_path / "net.npz")
    expected = dst.predictor(network(execution), trained(execution))(IMAGES)
    predicted = dst.predictor(some, tmp_path / "net.npz")(IMAGES)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
