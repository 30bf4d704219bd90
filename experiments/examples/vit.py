"""A small vision transformer at 90 % sparsity overall, attention included, with AdamW.

    python -m experiments.examples.vit --data_dir=DIR                    GSE on CIFAR-100
    python -m experiments.examples.vit --data_dir=DIR --method=random    the same, never rewired
    python -m experiments.examples.vit --dataset=digits --dim=32 --blocks=2 --patch=2 --epochs=20

DIR is what `python -m dst.data.cifar cifar100 --data_dir=DIR` prepares.
"""

from __future__ import annotations

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dst
from dst.data import dataset
from experiments.examples.images import accuracy, batches
from experiments.examples.training import train


class Block(nn.Module):
    """Attention and two layers, each behind a norm and beside a residual."""

    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class ViT(nn.Module):
    """Patches, a learned position, blocks, and the mean of all tokens."""

    classes: int
    dim: int
    blocks: int
    patch: int

    @nn.compact
    def __call__(self, images):
        size = (self.patch, self.patch)
        x = nn.Conv(self.dim, size, strides=size, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.dim)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.blocks):
            x = Block(self.dim // 32)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


def loss(apply, batch):
    """Mean cross-entropy."""
    logits = apply(batch[0])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return value, {"accuracy": (logits.argmax(-1) == batch[1]).mean()}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", default="cifar100", choices=("cifar100", "cifar10", "digits"))
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--method", default="gse")
    parser.add_argument("--execution", default="masked")
    parser.add_argument("--overall", type=float, default=0.9, help="sparsity of all weights")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/vit")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dst.SparseState:
    """A run; returns its last state."""
    given = arguments(argv)
    data = dataset.load(given.dataset, given.data_dir)
    model = ViT(data.num_classes, given.dim, given.blocks, given.patch)
    example = jax.ShapeDtypeStruct((1, *data.test_images.shape[1:]), jnp.float32)
    net = dst.network(model, example, execution=given.execution)
    batch, per_epoch = batches(data, given.batch, jax.random.key(given.seed))
    steps = given.epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0, given.learning_rate, steps // 20, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    # What stays dense, the positions, is made up for.
    sparsity = given.overall * net.weights / net.possible
    method = dst.method(given.method, sparsity, every=max(1, steps // 100), end=steps * 3 // 4)

    options = {**vars(given), "sparsity": sparsity}
    evaluate = functools.partial(accuracy, net, data)
    return train(
        given.out, options, net, tx, method, loss, batch, evaluate, steps=steps, every=per_epoch
    )


if __name__ == "__main__":
    main()
