"""Images of one channel, which are in both memory formats."""

from __future__ import annotations

import pytest
import torch

import fastbconv as fb


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_channel_is_in_the_memory_format_of_the_weight(layout, size: int) -> None:
    """An image of one channel is in both; PyTorch's convolution, too, asks the weight, which tells
    nothing where a filter has one tap."""
    x = torch.randn(2, 1, 9, 8).contiguous(memory_format=layout)
    layer = fb.BayesConv2d(1, 5, size, activation="relu").to(memory_format=layout)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    seed = torch.tensor([3, 0])
    outputs = [layer(x, seed=seed), layer(x, seed=3)]  # the quick way and the long one
    outputs += [torch.compile(layer, backend="aot_eager")(x, seed=seed)]
    winograd = ["winograd2", "winograd2x4"] if size == 3 else []
    for algorithm in ("reference", "library", "direct", *winograd):
        with fb.algorithm(algorithm):
            outputs.append(layer(x, seed=seed))
    for y in outputs:
        assert y.stride() == plain.stride()
        torch.testing.assert_close(y, outputs[0])
    grad = x.clone().requires_grad_()
    layer(grad, seed=seed).sum().backward()
    assert grad.grad.shape == x.shape


@pytest.mark.parametrize("size", [1, 3])
def test_sequences_of_one_channel_stay_contiguous(size: int) -> None:
    x, layer, seed = torch.randn(2, 1, 6), fb.BayesConv1d(1, 8, size), torch.tensor([3, 0])
    for y in (layer(x, seed=seed), layer(x, seed=3)):
        assert y.is_contiguous()
