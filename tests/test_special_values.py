"""NaN and infinite values go where they go in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbconv as fb

ACTIVATIONS = {
    "relu": F.relu,
    "elu": F.elu,
    "selu": F.selu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)  # of relu6 torch's vectors give 0, its tails 1
def test_derivatives_at_nan(name: str, dtype: torch.dtype, algorithm: str) -> None:
    """relu's is 1, as in torch: a loss that is NaN must not look like one with gradient 0.

    64 pixels: torch's vectors, in which elu and selu differ from its scalar tails.
    """
    layer = fb.BayesConv2d(1, 1, 1, activation=name, dtype=dtype)
    x = torch.zeros(1, 1, 1, 64, dtype=dtype)
    x[..., 0] = float("nan")
    for weight in (lambda y: y.sum(), lambda y: y.square().sum()):
        with fb.algorithm(algorithm):
            (got,) = torch.autograd.grad(weight(layer(x, seed=1)[..., 0]), layer.bias)
        pre = (x + layer.bias.view(1, 1, 1, 1)).detach().requires_grad_()
        (expected,) = torch.autograd.grad(weight(ACTIVATIONS[name](pre)[..., 0]), pre)
        torch.testing.assert_close(got, expected[..., 0].view(1), equal_nan=True)


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2", "winograd2x4"])
def test_infinite_pixels_reach_the_same_outputs(algorithm: str) -> None:
    """Winograd may turn an infinity into NaN; the outputs that are finite stay as they were."""
    layer = fb.BayesConv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 12, 12)
    with fb.algorithm(algorithm), torch.no_grad():
        clean = layer(x, seed=1)
        x[0, 3, 5, 6] = float("inf")
        y = layer(x, seed=1)
    reached = torch.zeros(2, 64, 12, 12, dtype=torch.bool)
    reached[0, :, 4:7, 5:8] = True
    touched = reached.clone()
    if algorithm != "direct":  # whole tiles, of 2 x 2 or of 2 x 4
        touched[0, :, 4:8, 4:8] = True
    assert not torch.isfinite(y[reached]).any()
    assert torch.equal(y[~touched], clean[~touched])
