"""Images of one channel, which are in both memory formats."""

from __future__ import annotations

import pytest
import torch

import fastbconv as fb


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_channel_is_in_the_memory_format_of_the_weight(layout) -> None:
    """An image of one channel is in both; PyTorch's convolution, too, asks the weight."""
    x = torch.randn(2, 1, 9, 8).contiguous(memory_format=layout)
    layer = fb.BayesConv2d(1, 5, 3, activation="relu").to(memory_format=layout)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    seed = torch.tensor([3, 0])
    outputs = [layer(x, seed=seed), layer(x, seed=3)]  # the quick way and the long one
    outputs += [torch.compile(layer, backend="aot_eager")(x, seed=seed)]
    for algorithm in ("reference", "library", "direct", "winograd2"):
        with fb.algorithm(algorithm):
            outputs.append(layer(x, seed=seed))
    for y in outputs:
        assert y.stride() == plain.stride()
        torch.testing.assert_close(y, outputs[0])
    grad = x.clone().requires_grad_()
    layer(grad, seed=seed).sum().backward()
    assert grad.grad.shape == x.shape
