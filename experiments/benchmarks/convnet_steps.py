"""What `convnets` measures: the step of a network in each variant, and the rewires of `dst`'s.

Nothing here knows of processes, pipes or malloc; PyTorch is imported where it is needed, so an
ImportError means that it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dst
from dst.config import default
from dst.connections.arena import Arena
from dst.models import MLP, VGG16, ResNet
from dst.training.steps import optimizer
from experiments.benchmarks import measure
from experiments.benchmarks.step import plain_step


class Stack(nn.Module):
    """Four residual blocks of a kind, between a first convolution and a head."""

    block: Callable[[Any], Any]
    size: tuple[int, ...]
    channels: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(self.channels, self.size)(x)
        for _ in range(4):
            x = x + self.block(x)
        return nn.Dense(10)(x.mean(range(1, x.ndim - 1)))


def depthwise(x: Any) -> Any:
    """ConvNeXt's block: 7x7 on each channel, then two products of a pixel's channels."""
    n = x.shape[-1]
    y = nn.LayerNorm()(nn.Conv(n, (7, 7), feature_group_count=n)(x))
    return nn.Dense(n)(nn.gelu(nn.Dense(4 * n)(y)))


def grouped(x: Any) -> Any:
    """ResNeXt's 3x3 convolution of 8 groups, between two of single pixels."""
    n, norm = x.shape[-1], lambda x: nn.BatchNorm(False)(x)
    y = nn.relu(norm(nn.Conv(n, (1, 1))(x)))
    y = nn.relu(norm(nn.Conv(n, (3, 3), feature_group_count=8)(y)))
    return norm(nn.Conv(n, (1, 1))(y))


def volume(x: Any) -> Any:
    """A 3x3x3 convolution."""
    return nn.relu(nn.Conv(x.shape[-1], (3, 3, 3))(x))


BATCH, CLASSES, EVERY = 128, 100, 1000
RATE = 0.01  # so that hundreds of steps on one batch stay finite
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vgg": (lambda: VGG16(CLASSES), (32, 32, 3)),
    "resnet": (lambda: ResNet(56, CLASSES), (32, 32, 3)),
    "mlp": (lambda: MLP((4096, 4096), 10), (1024,)),
    "depthwise": (lambda: Stack(depthwise, (3, 3), 96), (16, 16, 3)),
    "groups": (lambda: Stack(grouped, (3, 3), 128), (16, 16, 3)),
    "volume": (lambda: Stack(volume, (3, 3, 3), 32), (12, 12, 12, 3)),
    # Their memory is nothing; they load the code that is also the others'.
    "small cnn": (lambda: ResNet(8, CLASSES), (32, 32, 3)),
    "small mlp": (lambda: MLP((64, 64), 10), (1024,)),
}
WHOLE = ("vgg", "resnet")  # measured in all variants, and their rewires
NAMES = {
    "vgg": "VGG-16",
    "resnet": "ResNet-56",
    "mlp": "1024-4096-4096-10",
    "depthwise": "4 blocks of ConvNeXt, 96 channels",
    "groups": "4 blocks of ResNeXt, 128 channels in 8 groups",
    "volume": "5 convolutions of 3x3x3, 32 channels",
}
METHODS = {
    "GSE-GraBo": ("gse", {}),
    "GSE-GraEst": ("gse", {"heuristic": "graest"}),
    "RigL, streamed": ("rigl", {"growth_memory": "streamed"}),
}
DENSE = ("plain", "torch", "torch, channels last")
VARIANTS = ("sparse", "sparse, not fused", "masked", *DENSE)


class Case(NamedTuple):
    """One program: a "step" or a "rewire" of a variant of a network."""

    model: str
    variant: str
    sparsity: float = 0.0
    method: str = "GSE-GraBo"
    what: str = "step"

    @property
    def small(self) -> Case:
        """The same of a network of the kind whose memory is nothing."""
        model = "small mlp" if self.model == "mlp" else "small cnn"
        return self._replace(model=model, sparsity=0.9)


class Program(NamedTuple):
    """How to build it and what it takes.

    build    () -> (state, *batch) -> (state, what it tells), all that compiles
    begin    () -> (state, *batch), new
    sizes    state -> (parameters, those of layers, bytes of the latter's state)
    """

    build: Callable[[], Callable[..., tuple]]
    begin: Callable[[], tuple[Any, ...]]
    sizes: Callable[[Any], tuple[int, int, int]]


