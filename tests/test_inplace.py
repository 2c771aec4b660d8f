"""In-place functions on a layer's output: right gradients or an error, never wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastbconv as fb

CASES = {
    "linear": (lambda **k: fb.BayesLinear(5, 4, **k), (3, 5)),
    "linear, three axes": (lambda **k: fb.BayesLinear(5, 4, **k), (2, 3, 5)),
    "conv1d": (lambda **k: fb.BayesConv1d(5, 4, 3, **k), (2, 5, 9)),
    "conv2d": (lambda **k: fb.BayesConv2d(5, 4, 3, **k), (2, 5, 9, 9)),
}
# The quick way takes a seed tensor, the long one an int.
SEEDS = {"quick": torch.tensor([7, 0]), "long": 7}


def _gradient(layer: torch.nn.Module, x: Tensor, seed: int | Tensor, inplace: bool) -> Tensor:
    layer.zero_grad()
    y = layer(x, seed=seed)
    if inplace:
        y += 1.0
    else:
        y = y + 1.0
    y.square().sum().backward()
    return layer.weight.grad.clone()


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_a_saved_output_that_was_changed_is_an_error(make, shape, seed) -> None:
    """relu keeps its output for backward."""
    layer, x = make(activation="relu"), torch.randn(shape)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradient(layer, x, seed, inplace=True)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_an_output_that_nobody_saved_may_change(make, shape, seed, activation) -> None:
    """gelu keeps what was before it."""
    layer, x = make(activation=activation), torch.randn(shape)
    expected = _gradient(layer, x, seed, inplace=False)
    assert torch.equal(_gradient(layer, x, seed, inplace=True), expected)


def test_outputs_of_inference_mode_have_no_version() -> None:
    layer = fb.BayesLinear(5, 4, activation="relu")
    with torch.inference_mode():
        y = layer(torch.randn(3, 5))
    assert y.shape == (3, 4)
    assert y.is_inference()
