"""Sums over many channels: errors next to those of PyTorch, where that multiplies matrices.

With a few images, and in linear layers, PyTorch sums short chains apart. With AVX2 a chunk of ours
was one chain of up to 384 products: the largest error of an input's gradient was three times as
large.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_samples import randn
from torch import Tensor, nn

import fastbconv as fb

Shape = tuple[int, ...]
LINEAR: list[Shape] = [(64, 512, 512), (256, 784, 256), (64, 512, 10), (8, 1024, 1024)]
CONV: list[Shape] = [(1, 64, 8, 64), (1, 256, 8, 256), (2, 96, 6, 130)]
# Root mean square of the output's error, over PyTorch's. The transforms of Winograd round as well,
# which shows where PyTorch multiplies matrices instead of convolving.
ROOT = {"direct": 1.05, "winograd2": 1.25}


def _layer(shape: Shape) -> nn.Module:
    if len(shape) == 3:
        return fb.BayesLinear(*shape[1:])
    return fb.BayesConv2d(shape[1], shape[3], 3, padding=1)


def _gradients(output: Tensor, x: Tensor, incoming: Tensor) -> dict[str, Tensor]:
    (gradient,) = torch.autograd.grad(output, x, incoming.to(output.dtype))
    return {"output": output.detach().double(), "input": gradient.double()}


def _results(shape: Shape, seed: int, algorithm: str) -> list[dict[str, Tensor]]:
    """Output and input gradient: ours, PyTorch's, and in float64."""
    layer = _layer(shape)
    size = shape[:2] if len(shape) == 3 else (*shape[:3], shape[2])
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape, seed=seed))
        layer.bias.copy_(randn(*layer.bias.shape, seed=seed + 1))
    x = randn(*size, seed=seed + 2).requires_grad_()
    with fb.mean_weights(layer), fb.algorithm(algorithm):
        output = layer(x)
    incoming = randn(*output.shape, seed=seed + 3)
    found = [_gradients(output, x, incoming)]
    for dtype in (torch.float32, torch.float64):
        value = x.detach().to(dtype).requires_grad_()
        weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        own = (
            F.linear(value, weight, bias)
            if len(shape) == 3
            else F.conv2d(value, weight, bias, padding=1)
        )
        found.append(_gradients(own, value, incoming))
    return found


def _assert_errors(shape: Shape, algorithm: str) -> None:
    """Over three seeds, as benchmarks/accuracy.py: root mean square and largest."""
    squares: dict[str, list[Tensor]] = {"ours": [], "own": []}
    largest: dict[str, dict[str, float]] = {"output": {}, "input": {}}
    for seed in range(3):
        ours, own, exact = _results(shape, 10 * seed, algorithm)
        for name, found in (("ours", ours), ("own", own)):
            squares[name].append((found["output"] - exact["output"]).square().mean())
            for key, worst in largest.items():
                error = float((found[key] - exact[key]).abs().max())
                worst[name] = max(worst.get(name, 0.0), error)
    root = {name: float(torch.stack(values).mean().sqrt()) for name, values in squares.items()}
    assert root["ours"] <= ROOT[algorithm] * root["own"], root
    assert largest["output"]["ours"] <= 1.5 * largest["output"]["own"], largest
    assert largest["input"]["ours"] <= 2.0 * largest["input"]["own"], largest


@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape: Shape, isa: str) -> None:
    _assert_errors(shape, "direct")


@pytest.mark.parametrize("algorithm", ["direct", "winograd2"])
@pytest.mark.parametrize("shape", CONV, ids=str)
def test_a_few_small_images(shape: Shape, algorithm: str, isa: str) -> None:
    _assert_errors(shape, algorithm)
