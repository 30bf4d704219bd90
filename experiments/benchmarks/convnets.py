"""ResNet-56 and VGG-16 at 98 %, sparse against masked: the same losses, the bytes of either.

    python -m experiments.benchmarks.convnets [--models vgg resnet] [--steps 200] [--rewire 100]
                                              [--data_dir=DIR] [--out FILE.jsonl]

Real CIFAR-100 images, batch 128, in the same order without augmentation, the paper's optimizer, the
same seed. Until the rewire (GSE-GraBo, which draws S otherwise) both should take the same steps, as
far as float32 lets two runs do that: "perturbed" is the masked run with weights 1e-7 off. Each run
has a process of its own; its peak is VmHWM while it steps, activations included.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np

import dst
from dst import data, models
from dst.arena import Arena
from dst.config import default
from dst.steps import classification, optimizer, schedule
from experiments.benchmarks import measure

VARIANTS = ("masked", "perturbed", "sparse")


def weight_bytes(state: Any) -> int:
    """Bytes of the sparse layers between two steps: weights, structure, momentum."""
    if isinstance(state.masks, Arena):
        K = state.masks.column.nbytes  # 4 B a connection, as its value and its momentum
        return 3 * K + state.masks.pointer.nbytes
    return sum((4 + 4 + 1) * mask.size for mask in state.masks.values())


def batches(images: np.ndarray, labels: np.ndarray, size: int, steps: int):
    """Normalised images (B, 32, 32, 3) and labels (B,), in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(labels))
    for step in range(steps):
        chosen = order[np.arange(step * size, (step + 1) * size) % len(order)]
        yield images[chosen], labels[chosen]


def perturbed(params: Any) -> Any:
    """Every parameter times 1 + 1e-7 or 1 - 1e-7, at random: its last bit."""
    rng = np.random.default_rng(1)
    signs = lambda a: rng.choice([-1, 1], a.shape)  # noqa: E731
    return jax.tree.map(lambda a: a * (1 + 1e-7 * signs(a)).astype(np.float32), params)


def run(model: str, variant: str, steps: int, rewire_at: int, data_dir: str) -> dict[str, Any]:
    """One line: the loss of every step, seconds and bytes."""
    config = default().copy_and_resolve_references().unlock()
    config.model, config.dataset = model, "cifar100"
    dataset = data.load("cifar100", data_dir, 0)
    net = dst.network(
        models.build(config, dataset.num_classes),
        jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32),
        train=False,
        execution="sparse" if variant == "sparse" else "masked",
    )
    tx = optimizer(config, schedule(config, 390))
    method = dst.method("gse", config.sparsity, every=rewire_at, end=46_800)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    if variant == "perturbed":
        state = state.replace(params=perturbed(state.params))
    update = dst.make_update(net, tx, classification, donate=True)
    rewire = dst.make_rewire(net, tx, method, classification, donate=True)
    losses, seconds, rewired = [], [], []
    for step, (images, labels) in enumerate(
        batches(dataset.train_images, dataset.train_labels, config.batch_size, steps)
    ):
        batch = (np.asarray(data.normalise(images, dataset.mean, dataset.std)), labels)
        begin = time.perf_counter()
        if dst.due(method, step):
            state, _ = jax.block_until_ready(rewire(state, batch))
            rewired.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begin)
        if step == 1:
            base = measure.settle()  # state and data are there, the step is compiled
            measure.forget_peak()
        if step == min(rewire_at, steps) - 1:
            peak = measure.peak_since() - base + weight_bytes(state)
    return {
        "model": model,
        "variant": variant,
        "weight_state_bytes": weight_bytes(state),
        "step_peak_bytes": peak,
        "step": measure.summary(seconds[2:]),
        "rewire_seconds": rewired,
        "losses": losses,
    }


def table(lines: list[dict[str, Any]], rewire_at: int) -> str:
    """Markdown, and how far the losses are apart before the first rewire."""
    rows = []
    for model in dict.fromkeys(line["model"] for line in lines):
        runs = [line for line in lines if line["model"] == model]
        for line in runs:
            apart = np.abs(np.subtract(*(x["losses"][:rewire_at] for x in (line, runs[0]))))
            rows.append(
                (
                    f"{model}, {line['variant']}",
                    f"{line['weight_state_bytes'] / 1e6:.3f}",
                    f"{line['step_peak_bytes'] / 1e6:.0f}",
                    f"{line['step']['median_seconds']:.3f}",
                    f"{np.mean(line['losses'][:10]):.3f} → {np.mean(line['losses'][-10:]):.3f}",
                    ", ".join(f"{apart[:n].max():.1g}" for n in (3, 10, len(apart))),
                )
            )
    head = ("network", "weight state, MB", "step's peak, MB", "s a step", "loss, 10 steps")
    return measure.table((*head, "loss off masked's, at most: 3, 10, all steps"), rows)


def main() -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["vgg", "resnet"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rewire", type=int, default=100)
    parser.add_argument("--data_dir", default="")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(run(*json.loads(options.alone))))
        return
    lines = measure.Lines(options.out)
    lines.add(measure.header("convnets", dtype="float32"))
    for model in options.models:
        for variant in VARIANTS:
            case = (model, variant, options.steps, options.rewire, options.data_dir)
            module = "experiments.benchmarks.convnets"
            lines.add(measure.alone(module, "--alone", json.dumps(case)))
    print(table(lines.lines[1:], options.rewire))


if __name__ == "__main__":
    main()
