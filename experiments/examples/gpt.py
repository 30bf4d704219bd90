"""A byte-level GPT of nanodo's size, truly sparse, on the text of Python's own help.

    python -m experiments.examples.gpt                   98 % sparse: 0.4 of 19 million connections
    python -m experiments.examples.gpt --method=dense    the dense model with as many weights
    python -m experiments.examples.gpt --dim=64 --blocks=2 --steps=200

nanodo (github.com/google-deepmind/nanodo) has 6 blocks of 512 units and 8 heads. The text is
`pydoc_data.topics`, 465 kB; its last tenth is held out.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dst
from experiments.examples.training import train

HEADS, BYTES = 8, 256


class Block(nn.Module):
    """Causal attention and two layers, each behind a norm and beside a residual."""

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        h = nn.LayerNorm(use_bias=False)(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=False, name="attention")(
            h, mask=mask
        )
        h = nn.gelu(nn.Dense(4 * x.shape[-1], use_bias=False)(nn.LayerNorm(use_bias=False)(x)))
        return x + nn.Dense(x.shape[-1], use_bias=False)(h)


class GPT(nn.Module):
    """Embedded bytes and positions, blocks, and the embedding again as the head."""

    dim: int
    blocks: int

    @nn.compact
    def __call__(self, text):
        small = nn.initializers.normal(0.02)
        embed = nn.Embed(BYTES, self.dim, embedding_init=small, name="bytes")
        places = nn.Embed(text.shape[-1], self.dim, embedding_init=small, name="positions")
        x = embed(text) + places(jnp.arange(text.shape[-1])[None])
        for n in range(self.blocks):
            x = Block(name=f"block{n}")(x)
        return embed.attend(nn.LayerNorm(use_bias=False)(x))


def loss(apply, batch):
    """Mean cross-entropy of each next byte, in bits."""
    logits = apply(batch[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return nats.mean(), {"bits": nats.mean() / np.log(2)}


def weights(dim: int, blocks: int, length: int) -> int:
    """Of the dense model."""
    return 12 * blocks * dim**2 + (BYTES + length) * dim


def as_large(count: int, blocks: int, length: int) -> int:
    """The units of the dense model whose number of weights is the closest to `count`."""
    return min(range(HEADS, 4096, HEADS), key=lambda n: abs(weights(n, blocks, length) - count))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", default="gse", help="'dense': as many weights, all connected")
    parser.add_argument("--execution", default="sparse")
    parser.add_argument("--sparsity", type=float, default=0.98, help="of what can be sparse")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/gpt")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dst.SparseState:
    """A run; returns its last state."""
    given = arguments(argv)
    dim, possible = given.dim, 12 * given.blocks * given.dim**2
    if given.method == "dense":
        held = weights(dim, given.blocks, given.length) - round(given.sparsity * possible)
        dim, given.execution = as_large(held, given.blocks, given.length), "masked"
    text = np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    training, held_out = np.split(text, [text.size * 9 // 10])
    example = jax.ShapeDtypeStruct((1, given.length), jnp.int32)
    net = dst.network(GPT(dim, given.blocks), example, execution=given.execution)
    steps = given.steps
    schedule = optax.warmup_cosine_decay_schedule(0, given.learning_rate, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    every = max(1, steps // 50)
    method = dst.method(given.method, given.sparsity, every=every, end=steps * 3 // 4)

    def cut(text, starts):
        return text[starts[:, None] + np.arange(given.length + 1)].astype(np.int32)

    def batch(step):
        rng = np.random.default_rng((given.seed, step))
        return cut(training, rng.integers(training.size - given.length, size=given.batch))

    def evaluate(state):
        predict = dst.predictor(net, state)
        starts = np.arange(0, held_out.size - given.length, given.length)[: 4 * given.batch]
        rows = cut(held_out, starts).reshape(-1, min(given.batch, starts.size), given.length + 1)
        bits = [float(loss(predict, row)[1]["bits"]) for row in rows]
        return {"held_out_bits": float(np.mean(bits))}

    options = {**vars(given), "units": dim, "weights": weights_held(net, method)}
    return train(
        given.out, options, net, tx, method, loss, batch, evaluate, steps=steps, every=every * 5
    )


def weights_held(net: dst.Network, method: dst.Method) -> int:
    """Connections and what stays dense, norms left out."""
    return net.weights - round(method.sparsity * net.possible)


if __name__ == "__main__":
    main()
