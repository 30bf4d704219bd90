"""Which kernels a model has that can be sparse, and one sentence for each that cannot."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import dst
from dst.discovery import network
from dst.errors import ConfigError
from dst.layers import Conv, Dense, DenseGeneral, obstacle
from dst.layers.window import Window
from dst.network import Left

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
ROWS = jax.ShapeDtypeStruct((2, 5), jnp.float32)


class Model(nn.Module):
    """A model from a function of (module, x)."""

    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


class Doubled(nn.Dense):
    """A subclass that changes what the layer computes."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Renamed(nn.Dense):
    """A subclass whose product is that of `nn.Dense`."""

    use_bias: bool = False
    extra: int = 3

    def norm(self):
        return jnp.abs(self.get_variable("params", "kernel")).max()


class Setup(nn.Module):
    def setup(self):
        self.inner = [nn.Dense(3), nn.Dense(4)]

    def __call__(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def zoo(module, x):
    x = nn.remat(nn.Conv)(6, (3, 2), strides=2, padding="VALID", name="remat")(x)
    x = nn.Dense(7, name="plain")(x)
    x = nn.Sequential([nn.Dense(5), nn.relu, nn.BatchNorm(True), nn.Dense(5)], name="sequential")(x)
    shared = nn.Dense(5, name="shared")
    x = Renamed(5, name="renamed")(inputs=shared(shared(x)))
    x = nn.MultiHeadDotProductAttention(1, name="attention")(x, x)
    x = nn.ConvTranspose(3, (2, 2), name="transposed")(x)
    x = Setup(name="setup")(x) + nn.Embed(9, 4, name="embedding")(jnp.zeros(1, int)).sum()
    return nn.DenseGeneral(3, name="general")(x)


def test_every_kind_of_use_is_found_and_the_rest_listed():
    model = Model(zoo)
    shapes = {
        "remat": (3, 2, 4, 6),
        "plain": (6, 7),
        "Dense_0": (7, 5),
        "Dense_1": (5, 5),
        "shared": (5, 5),
        "renamed": (5, 5),
        "setup/inner_0": (3, 3),
        "setup/inner_1": (3, 4),
    }
    shapes |= {f"attention/{name}": (5, 1, 5) for name in ("query", "key", "value")}
    shapes |= {"attention/out": (1, 5, 5), "general": (4, 3)}
    dense = {"transposed/kernel": (2, 2, 5, 3), "embedding/embedding": (9, 4)}
    why = "not the kernel of nn.Dense, nn.DenseGeneral or nn.Conv"
    net = network(model, IMAGE)
    assert {path: layer.shape for path, layer in net.layers.items()} == shapes
    kinds = {path: type(layer) for path, layer in net.layers.items()}
    general = {path for path, kind in kinds.items() if kind is DenseGeneral}
    assert general == {path for path in shapes if path.startswith(("attention", "general"))}
    assert {kinds[path] for path in kinds.keys() - general} == {Dense, Conv}
    window = Window((2, 2), "VALID", (1, 1))
    assert net.layers["remat"] == Conv("remat", (3, 2, 4, 6), None, window)
    assert net.dense == {name: Left(shape, why) for name, shape in dense.items()}
    assert net.possible == 144 + 42 + 35 + 3 * 25 + 9 + 12 + 4 * 25 + 12
    assert net.weights == net.possible + 2 * 2 * 5 * 3 + 9 * 4
    net = network(model, IMAGE, sparse=lambda path: path.startswith("s"))
    assert set(net.layers) == {path for path in shapes if path.startswith("s")}
    assert {name for name, left in net.dense.items() if left.why == "not chosen"} == {
        f"{path}/kernel" for path in shapes if not path.startswith("s")
    }


class Keyword(nn.Module):
    @nn.compact
    def __call__(self, *, inputs):
        return nn.Dense(3)(inputs)


def test_inputs_may_go_by_keyword():
    assert list(network(Keyword(), inputs=jnp.ones((2, 4))).layers) == ["Dense_0"]


def test_layers_come_in_the_order_in_which_jax_returns_dicts_of_them():
    def body(module, x):
        return nn.Dense(2, name="a-b")(Setup(name="a")(nn.Dense(4, name="c")(x)))

    layers = network(Model(body), ROWS).layers
    assert list(layers) == list(jax.jit(lambda: dict.fromkeys(layers, 0.0))())


def conv(**options):
    options = {"features": 4, "kernel_size": (3, 3)} | options
    return lambda module, x: nn.Conv(**options, name="a")(x)


def layer(make):
    return lambda module, x: make()(x)


def scanned(module, x):
    cell = nn.scan(
        Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )(name="a")  # fmt: skip
    return cell(x, None)[0]


def scanned_shared(module, x):
    cell = nn.scan(
        Cell, variable_broadcast="params", split_rngs={"params": False}, length=3
    )(name="a")  # fmt: skip
    return cell(x, None)[0]


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], name="inner")(x), None


