"""LeNet-5, ResNet-18 for 32 x 32 images and ResNet-50, over any kind of layer.

Plain PyTorch; no normalisation layers, so that what is compared is convolutions, biases,
activations and residual sums: a network with them would spend more time in what is the same for
all. A kit makes the layers: ``conv(C, K, k, stride, padding, relu)`` and ``linear(C, K, relu)``,
modules that are called as ``layer(x, terms)`` and append their KL to ``terms`` if they make one.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Terms = list[Tensor]


class Kit(Protocol):
    """What makes a network's layers."""

    def conv(self, C: int, K: int, k: int, stride: int, padding: int, relu: bool) -> nn.Module:
        """A convolution with bias."""

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map with bias."""


class Network(nn.Module):
    """A network whose ``forward`` gives (output, KL); the KL is None without terms."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output and the sum of what the layers appended."""
        terms: Terms = []
        output = self.body(input, terms)
        return output, torch.stack(terms).sum() if terms else None

    def body(self, input: Tensor, terms: Terms) -> Tensor:
        """The network itself."""
        raise NotImplementedError


class LeNet(Network):
    """LeNet-5 with relu and max-pooling, for 28 x 28 images."""

    def __init__(self, kit: Kit, width: int = 1) -> None:
        super().__init__()
        self.conv1 = kit.conv(1, 6 * width, 5, 1, 2, True)
        self.conv2 = kit.conv(6 * width, 16 * width, 5, 1, 0, True)
        self.fc1 = kit.linear(400 * width, 120, True)
        self.fc2 = kit.linear(120, 84, True)
        self.fc3 = kit.linear(84, 10, False)

    def body(self, input: Tensor, terms: Terms) -> Tensor:
        """Two convolutions, three linear maps."""
        x = F.max_pool2d(self.conv1(input, terms), 2)
        x = F.max_pool2d(self.conv2(x, terms), 2).flatten(1)
        return self.fc3(self.fc2(self.fc1(x, terms), terms), terms)


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with ``expand`` 4."""

    def __init__(self, kit: Kit, C: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        K = width * expand
        if expand == 1:
            path = [kit.conv(C, K, 3, stride, 1, True), kit.conv(K, K, 3, 1, 1, False)]
        else:
            path = [
                kit.conv(C, width, 1, 1, 0, True),
                kit.conv(width, width, 3, stride, 1, True),
                kit.conv(width, K, 1, 1, 0, False),
            ]
        self.path = nn.ModuleList(path)
        self.skip = None
        if stride != 1 or C != K:
            self.skip = kit.conv(C, K, 1, stride, 0, False)

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """relu(path + skip)."""
        x = input
        for layer in self.path:
            x = layer(x, terms)
        return F.relu(x + (input if self.skip is None else self.skip(input, terms)))


class ResNet(Network):
    """A residual network; ``small``: a 3 x 3 first layer and no pooling, for 32 x 32 images."""

    def __init__(
        self, kit: Kit, blocks: tuple[int, ...], expand: int, small: bool, width: int = 64
    ) -> None:
        super().__init__()
        self.small = small
        first = (3, 1, 1) if small else (7, 2, 3)
        self.stem = kit.conv(3, width, *first, True)
        C, listed = width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                listed.append(Block(kit, C, width << stage, stride, expand))
                C = (width << stage) * expand
        self.blocks = nn.ModuleList(listed)
        self.head = kit.linear(C, 10 if small else 1000, False)

    def body(self, input: Tensor, terms: Terms) -> Tensor:
        """Stem, blocks, mean over pixels, linear map."""
        x = self.stem(input, terms)
        if not self.small:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x, terms)
        return self.head(x.mean((2, 3)), terms)


class OneLayer(Network):
    """A single convolution, for the host's time per layer."""

    def __init__(self, kit: Kit, C: int, K: int, k: int) -> None:
        super().__init__()
        self.layer = kit.conv(C, K, k, 1, k // 2, True)

    def body(self, input: Tensor, terms: Terms) -> Tensor:
        """The layer."""
        return self.layer(input, terms)


def make(name: str, kit: Kit, tiny: bool = False) -> Network:
    """A network by name: "lenet", "resnet18", "resnet50" or "layer"; ``tiny`` for dry runs."""
    if name == "lenet":
        return LeNet(kit)
    if name == "resnet18":
        return ResNet(kit, (2, 2, 2, 2), 1, True, 2 if tiny else 64)
    if name == "resnet50":
        return ResNet(kit, (1, 1, 1, 1) if tiny else (3, 4, 6, 3), 4, False, 2 if tiny else 64)
    if name == "layer":
        return OneLayer(kit, *((3, 4, 3) if tiny else (64, 64, 3)))
    raise ValueError(f"network: expected lenet, resnet18, resnet50 or layer, got {name}")


def image(name: str, batch: int, device: torch.device, tiny: bool = False) -> Tensor:
    """A random input, channels_last."""
    C, side = {"lenet": (1, 28), "resnet18": (3, 32), "resnet50": (3, 224), "layer": (64, 8)}[name]
    if tiny:
        C, side = (3 if name == "layer" else C), {28: 28, 32: 16, 224: 32, 8: 8}[side]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, C, side, side, generator=draw).to(device)
    return x.contiguous(memory_format=torch.channels_last)
