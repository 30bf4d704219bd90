"""Steps a second and peak memory on one accelerator: `dst`, plain Flax and PyTorch, in one call.

    python -m experiments.benchmarks.gpu [--models vgg resnet mlp4096 mlp16384] [--seconds 5]
        [--rounds 2] [--processes 1 2 4 8] [--small] [--out FILE.jsonl]

VGG-16 and ResNet-56 in float32 and bfloat16, MLPs of two hidden layers, 98 % sparse; batch 128, SGD
with momentum, random images that stay on the device. Every case has a process of its own, and one
turn in every round. Then several processes take the masked VGG-16's step at the same time, which a
card may do for little more than the price of one. `--small` tries everything on a CPU, in minutes.

PyTorch, eager and compiled, is left out where it is not installed, and that is said.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dst
from dst import models
from dst.config import default
from dst.training.steps import optimizer
from experiments.benchmarks import measure
from experiments.benchmarks.convnet_steps import plain

MODULE = "experiments.benchmarks.gpu"
ALONE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else one process takes most of the card
MODELS = {
    "vgg": {"model": "vgg"},
    "resnet": {"model": "resnet", "depth": 56},
    "mlp4096": {"model": "mlp", "hidden": (4096, 4096)},
    "mlp16384": {"model": "mlp", "hidden": (16384, 16384)},
}
SMALL = {"model": "resnet", "depth": 8}, {"model": "mlp", "hidden": (32, 32)}
DST, TORCH = ("masked", "sparse", "plain"), ("torch", "torch, compiled")
MANY = 10  # steps between two looks at the clock


class Case(NamedTuple):
    """One way to take a step."""

    model: str
    variant: str
    precision: str = "float32"
    small: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What `dst.models.build` is told."""
        mlp = self.model.startswith("mlp")
        own = SMALL[mlp] if self.small else MODELS[self.model]
        return {**own, "precision": self.precision}

    @property
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Images, of an MLP rows, and labels."""
        count, rng = 8 if self.small else 128, np.random.default_rng(0)
        shape = (1024,) if self.model.startswith("mlp") else (32, 32, 3)
        images = rng.standard_normal((count, *shape), np.float32)
        return images, rng.integers(10, size=count, dtype=np.int32)


def cases(names: list[str], small: bool) -> Iterator[Case]:
    """All of them."""
    for name in names:
        for precision in ("float32", "bfloat16"):
            for variant in (*DST, *TORCH):
                yield Case(name, variant, precision, small)


# ---------------------------------------------------------------------------------------- the steps
def dst_run(case: Case) -> tuple[Callable[[], Any], Callable[[], int | None]]:
    """A step that is only begun, and the device's peak bytes if it tells them."""
    config = default()
    config.update(case.settings)
    model, tx = models.build(config, 100), optimizer(config, lambda step: 0.01)
    images, labels = case.batch
    net = dst.network(
        model,
        jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32),
        train=False,
        execution="sparse" if case.variant == "sparse" else "masked",
    )
    peak = lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # noqa: E731
    if case.variant == "plain":
        step, begin = plain(net.model, tx)
        return measure.Run(step, *begin(images, labels)), peak
    method = dst.method("gse", 0.98)
    state = dst.init_state(net, tx, method, jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.array(a[None]), (images, labels))
    compiled = measure.program(net, tx, method, "step", measure.shapes((state, batch)))
    return measure.Run(compiled, state, batch), peak


def torch_run(case: Case) -> tuple[Callable[[], Any], Callable[[], int | None]]:
    """PyTorch's step of the same network, channels last. Raises: ImportError."""
    import torch
    from torch.nn import functional

    from experiments.benchmarks import convnet_torch

    own, card = case.settings, torch.cuda.is_available()
    device = "cuda" if card else "cpu"
    images, labels = case.batch
    if own["model"] == "mlp":
        model = convnet_torch.mlp(images.shape[1], own["hidden"], 100)
    else:
        depth = own.get("depth", 0)
        model = convnet_torch.resnet(depth, 100) if depth else convnet_torch.vgg16(100)
    (model, update), x, y = convnet_torch.ready(model, images, labels, 0.01, True, device)
    forward = torch.compile(model) if case.variant == "torch, compiled" else model
    narrow = own["precision"] == "bfloat16"

    def step() -> Any:
        update.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = functional.cross_entropy(forward(x), y)
        loss.backward()
        update.step()
        return loss

    return step, lambda: torch.cuda.max_memory_allocated() if card else None


def wait(result: Any) -> None:
    """Until the device has computed it."""
    if hasattr(result, "item"):
        result.item()
    else:
        jax.block_until_ready(result)


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """Steps a second, the seconds of the first one and the peak; in a fresh process."""
    begin = time.perf_counter()
    try:
        step, peak = (torch_run if case.variant in TORCH else dst_run)(case)
    except ImportError as error:
        return {"unavailable": f"{type(error).__name__}: {error}"}
    wait(step())
    first = time.perf_counter() - begin
    for _ in range(MANY):
        step()
    wait(step())
    count, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        for _ in range(MANY):
            result = step()
        wait(result)
        count += MANY
    return {"steps_a_second": count / taken, "first_seconds": first, "peak_bytes": peak()}


# --------------------------------------------------------------------------------- what is measured
def at_once(case: Case, seconds: float, processes: int) -> list[dict[str, Any]]:
    """What several processes tell that take the same steps at the same time."""
    asked = json.dumps([case, seconds])
    return measure.side_by_side(processes, MODULE, "--alone", asked, environment=ALONE)


def lines(options: Any) -> Iterator[dict[str, Any]]:
    """A line for every case, the median of its rounds, and for every number of processes."""
    wanted = [*cases(options.models, options.small)]
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in wanted}
    for _ in range(options.rounds):
        for case, told in found.items():
            told += at_once(case, options.seconds, 1)
    for case, told in found.items():
        if "unavailable" in told[0]:
            yield {**case._asdict(), **told[0]}
            continue
        speed = statistics.median(one["steps_a_second"] for one in told)
        yield {**case._asdict(), **told[0], "steps_a_second": speed, "rounds": len(told)}
    case = Case("vgg", "masked", small=options.small)
    for processes in options.processes:
        told = at_once(case, options.seconds, processes)
        total = sum(one["steps_a_second"] for one in told)
        yield {**case._asdict(), "processes": processes, "steps_a_second": total}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, append."""
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--small", action="store_true", help="tiny networks")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}.")
    if options.alone:
        case, seconds = json.loads(options.alone)
        print(json.dumps(measured(Case(*case), seconds)))
        return
    out = measure.Lines(options.out)
    out.add(measure.header("gpu", ["torch"], seconds=options.seconds))
    for line in lines(options):
        out.add(line)


if __name__ == "__main__":
    main()
