"""The initial scale, 0.1 / sqrt(fan_in): a deep network carries its noise without growing it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import models

DEPTH = 18


def _conv(channels: int, filters: int, stride: int, estimator: str) -> fb.BayesConv2d:
    """A convolution with He's gain for relu, which keeps the mean square of what it passes on."""
    layer = fb.BayesConv2d(
        channels, filters, 3, stride, padding=1, bias=False, activation="relu", estimator=estimator
    )
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def plain(estimator: str) -> nn.Module:
    """Eighteen convolutions, one after the other."""
    sides = [3, *[32] * DEPTH]
    return nn.Sequential(*(_conv(c, k, 1, estimator) for c, k in itertools.pairwise(sides)))


class Block(nn.Module):
    """Two convolutions beside a shortcut, and the mean of both: without normalisation a sum would
    double the variance at every block."""

    def __init__(self, channels: int, filters: int, stride: int, estimator: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, filters, stride, estimator), _conv(filters, filters, 1, estimator)
        )
        self.shortcut = nn.Identity()
        if channels != filters:
            self.shortcut = _conv(channels, filters, stride, estimator)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)) * 0.5**0.5


def residual(estimator: str) -> nn.Module:
    """ResNet-18 for small images, without normalisation."""
    blocks, channels = [], 16
    for stage, filters in enumerate((16, 24, 32, 48)):
        blocks.append(Block(channels, filters, 2 if stage else 1, estimator))
        blocks.append(Block(filters, filters, 1, estimator))
        channels = filters
    return nn.Sequential(_conv(3, 16, 1, estimator), *blocks)


@pytest.mark.parametrize("make", [plain, residual])
@pytest.mark.parametrize("estimator", ["reparameterization", "flipout"])
def test_noise_leaves_the_variance_of_a_deep_network(
    make: Callable[[str], nn.Module], estimator: str
) -> None:
    """At every layer the variance over draws, images and pixels is within 2x of the deterministic
    network's, which has the same means."""
    model = make(estimator)
    layers = models.bayesian_layers(model)
    assert len(layers) >= DEPTH - 1
    variances: dict[bool, Tensor] = {}
    x = torch.randn(4, 3, 16, 16)
    for noisy in (False, True):
        outputs: list[list[Tensor]] = [[] for _ in layers]
        hooks = [
            layer.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y))
            for layer, kept in zip(layers, outputs, strict=True)
        ]
        with torch.no_grad():
            for _ in range(8 if noisy else 1):
                if noisy:
                    model(x)
                else:
                    with fb.mean_weights(model):
                        model(x)
        for hook in hooks:
            hook.remove()
        variances[noisy] = torch.stack([torch.cat(kept).var() for kept in outputs])
    ratio = variances[True] / variances[False]
    assert ratio.min() > 0.5, ratio
    assert ratio.max() < 2.0, ratio
    assert (ratio - 1).abs().max() > 1e-3  # the noise is there
