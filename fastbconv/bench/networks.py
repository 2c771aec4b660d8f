"""Whole networks for the table: LeNet-5 and ResNet-18 for 32 x 32 images, over any kind of layer.

A kit makes the layers, with the same parameter names in all of them, so that one state serves every
column. ``benchmarks/gpu/networks.py`` has networks for another question: without normalisation, and
with the KL handed from layer to layer, so that they can be captured as CUDA graphs. These here are
what a user trains: batch norm, plain ``forward(input)``, the KL collected from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 10


class Rectifier(nn.Module):
    """relu, in place; or nothing, where the layer before it has done that already.

    Args:
        fused: the layer before has it.
    """

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, input: Tensor) -> Tensor:
        """max(input, 0)."""
        return input if self.fused else F.relu(input, inplace=True)


class Kit:
    """What makes a network's layers; this one makes PyTorch's.

    Attributes:
        fuses_relu: whether ``conv`` and ``linear`` apply the relu that they are told about.
    """

    fuses_relu = False

    def conv(
        self, C: int, K: int, k: int, stride: int, padding: int, bias: bool, relu: bool
    ) -> nn.Module:
        """A k x k convolution; ``relu``: one follows at once."""
        return nn.Conv2d(C, K, k, stride, padding, bias=bias)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map with bias; ``relu``: one follows at once."""
        return nn.Linear(C, K)

    def relu(self, after_affine: bool) -> nn.Module:
        """A relu; ``after_affine``: right after a layer that was told about it."""
        return Rectifier(after_affine and self.fuses_relu)

    def pool(self) -> nn.Module:
        """The maximum of 2 x 2 pixels."""
        return nn.MaxPool2d(2)


class LeNet5(nn.Module):
    """LeNet-5 with relu and max-pooling, for 28 x 28 images of one channel."""

    image = (1, 28, 28)

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.conv1 = kit.conv(1, 6, 5, 1, 2, True, True)
        self.conv2 = kit.conv(6, 16, 5, 1, 0, True, True)
        self.fc1 = kit.linear(400, 120, True)
        self.fc2 = kit.linear(120, 84, True)
        self.fc3 = kit.linear(84, CLASSES, False)
        self.relu, self.pool = kit.relu(True), kit.pool()

    def forward(self, input: Tensor) -> Tensor:
        """Logits."""
        x = self.pool(self.relu(self.conv1(input)))
        x = self.pool(self.relu(self.conv2(x))).flatten(1)
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a sum with the input or its 1 x 1 projection."""

    def __init__(self, kit: Kit, C: int, K: int, stride: int) -> None:
        super().__init__()
        self.conv1 = kit.conv(C, K, 3, stride, 1, False, False)
        self.norm1 = nn.BatchNorm2d(K)
        self.conv2 = kit.conv(K, K, 3, 1, 1, False, False)
        self.norm2 = nn.BatchNorm2d(K)
        self.relu = kit.relu(False)
        self.skip: nn.Module | None = None
        if stride != 1 or C != K:
            self.skip = nn.Sequential(kit.conv(C, K, 1, stride, 0, False, False), nn.BatchNorm2d(K))

    def forward(self, input: Tensor) -> Tensor:
        """relu(path + skip)."""
        x = self.relu(self.norm1(self.conv1(input)))
        x = self.norm2(self.conv2(x))
        return self.relu(x + (input if self.skip is None else self.skip(input)))


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem, no pooling before the first stage."""

    image = (3, 32, 32)

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.stem = kit.conv(3, 64, 3, 1, 1, False, False)
        self.norm, self.relu = nn.BatchNorm2d(64), kit.relu(False)
        blocks, C = [], 64
        for stage in range(4):
            for stride in ((1 if stage == 0 else 2), 1):
                blocks.append(Block(kit, C, 64 << stage, stride))
                C = 64 << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = kit.linear(C, CLASSES, False)

    def forward(self, input: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(self.relu(self.norm(self.stem(input))))
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[Kit], nn.Module]] = {"lenet5": LeNet5, "resnet18": ResNet18}


class Facts(NamedTuple):
    """What a network needs at one batch size.

    Attributes:
        flops: nominal operations of convolutions and linear maps, forward; padded taps count.
        step_flops: forward and backward, without the gradient of the images, which nobody wants.
        weights: elements of the weights of convolutions and linear maps.
        largest: elements of the largest output of a layer.
    """

    flops: int
    step_flops: int
    weights: int
    largest: int


@lru_cache
def facts(name: str, batch: int) -> Facts:
    """Counts, on tensors without data.

    Args:
        name: a key of NETWORKS.
        batch: images.

    Returns:
        What was counted.
    """
    with torch.device("meta"):
        model = NETWORKS[name](Kit())
        image = torch.empty(batch, *NETWORKS[name].image)
    sizes: list[int] = []
    affine = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in affine:
        module.register_forward_hook(lambda _m, _i, output: sizes.append(output.numel()))
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        output = model(image)
        forward = counter.get_total_flops()
        output.sum().backward()
    weights = sum(module.weight.numel() for module in affine)
    return Facts(forward, counter.get_total_flops(), weights, max(sizes))
