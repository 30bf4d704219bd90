"""The models: what builds each, the config fields that it reads, the images that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dst.errors import ConfigError, check_value, integer, listed, one_of, tuple_of
from dst.models.mlp import MLP
from dst.models.resnet import ResNet
from dst.models.vgg import VGG16
from dst.vocabulary import Names

FIELDS = ("depth", "width", "hidden")  # of the config, that only models read


class Architecture(NamedTuple):
    """How a model is built: a Linen module, images (B, H, W, C) to logits (B, num_classes).

    It is called as `model(images, train=True)`, or False.
    """

    build: Callable[[ConfigDict, int], nn.Module]  # (config, num_classes)
    reads: tuple[str, ...] = ()  # which of FIELDS; `build` sees no others, but the precision
    smallest: int = 1  # side of the smallest images


def check_architecture(who: str, row: Architecture) -> None:
    """Raises: ConfigError for values that a row cannot have."""
    fields = tuple_of(lambda v: v in FIELDS, lambda v: True, f"a tuple of {listed(FIELDS)}")
    check_value(f"build of {who}", row.build, (callable, "a function of config and num_classes"))
    check_value(f"reads of {who}", row.reads, fields)
    check_value(f"smallest of {who}", row.smallest, integer(1))


MODELS: Names[Architecture] = Names(
    "model",
    Architecture,
    dict(
        mlp=Architecture(
            lambda config, n: MLP(tuple(config.hidden), n, jnp.dtype(config.precision)),
            reads=("hidden",),
        ),
        resnet=Architecture(
            lambda config, n: ResNet(config.depth, n, config.width, jnp.dtype(config.precision)),
            reads=("depth", "width"),
        ),
        vgg=Architecture(
            lambda config, n: VGG16(n, config.width, jnp.dtype(config.precision)),
            reads=("width",),
            smallest=32,
        ),
        vgg_dropout=Architecture(
            lambda config, n: VGG16(n, config.width, jnp.dtype(config.precision), dropout=0.5),
            reads=("width",),
            smallest=32,
        ),
    ),
    check_architecture,
)


def build(config: ConfigDict, num_classes: int) -> nn.Module:
    """The module named by `config.model`.

    Raises: ConfigError for an unknown name, a row that reads fields it does not list, no module.
    """
    check_value("model", config.model, one_of(MODELS))
    who, row = f"model {config.model!r}", MODELS[config.model]
    fields = ("precision", *row.reads)
    seen = ConfigDict({field: config[field] for field in fields})
    try:
        model = row.build(seen, num_classes)
    except AttributeError as error:
        if error.obj is not seen:
            raise
        raise ConfigError(
            f"{who} reads config.{error.name}, but its row lists only {', '.join(fields)}."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{who} must be built as a flax.linen.Module, not {model!r}.")
    return model


def check_logits(name: str, model: nn.Module, image: jax.ShapeDtypeStruct, classes: int) -> None:
    """Raises: ConfigError if the model, which `name` calls, does not give a logit a class."""

    def apply(x: jax.Array) -> jax.Array:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        return model.init_with_output(keys, x, train=False)[0]

    logits = jax.eval_shape(apply, image)
    expected = (image.shape[0], classes)
    if getattr(logits, "shape", None) != expected or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ConfigError(
            f"model {name!r} must give floating-point logits of shape {expected} for images of "
            f"shape {image.shape}, not {logits}."
        )


def check_images(name: str, side: int, dataset: str) -> None:
    """Raises: ConfigError if the model takes no images as small as those of the data set."""
    if MODELS[name].smallest > side:
        least, fitting = MODELS[name].smallest, [m for m in MODELS if MODELS[m].smallest <= side]
        raise ConfigError(
            f"model {name!r} takes images of {least}x{least} or more; for the {side}x{side} images "
            f"of dataset {dataset!r} it must be {listed(fitting)}."
        )


def never_reads(name: str) -> set[str]:
    """Those of FIELDS that change nothing in this model; of one that is unknown here, none."""
    return {*FIELDS} - {*MODELS[name].reads} if name in MODELS else set()
