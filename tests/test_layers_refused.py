"""Kinds of layers that do not say what they compute, or say it wrongly, are refused."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import dst
from dst.layers import KINDS, Conv, Dense, Layer, kind_of, register

X = jax.ShapeDtypeStruct((4, 6, 3), jnp.float32)


def kind_for(module, **own):
    """A kind for this module, with the page's product but for what is given."""
    given = {
        "module_type": module,
        "describe": classmethod(lambda cls, path, module, h: cls(path, (h.shape[-1], 5))),
        "apply": lambda self, h, kernel: h @ kernel,
    }
    return type("Own", (Layer,), given | own)


def test_what_is_no_kind_is_refused_when_it_is_registered(page):
    Conv1d = page["Conv1d"]
    refused = {
        "is no kind of layers": Conv1d,
        "Own.module_type is None": kind_for(None),
        "Own.module_type is 'nn.Dense'": kind_for("nn.Dense"),
        "Own has no describe of its own": kind_for(nn.Module, describe=vars(Layer)["describe"]),
        "Layer has no describe and no apply": type("ALayer", (Layer,), {"module_type": nn.Module}),
        "Own is for Conv1d, which Conv1dLayer is registered for": kind_for(Conv1d),
        "Dense is for nn.Dense, which Dense is registered for": Dense,
    }
    before = list(KINDS)
    for sentence, kind in refused.items():
        with pytest.raises(dst.ConfigError, match=sentence) as caught:
            register(kind)
        assert "\n" not in str(caught.value)
    assert before == KINDS


class Module(nn.Module):
    """h W, perhaps more."""

    more: str = ""

    @nn.compact
    def __call__(self, h):
        dtype = jnp.bfloat16 if self.more == "bfloat16" else jnp.float32
        kernel = self.param("kernel", nn.initializers.normal(1, dtype), (h.shape[-1], 5))
        match self.more.split(",")[0]:
            case "scale":
                return h @ kernel * self.param("scale", nn.initializers.ones, ())
            case "noise":
                return nn.Dropout(0.5, deterministic=False)(h) @ kernel
            case "twice":
                return 2 * h @ kernel
            case "standardised":
                return h @ (kernel / kernel.std())
        return h @ kernel


def total(self, x, dtype):
    return jnp.abs(x).sum(0)


def describing(path, shape):
    return {"describe": classmethod(lambda cls, *_: cls(path, shape))}


DOUBLE = {"apply": lambda self, h, kernel: 2 * (h @ kernel)}
MISFITS = {
    "shape": (describing("a", (5, 3)), r"describes \(5, 3\)"),
    "path": (describing("b", (3, 5)), "of this path"),
    "error": ({"describe": classmethod(lambda cls, *_: 1 / 0)}, "Own.describe fails with Zero"),
    "own error": ({"apply": lambda self, h, kernel: h @ kernel.T}, "Own fails with"),
    "bfloat16": ({}, "its kernel is bfloat16, allowed is float32"),
    "integers": ({}, "its input is int32; allowed are floats"),
    "list": (describing("a", [3, 5]), r"cannot be hashed .TypeError: unhashable type: 'list'"),
    "scale": ({}, "'a' cannot be sparse: it has params/scale beside kernel and bias"),
    "noise": ({}, "does not run alone .Invalid.*dropout"),
    "twice": ({}, "Own.apply is another product than the module's"),
    "twice, a matrix": (DOUBLE | {"matrix": True}, "Own.matrix is another product"),
    "standardised": (
        {"apply": lambda self, h, kernel: h @ (kernel / kernel.std())},
        "Own.apply is not linear in the kernel",
    ),
    "output": ({"apply": lambda self, h, kernel: (h @ kernel)[..., :1]}, "Own.apply gives"),
    "sums": ({"sums": total}, "Own.sums gives .* not one for each of 3 units"),
    "gradient": (
        {"gradient_at": lambda self, h, delta, column, output: jnp.zeros(column.size)},
        "Own.gradient_at is not the gradient",
    ),
}


def model_of(call):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(call(x))

    return Model()


@pytest.mark.parametrize("case", MISFITS)
def test_a_kind_that_does_not_fit_is_refused_in_one_sentence(registry, case):
    own, sentence = MISFITS[case]
    register(kind_for(Module, **own))
    dtype = jnp.int32 if case == "integers" else jnp.float32
    model = model_of(lambda x: Module(case, name="a")(x.astype(dtype)))
    with pytest.raises(dst.ConfigError, match=sentence) as caught:
        dst.network(model, X, sparse="*")
    assert "\n" not in str(caught.value) and "leave it dense" in str(caught.value)
    net = dst.network(model, X)
    assert set(net.layers) == {"Dense_0"} and set(net.dense) == {"a/kernel"}


def test_a_kind_is_held_to_all_that_it_inherits(registry):
    class Doubled(nn.Conv):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    own = {"module_type": Doubled, "apply": lambda self, h, W: 2 * Conv.apply(self, h, W)}
    model = model_of(lambda x: Doubled(2, (2, 2), use_bias=False, name="a")(x))
    image = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    register(type("Own", (Conv,), own))
    with pytest.raises(dst.ConfigError, match=r"Own\.convolves is another product"):
        dst.network(model, image, sparse="*")
    KINDS.pop()
    own |= {"convolves": False, "apply_fast": Layer.apply_fast}
    register(type("Own", (Conv,), own))
    with pytest.raises(dst.ConfigError, match=r"Own\.gradient_at is not the gradient"):
        dst.network(model, image, sparse="*")
    KINDS.pop()
    own |= {name: vars(Layer)[name] for name in ("by_unit", "gradient_at", "never_called")}
    register(type("Own", (Conv,), own))
    with pytest.raises(dst.ConfigError, match=r"Own\.gradient_block is not the gradient"):
        dst.network(model, image, sparse="*")
    KINDS.pop()
    own |= {name: vars(Layer)[name] for name in ("gradient_block", "signed_sums")}
    kind = register(type("Own", (Conv,), own))
    assert type(dst.network(model, image).layers["a"]) is kind


def test_a_layer_that_is_called_with_more_than_h_is_refused(registry):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, h, by=1):
            return by * (h @ self.param("kernel", nn.initializers.normal(1), (3, 5)))

    register(kind_for(Scaled))
    with pytest.raises(dst.ConfigError, match=r"'a'.*called with 2 arguments, not with h alone"):
        dst.network(model_of(lambda x: Scaled(name="a")(x, by=2)), X, sparse="*")


def test_the_closest_kind_counts_and_messages_name_what_is_registered(page, caplog):
    assert kind_of(nn.Dense(3)) is Dense and kind_of(page["Conv1d"](3)) is page["Conv1dLayer"]
    assert kind_of(nn.BatchNorm()) is None
    net = dst.network(model_of(lambda x: nn.ConvTranspose(3, (1,), name="other")(x)), X)
    names = "nn.Dense, nn.DenseGeneral, nn.Conv or Conv1d"
    assert net.dense["other/kernel"].why == f"not the kernel of {names}"
    with pytest.raises(dst.ConfigError, match=f"has no {names} layer"):
        dst.network(nn.Sequential([nn.LayerNorm()]), X)
