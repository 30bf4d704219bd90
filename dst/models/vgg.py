"""VGG-16 (Simonyan & Zisserman 2015), a quarter of the channels, batch norm, one hidden layer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels at width 1; 2x2 max-pooling ends each stage.
STAGES = ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 128))
HIDDEN = 128  # the head that reproduces the parameter counts of the paper's Table 2


class VGG16(nn.Module):
    """VGG-16 / 4: images (B, H >= 32, W >= 32, C) -> float32 logits (B, num_classes)."""

    num_classes: int
    width: float = 1.0
    dtype: jax.typing.DTypeLike = jnp.float32
    dropout: float = 0.0  # of the hidden layer; 0.5 in the authors' later code

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if min(x.shape[1:3]) < 32:
            raise ValueError(f"VGG-16 needs images of 32x32 or more, but got {x.shape[1:3]}.")
        for stage in STAGES:
            for channels in stage:
                # No bias: batch norm subtracts the mean, so it would cancel, with zero gradient.
                x = nn.Conv(
                    round(channels * self.width),
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    use_bias=False,
                    dtype=self.dtype,
                )(x)
                norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
                x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(round(HIDDEN * self.width), dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
