"""A sparse network from a dense one's weights, against the same schedule from scratch.

    python -m experiments.examples.finetune                                     an MLP on the digits
    python -m experiments.examples.finetune --dataset=cifar100 --model=resnet --depth=20
        --data_dir=DIR --dense_epochs=30 --epochs=10

Trains a dense network, writes it to OUT/dense.npz, and then two sparse ones with GSE: one from the
largest weights in that file, one from random connections. --dense=FILE takes a file that is there.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dst
from dst import models
from dst.config import default
from dst.data import dataset
from dst.training.steps import classification
from experiments.examples.images import accuracy, batches
from experiments.examples.training import train


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", default="digits", choices=("cifar100", "cifar10", "digits"))
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--model", default="mlp", choices=("mlp", "resnet", "vgg"))
    parser.add_argument("--depth", type=int, default=20, help="of a resnet")
    parser.add_argument("--hidden", type=int, default=256, help="units of an mlp's two layers")
    parser.add_argument("--execution", default="sparse", help="of the sparse networks")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--keep", default="global", help="or 'layer': which of the weights stay")
    parser.add_argument("--dense", default="", help="a file of dst.export")
    parser.add_argument("--dense_epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/finetune")
    return parser.parse_args(argv)


def model_of(given: argparse.Namespace, classes: int) -> Any:
    """The model that the command line names."""
    config = default()
    config.update(model=given.model, depth=given.depth, hidden=(given.hidden, given.hidden))
    return models.build(config, classes)


def main(argv: list[str] | None = None) -> dict[str, dst.SparseState]:
    """The runs' last states, by name."""
    given = arguments(argv)
    data, out = dataset.load(given.dataset, given.data_dir), Path(given.out)
    model = model_of(given, data.num_classes)
    example = jax.ShapeDtypeStruct((1, *data.test_images.shape[1:]), jnp.float32)
    batch, per_epoch = batches(data, given.batch, jax.random.key(given.seed))

    def run(name: str, method: str, sparsity: float, execution: str, epochs: int, **first: Any):
        steps = epochs * per_epoch
        net = dst.network(model, example, train=False, execution=execution)
        rate = optax.cosine_decay_schedule(given.learning_rate, steps)
        tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, 0.9))
        every = max(1, steps // 50)
        rule = dst.method(method, sparsity, every=every, end=max(1, steps * 3 // 4))
        state = train(
            out / name,
            {**vars(given), "run": name},
            net,
            tx,
            rule,
            classification,
            batch,
            functools.partial(accuracy, net, data),
            steps=steps,
            every=steps,
            **first,
        )
        return net, state

    ran = {}
    file = Path(given.dense or out / "dense.npz")
    if not given.dense:
        net, ran["dense"] = run("dense", "dense", 0.0, "masked", given.dense_epochs)
        dst.export(net, ran["dense"], file)
    sparse = functools.partial(
        run, method="gse", sparsity=given.sparsity, execution=given.execution, epochs=given.epochs
    )
    ran["finetuned"] = sparse("finetuned", params=file, keep=given.keep)[1]
    ran["scratch"] = sparse("scratch")[1]
    return ran


if __name__ == "__main__":
    main()
