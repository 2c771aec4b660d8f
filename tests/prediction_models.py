"""What the tests of predict run on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import models
from fastbconv.testing import assert_same

FIELDS = ("mean", "variance", "entropy", "expected_entropy", "mutual_information", "samples")


def convolutional(classes: int = 5) -> nn.Sequential:
    """Convolutions, batch norm, dropout and a linear head, with functions that differ."""
    model = nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu"),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        fb.BayesConv2d(4, 8, 3),
        nn.Flatten(),
        fb.BayesLinear(128, classes, bayesian_bias=True),
    )
    with torch.no_grad():
        for layer in models.bayesian_layers(model):
            layer.weight_rho += 2.0
    return model


def segmentation() -> nn.Sequential:
    """Logits for every pixel."""
    first = fb.BayesConv2d(3, 8, 3, padding=1, activation="relu")
    return nn.Sequential(first, fb.BayesConv2d(8, 4, 3, padding=1))


def images(n: int = 7) -> Tensor:
    """Noise."""
    return torch.randn(n, 3, 8, 8)


def wide(layer: nn.Module) -> nn.Module:
    """A layer whose functions differ."""
    with torch.no_grad():
        layer.weight_rho += 2.0
    return layer


def logits(output: Tensor) -> Tensor:
    """As likelihood: the output itself."""
    return output


def separately(model: nn.Module, x: Tensor, num_samples: int, seed: int = 0) -> Tensor:
    """(num_samples, N, ...) outputs, one pass for each function."""
    outputs = []
    for sample in range(num_samples):
        with torch.no_grad(), fb.fixed_sample(model, seed, sample=sample):
            outputs.append(model(x))
    return torch.stack(outputs)


def assert_same_prediction(one: fb.Prediction, other: fb.Prediction) -> None:
    """Every figure, bit for bit."""
    for name in FIELDS:
        if getattr(one, name) is not None:
            assert_same(getattr(one, name), getattr(other, name), name)
