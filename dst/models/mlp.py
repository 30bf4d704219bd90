"""A multilayer perceptron, for the digits quickstart and for models whose weights dominate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Flatten, Dense + ReLU per entry of `hidden`: (B, ...) -> float32 logits (B, num_classes)."""

    hidden: tuple[int, ...]
    num_classes: int
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train  # no layer behaves differently in training
        x = x.reshape(x.shape[0], -1)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units, dtype=self.dtype)(x))
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
