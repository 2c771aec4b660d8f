"""The networks: Bayesian, deterministic of the same shape, and a hand-written Bayesian one."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbconv import BayesConv2d, BayesLinear

from .settings import Settings

Kind = Literal["bayesian", "deterministic", "unfused"]
KINDS = ("bayesian", "deterministic", "unfused")
_POOLED = 4  # height and width of what the dense layers read, at most
_SCALE_FLOOR = 2.0**-23


class ConvNet(nn.Module):
    """3x3 convolutions, then two dense layers; every convolution but the first has stride 2.

    Args:
        kind: "bayesian" (this library's layers), "deterministic" (torch's), or "unfused" (the
            Bayesian layer as one writes it by hand, for the comparison of step times).
        image_shape: (C, H, W) of an image.
        num_classes: of the output.
        settings: channels, hidden, prior_scale and initial_scale are read.

    Shape:
        input (N, C, H, W) float32; output (N, num_classes), logits.

    The three kinds draw the same random numbers when they are built, so that after the same
    ``torch.manual_seed`` they start from the same means.
    """

    def __init__(
        self, kind: Kind, image_shape: tuple[int, int, int], num_classes: int, settings: Settings
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        channels, height, width = image_shape
        conv, linear = _layers(kind, settings.prior_scale)
        self.convolutions = nn.ModuleList()
        for index, filters in enumerate(settings.channels):
            stride = 1 if index == 0 else 2
            self.convolutions.append(conv(channels, filters, stride=stride, activation="relu"))
            channels = filters
            height, width = -(-height // stride), -(-width // stride)
        self.pooled = (min(height, _POOLED), min(width, _POOLED))
        self.hidden = linear(
            channels * self.pooled[0] * self.pooled[1], settings.hidden, activation="relu"
        )
        self.last = linear(settings.hidden, num_classes)
        if kind != "deterministic":
            _set_initial_scale(self, settings.initial_scale)

    def forward(self, input: Tensor) -> Tensor:
        """The logits, (N, num_classes)."""
        features = input
        for layer in self.convolutions:
            features = layer(features)
        if features.shape[-2:] != self.pooled:
            features = F.adaptive_avg_pool2d(features, self.pooled)
        return self.last(self.hidden(features.flatten(1)))


def _layers(kind: Kind, prior_scale: float) -> tuple[partial, partial]:
    """Constructors of a convolution and a dense layer with this library's arguments."""
    conv = {"bayesian": BayesConv2d, "deterministic": _Conv2d, "unfused": UnfusedConv2d}[kind]
    linear = {"bayesian": BayesLinear, "deterministic": _Linear, "unfused": UnfusedLinear}[kind]
    prior = {} if kind == "deterministic" else {"prior": (0.0, prior_scale)}
    return partial(conv, kernel_size=3, padding=1, **prior), partial(linear, **prior)


def _set_initial_scale(model: nn.Module, initial_scale: float) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "weight_rho", None), Tensor):
            fan_in = math.prod(module.weight.shape[1:])
            scale = initial_scale / math.sqrt(fan_in)
            nn.init.constant_(module.weight_rho, math.log(math.expm1(scale)))


def weight_decay(model: nn.Module, prior_scale: float) -> Tensor:
    """-log N(weights; 0, prior_scale^2) up to a constant, over what has a prior; 0-dim."""
    weights = [module.weight for module in model.modules() if hasattr(module, "weight")]
    return sum(weight.square().sum() for weight in weights) / (2 * prior_scale**2)


class _Conv2d(nn.Conv2d):
    """torch's convolution, with the activation behind it."""

    def __init__(self, *args: object, activation: str | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return _activate(super().forward(input), self.activation)


class _Linear(nn.Linear):
    """torch's dense layer, with the activation behind it."""

    def __init__(self, *args: object, activation: str | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return _activate(super().forward(input), self.activation)


def _activate(output: Tensor, activation: str | None) -> Tensor:
    return output if activation is None else getattr(F, activation)(output)


class _Unfused:
    """The mean-field posterior in plain tensor operations, as it is usually written by hand."""

    def _add_posterior(self, prior: tuple[float, float]) -> None:
        self.prior = prior
        self.weight_rho = nn.Parameter(torch.full_like(self.weight, -5.0))

    def _draw(self) -> Tensor:
        scale = _SCALE_FLOOR + F.softplus(self.weight_rho)
        return self.weight + scale * torch.randn_like(scale)

    def kl_loss(self) -> Tensor:
        """KL(N(weight, scale^2) || N(prior)), summed, in nats."""
        loc, prior_scale = self.prior
        scale = _SCALE_FLOOR + F.softplus(self.weight_rho)
        ratio = (scale / prior_scale).square()
        shift = ((self.weight - loc) / prior_scale).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum()


class UnfusedConv2d(_Unfused, _Conv2d):
    """A Bayesian convolution written by hand: softplus, randn, multiply, add, conv2d, relu."""

    def __init__(self, *args: object, prior: tuple[float, float], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._add_posterior(prior)

    def forward(self, input: Tensor) -> Tensor:
        """Draws the weights and convolves."""
        return _activate(self._conv_forward(input, self._draw(), self.bias), self.activation)


class UnfusedLinear(_Unfused, _Linear):
    """A Bayesian dense layer written by hand."""

    def __init__(self, *args: object, prior: tuple[float, float], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._add_posterior(prior)

    def forward(self, input: Tensor) -> Tensor:
        """Draws the weights and multiplies."""
        return _activate(F.linear(input, self._draw(), self.bias), self.activation)


def unfused_kl(model: nn.Module) -> Tensor:
    """Sum of the KL of all hand-written layers; 0-dim."""
    return sum(module.kl_loss() for module in model.modules() if isinstance(module, _Unfused))