def program_of(case: Case) -> Program:
    """The case's. Raises: ImportError without PyTorch."""
    if case.variant.startswith("torch"):
        return torch_program(case)
    return plain_program(case) if case.variant == "plain" else sparse_program(case)


def batch_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images (B, ...) and labels (B,)."""
    size = 8 if case.model.startswith("small") else BATCH
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, *MODELS[case.model][1]), np.float32)
    return images, rng.integers(10, size=size, dtype=np.int32)


def network(case: Case) -> dst.Network:
    """The case's model as it is in `dst.models`, unmodified."""
    build, shape = MODELS[case.model]
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    execution = "sparse" if "sparse" in case.variant else "masked"
    return dst.network(
        build(), example, train=False, execution=execution, fuse="fused" not in case.variant
    )


def sgd() -> Any:
    """The optimizer of a run, at one rate."""
    return optimizer(default(), lambda step: RATE)


# ------------------------------------------------------------------------------------ the variants
def sparse_program(case: Case) -> Program:
    """`dst`'s own step or rewire, in sparse or masked execution."""
    name, options = METHODS[case.method]
    net, tx = network(case), sgd()
    method = dst.method(name, case.sparsity, every=EVERY, **options)

    def begin() -> tuple[Any, ...]:
        state = dst.init_state(net, tx, method, jax.random.key(0))
        batch = jax.tree.map(lambda a: jnp.array(a[None]), batch_of(case))
        rest = ({},) if case.what == "rewire" else ()
        return state.replace(step=jnp.int32(EVERY)), batch, *rest  # the first rewire: the largest

    shapes = measure.shapes(begin()[:2])
    return Program(lambda: measure.program(net, tx, method, case.what, shapes), begin, held_sparse)


def held_sparse(state: Any) -> tuple[int, int, int]:
    """See `Program.sizes`: values, structure and momentum of the sparse layers."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if isinstance(state.masks, Arena):
        K = state.masks.column.size
        return count, K, 3 * 4 * K + state.masks.pointer.nbytes
    possible = sum(mask.size for mask in state.masks.values())
    return count, possible, (4 + 4 + 1) * possible


def plain_program(case: Case) -> Program:
    """Flax and optax alone, dense, with XLA's convolutions; the state is given away, too."""
    step, start = plain(network(case).model, sgd())
    begin = lambda: start(*batch_of(case))  # noqa: E731
    shapes = measure.shapes(begin())
    return Program(lambda: step.lower(*shapes).compile(), begin, held_dense)


def plain(model: nn.Module, tx: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """The step of Flax and optax alone, and (images, labels) -> what it takes first."""
    whole = plain_step(model, tx, lambda call, args, kwargs, _: call(*args, **kwargs))
    step = jax.jit(lambda state, x, y: (whole(*state, x, y), ()), donate_argnums=0)
    initialise = jax.jit(lambda key, x: model.init(key, x, train=False))

    def begin(images: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        x, y = jnp.array(images), jnp.array(labels)
        variables = initialise(jax.random.key(0), x)
        return (variables, tx.init(variables["params"])), x, y

    return step, begin


def held_dense(state: tuple[Any, Any]) -> tuple[int, int, int]:
    """See `Program.sizes`."""
    leaves = jax.tree.leaves(state[0]["params"])
    kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
    return sum(leaf.size for leaf in leaves), kernels, 8 * kernels


def torch_program(case: Case) -> Program:
    """PyTorch's eager step, dense."""
    from experiments.benchmarks import convnet_torch

    builds = {
        "vgg": lambda: convnet_torch.vgg16(CLASSES),
        "resnet": lambda: convnet_torch.resnet(56, CLASSES),
        "small cnn": lambda: convnet_torch.resnet(8, CLASSES),
    }
    build, last = builds[case.model], case.variant != "torch"

    def sizes(state: Any) -> tuple[int, int, int]:
        count, kernels = convnet_torch.sizes(state)
        return count, kernels, 8 * kernels

    begin = lambda: convnet_torch.prepare(build, *batch_of(case), RATE, last)  # noqa: E731
    return Program(lambda: convnet_torch.step, begin, sizes)
