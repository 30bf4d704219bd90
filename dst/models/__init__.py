"""The networks of the paper, as plain Linen modules, and their choice by configuration."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from dst.models.mlp import MLP
from dst.models.resnet import ResNet
from dst.models.vgg import VGG16

__all__ = ["MLP", "VGG16", "ResNet", "build"]


def build(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
    """The module named by `config.model`; ValueError for an unknown name or a bad depth."""
    dtype = jnp.dtype(config.precision)
    match config.model:
        case "resnet":
            return ResNet(config.depth, num_classes, config.width, dtype)
        case "vgg":
            return VGG16(num_classes, config.width, dtype)
        case "mlp":
            return MLP(tuple(config.hidden), num_classes, dtype)
    raise ValueError(f"model must be 'resnet', 'vgg' or 'mlp', but is {config.model!r}.")
