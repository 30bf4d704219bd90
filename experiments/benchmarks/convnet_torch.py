"""The networks of `dst.models` in PyTorch, and a training step of them as one would write it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dst.models import vgg


def vgg16(classes: int) -> nn.Module:
    """`dst.models.VGG16`."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in vgg.STAGES:
        for wanted in stage:
            convolution = nn.Conv2d(channels, wanted, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)]
            channels = wanted
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(channels, vgg.HIDDEN), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(vgg.HIDDEN, classes))


class Block(nn.Module):
    """`dst.models.resnet.Block`."""

    def __init__(self, before: int, channels: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.stride, self.new = stride, channels - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W)."""
        y = functional.relu(self.norms[0](self.first(x)), inplace=True)
        y = self.norms[1](self.second(y))
        if self.new:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return functional.relu(y + x, inplace=True)


class Mean(nn.Module):
    """Over the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.mean((2, 3))


def resnet(depth: int, classes: int) -> nn.Module:
    """`dst.models.ResNet`."""
    first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    for before, channels in itertools.pairwise((16, 16, 32, 64)):
        for block in range((depth - 2) // 6):
            new = block == 0 and channels > before
            layers.append(Block(before if new else channels, channels, 2 if new else 1))
    return nn.Sequential(*layers, Mean(), nn.Linear(64, classes))


def mlp(inputs: int, hidden: tuple[int, ...], classes: int) -> nn.Module:
    """`dst.models.MLP`."""
    layers: list[nn.Module] = []
    for before, units in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, units), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def prepare(
    build: Callable[[], nn.Module], images: np.ndarray, labels: np.ndarray, rate: float, last: bool
) -> tuple[Any, ...]:
    """Model and optimizer, as one state, and the batch; `last` puts channels last in memory.

    Images (B, H, W, C), labels (B,).
    """
    torch.manual_seed(0)
    return ready(build(), images, labels, rate, last)


def ready(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    rate: float,
    last: bool,
    device: str = "cpu",
) -> tuple[Any, ...]:
    """The same of a model; images of an MLP are rows (B, n)."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.from_numpy(images).to(device)
    if x.dim() == 4:
        model = model.to(memory_format=layout)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    return (model, optimizer), x, torch.from_numpy(labels).long().to(device)


def step(state: tuple, x: torch.Tensor, y: torch.Tensor) -> tuple[tuple, float]:
    """One update of the state: (state, loss)."""
    model, optimizer = state
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return state, loss.item()


def sizes(state: tuple) -> tuple[int, int]:
    """Parameters, and those of them that are weights of layers."""
    parameters = list(state[0].parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.dim() > 1)