def vmapped(axis):
    def body(module, x):
        split = {"params": axis is not None}
        return nn.vmap(nn.Dense, variable_axes={"params": axis}, split_rngs=split)(3, name="a")(x)

    return body


def signs(variables):
    return jax.tree.map(jnp.sign, variables)


def tied(use_bias, read):
    def body(module, x):
        a = nn.Dense(3, use_bias=use_bias, name="a")
        return a(x) @ read(module, a).T

    return body


def own_error(module, x):
    """A product of shapes that do not fit, once it is applied."""
    x = nn.Dense(3, name="a")(x)
    return x if module.is_initializing() else x @ jnp.zeros((7, 7))


def replacing(base, *names):
    """A subclass of `base` with methods of these names that do what its own do."""
    same = {
        name: lambda self, *a, _name=name, **k: getattr(base, _name)(self, *a, **k)
        for name in names
    }
    return type("Other", (base,), same)


REFUSED = {
    "input dilation": (conv(input_dilation=(2, 2), padding=1), "'a'.*input_dilation"),
    "batch dims": (
        layer(lambda: nn.DenseGeneral(3, batch_dims=0, name="a")),
        r"'a'.*batch_dims \(0,\)",
    ),
    "mask": (conv(mask=jnp.ones((3, 3, 4, 4))), "'a'.*mask="),
    "conv product": (conv(conv_general_dilated=jax.lax.conv_general_dilated), "'a'.*conv_general"),
    "dense product": (
        layer(lambda: nn.Dense(3, dot_general=jax.lax.dot_general, name="a")),
        "'a'.*dot_general",
    ),
    "scan, stacked": (scanned, r"'a/inner'.*stacked to \(3, 4, 4\)"),
    "vmap, stacked": (vmapped(0), r"'a'.*stacked to \(2, 4, 3\)"),
    "scan, shared": (scanned_shared, "'a/inner'.*between calls"),
    "vmap, shared": (vmapped(None), "'a'.*between calls"),
    "rnn": (lambda m, x: nn.RNN(nn.GRUCell(3), name="a")(x[0]), "'.*/i.'.*between calls"),
    "weight norm": (layer(lambda: nn.WeightNorm(nn.Dense(3, name="a"))), "'a'.*by a norm"),
    "spectral norm": (
        lambda m, x: nn.SpectralNorm(nn.Conv(3, (1, 1), name="a"))(x, update_stats=True),
        "'a'.*by a norm",
    ),
    "mapped": (
        lambda m, x: nn.map_variables(nn.Dense, "params", signs, init=True)(3, name="a")(x),
        "'a'.*by nn.map_variables",
    ),
    "mapped block": (
        lambda m, x: nn.map_variables(Cell, "params", signs, init=True)(name="a")(x, x)[0],
        "'a/inner'.*by nn.map_variables",
    ),
    "subclass": (layer(lambda: Doubled(3, name="a")), "'a'.*Doubled overrides __call__"),
    "tied": (tied(True, lambda m, a: m.variables["params"]["a"]["kernel"]), "tying"),
    "tied, no bias": (
        tied(False, lambda m, a: m.variables["params"]["a"]["kernel"]),
        "tying",
    ),
    "tied, own": (tied(False, lambda m, a: a.variables["params"]["kernel"]), "tying"),
    "tied, get": (tied(True, lambda m, a: a.get_variable("params", "kernel")), "tying"),
    "param": (
        layer(lambda: replacing(nn.Conv, "param")(4, (3, 3), name="a")),
        "'a'.*its kernel is reparameterised: Other overrides param",
    ),
    "variables": (layer(lambda: replacing(nn.Dense, "get_variable")(4, name="a")), "get_variable"),
    "setup": (layer(lambda: replacing(nn.Dense, "setup")(4, name="a")), "Other overrides setup"),
    "promotion": (
        layer(lambda: nn.Dense(4, promote_dtype=lambda *a, dtype: a, name="a")),
        "'a'.*a custom promote_dtype",
    ),
    "type": (
        layer(lambda: nn.Dense(4, param_dtype=jnp.bfloat16, name="a")),
        "'a'.*param_dtype is bfloat16, allowed is float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_named_and_not_covered_is_refused_in_one_sentence(case):
    body, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as caught:
        network(Model(body), IMAGE, sparse="*")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_named_and_not_covered_stays_dense(case, caplog):
    """The rest is sparse, and the log says why that is not."""

    def body(module, x):
        return nn.Dense(3, name="sparse")(REFUSED[case][0](module, x))

    net = network(Model(body), IMAGE)
    assert list(net.layers) == ["sparse"]
    left = [name for name in net.dense if f"{name} stays dense: " in caplog.text]
    assert left == list(net.dense) and left[0].startswith(("a/", "GRUCell_0/"))


def test_what_a_kernel_read_elsewhere_raises_is_quoted():
    with pytest.raises(
        ConfigError, match=r"weight tying.*AttributeError: 'NoneType' object has no"
    ):
        network(Model(REFUSED["tied, get"][0]), IMAGE, sparse="a")


def test_of_many_layers_only_those_that_are_read_elsewhere_stay_dense():
    def body(module, x):
        x, both = Setup(name="setup")(x), [nn.Dense(3, name=name) for name in ("a", "b")]
        x = sum(layer(x) for layer in both)
        return nn.Dense(3)(x) @ sum(layer.variables["params"]["kernel"].T for layer in both)

    net = network(Model(body), IMAGE)
    assert list(net.layers) == ["Dense_0", "setup/inner_0", "setup/inner_1"]
    assert all("weight tying" in net.dense[f"{name}/kernel"].why for name in "ab")


def test_globs_name_what_is_sparse_and_what_is_dense():
    paths = lambda **of: set(network(Model(zoo), IMAGE, **of).layers)  # noqa: E731
    every, attention = paths(), {f"attention/{n}" for n in ("query", "key", "value", "out")}
    assert paths(dense="attention/*") == every - attention
    assert paths(dense=("*_?", "general")) == every - {"general", *(p for p in every if "_" in p)}
    assert paths(sparse=("*/query", "plain"), dense="p*") == {"attention/query"}
    for of in ({"dense": "attention"}, {"sparse": ["plain", "attention"]}):
        with pytest.raises(ConfigError, match=r"is 'attention', which matches no layer; .*'plain'"):
            paths(**of)
    with pytest.raises(ConfigError, match=r"globs of layers must be strings .*, not \(3,\)"):
        paths(dense=(3,))
    with pytest.raises(
        ConfigError, match=r"no nn\.Dense.* layer that may be sparse; .*: not chosen"
    ):
        paths(dense="*")
    with pytest.raises(ConfigError, match=r"stays dense, as \d+ others,: not chosen") as caught:
        paths(dense="*")
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match=r"no nn\.Dense, nn\.DenseGeneral or nn\.Conv layer"):
        network(Model(lambda m, x: nn.LayerNorm()(x)), IMAGE)


def test_the_summary_has_a_row_a_weight_and_both_sparsities(capsys):
    def body(module, x):
        return nn.Embed(5, 4)(jnp.zeros(2, int)) @ nn.Dense(4, name="a")(x).T

    net = network(Model(body), ROWS)
    state = dst.init_state(net, optax.sgd(0.1), dst.method("set", 0.75), jax.random.key(0))
    net.summary()
    net.summary(state)
    text = " ".join(capsys.readouterr().out.split())
    assert "a/kernel nn.Dense 5 x 4 20 sparse" in text
    assert "a/kernel nn.Dense 5 x 4 20 5 (25.00%)" in text
    assert text.count("Embed_0/embedding 5 x 4 20 dense: not the kernel") == 2
    assert text.count("20 of 40 weights can be sparse, 50.00%.") == 2
    assert "Sparsity 75.00% of these, overall 37.50%: 5 connections and 20 dense weights." in text
    assert dst.sparsity_of(state.masks) == dst.sparsity_of(state) == 0.75
    assert dst.sparsity_of(state, net) == dst.sparsity_of(state.masks, net) == 0.375


def test_a_models_own_error_is_raised_as_it_is():
    """`init` does not meet it; it has nothing to do with kernels."""
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        network(Model(own_error), ROWS)


def test_every_field_of_flax_is_accounted_for(monkeypatch):
    """What a later Flax adds is refused once it is set."""
    kinds = (nn.Dense, nn.DenseGeneral, nn.Conv)
    fields = [field.name for base in kinds for field in dataclasses.fields(base)]
    assert set(fields) == obstacle.FIELDS
    monkeypatch.setattr(obstacle, "FIELDS", obstacle.FIELDS - {"precision"})
    network(Model(layer(lambda: nn.Dense(3, name="a"))), ROWS)
    with pytest.raises(ConfigError, match=r"'a'.*precision 'high', which dst does not know"):
        network(Model(layer(lambda: nn.Dense(3, precision="high", name="a"))), ROWS, sparse="*")


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


JITTED = {
    "layer": lambda m, x: nn.jit(nn.Dense)(3, name="a")(x),
    "block": lambda m, x: nn.jit(Setup)(name="a")(x),
    "under remat": lambda m, x: nn.remat(nn.jit(nn.Dense))(3, name="a")(x),
    "method": lambda m, x: JitMethod(name="a")(x),
    "no layer": lambda m, x: nn.jit(nn.Dropout)(0.5, deterministic=True, name="a")(x),
}


@pytest.mark.parametrize("case", JITTED)
def test_what_runs_under_nn_jit_is_refused_in_one_sentence(case):
    """Also what was traced before, and what is left dense: no interceptor would see it."""
    model = Model(JITTED[case])
    model.init(jax.random.key(0), jnp.zeros(ROWS.shape))
    for sparse in (lambda path: True, lambda path: path != "a"):
        with pytest.raises(
            ConfigError, match=r" 'a.*' runs under nn\.jit.*leave nn\.jit away"
        ) as e:
            network(model, ROWS, sparse=sparse)
        assert "\n" not in str(e.value)


def test_a_model_that_is_nn_jit_as_a_whole_is_refused():
    with pytest.raises(ConfigError, match=r"runs under nn\.jit"):
        network(nn.jit(Setup)(), ROWS)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_annotations_for_other_meshes_are_left_out(execution):
    """`nn.with_partitioning` puts variables into boxes, which `dst` has no use for."""
    boxed = lambda f: nn.with_partitioning(f, ("model",))  # noqa: E731
    zeros, ones = boxed(nn.initializers.zeros), boxed(nn.initializers.ones)
    body = lambda m, x: nn.Dense(3, bias_init=ones, kernel_init=zeros)(  # noqa: E731
        nn.Conv(2, (3, 3), kernel_init=zeros, name="dense")(x)
    )
    net = network(Model(body), IMAGE, sparse=lambda path: path != "dense", execution=execution)
    state = dst.init_state(net, optax.adam(1e-3), dst.method("set", 0.5), jax.random.key(0))
    assert dst.predictor(net, state)(jnp.ones(IMAGE.shape)).shape == (2, 8, 8, 3)
    assert state.params["Dense_0"]["bias"].shape == (3,)


def own_kernel(module, x):
    """A layer on a kernel that the model makes itself."""
    kernel = module.param("kernel", nn.initializers.ones, (4, 3))
    return nn.Dense(3, use_bias=False, name="head").apply({"params": {"kernel": kernel}}, x)


def test_a_layer_applied_to_variables_of_its_own_stays_dense(caplog):
    net = network(Model(lambda m, x: own_kernel(m, nn.Dense(4)(x))), IMAGE)
    assert list(net.layers) == ["Dense_0"] and set(net.dense) == {"kernel"}
    assert "head stays dense: it is applied to variables of its own" in caplog.text


def test_a_model_that_is_one_layer_is_refused():
    with pytest.raises(ConfigError, match="the model is one layer, which has no path"):
        network(nn.Dense(3), ROWS)


def test_more_connections_than_int32_can_number_are_refused():
    wide = layer(lambda: nn.Dense(2**16, name="a"))
    net = network(Model(wide), jax.ShapeDtypeStruct((2, 2**15), jnp.float32))
    with pytest.raises(ConfigError, match=f"has {2**31} possible connections"):
        dst.init_state(net, optax.sgd(0.1), dst.method("random", 0.99), jax.random.key(0))
