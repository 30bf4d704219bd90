"""ResNet-(6n+2) for 32x32 images (He et al. 2016, section 4.2), option-A shortcuts."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

# Explicit, because SAME pads a stride-2 convolution on one side only; this is PyTorch's padding=1.
Conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), use_bias=False)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class Block(nn.Module):
    """Two 3x3 convolutions, shortcut without parameters: (B, H, W, C) -> (B, H/s, W/s, C2)."""

    channels: int
    stride: int = 1
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(Conv3x3, self.channels, dtype=self.dtype)
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        y = nn.relu(norm()(conv(strides=self.stride)(x)))
        y = norm()(conv()(y))
        return nn.relu(y + self.shortcut(x))

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Option A: every stride-th pixel, new channels zero and split over both ends."""
        new = self.channels - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class ResNet(nn.Module):
    """ResNet-depth, depth = 6n+2: images (B, H, W, C) -> float32 logits (B, num_classes)."""

    depth: int
    num_classes: int
    width: float = 1.0
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"depth must be 6n+2 (8, 14, ..., 56), but is {self.depth}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stem, *stages = (round(base * self.width) for base in (16, 16, 32, 64))
        x = Conv3x3(stem, dtype=self.dtype)(x)
        x = nn.relu(BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        for stage, channels in enumerate(stages):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(channels, stride, self.dtype)(x, train)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
