"""Sums over many channels: errors next to those of float32 sums in chains of a known length.

A chunk of ours was once one chain of up to 384 products: in linear layers, and with a few images,
where PyTorch sums short chains apart, the largest error of an input's gradient was three times
PyTorch's. What PyTorch does depends on the machine, so the sums it is compared with are made here.
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
CHAIN = 96  # products, the longest of any instruction set
# Root mean square of an error over that of such sums. The transforms of Winograd round as well.
ROOT = {"direct": 1.15, "winograd2": 2.0, "winograd2x4": 3.0}
LARGEST = {"direct": 2.0, "winograd2": 2.5, "winograd2x4": 4.0}


def _layer(shape: Shape) -> nn.Module:
    if len(shape) == 3:
        return fb.BayesLinear(*shape[1:])
    return fb.BayesConv2d(shape[1], shape[3], 3, padding=1)


def _in_chains(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ columns`` in float32 by multiply-adds, each chain of CHAIN products by itself."""
    total = torch.zeros(len(rows), columns.shape[1])
    for start in range(0, len(columns), CHAIN):
        chain = torch.zeros_like(total)
        for i in range(start, min(start + CHAIN, len(columns))):
            product = rows[:, i : i + 1].double() * columns[i].double()
            chain = (chain.double() + product).float()
        total += chain
    return total


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In chains: a linear layer (weight (K, C)), or 3x3 filters with padding 1."""
    rows = x if weight.ndim == 2 else F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    found = _in_chains(rows, weight.flatten(1).T)
    if bias is not None:
        found = found + bias
    if weight.ndim == 2:
        return found
    return found.unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    return F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias, padding=1)


def _errors(shape: Shape, seed: int, algorithm: str) -> dict[str, dict[str, Tensor]]:
    """Of the output and of the input's gradient: ours, and those of sums in chains."""
    layer = _layer(shape)
    size = shape[:2] if len(shape) == 3 else (*shape[:3], shape[2])
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape, seed=seed))
        layer.bias.copy_(randn(*layer.bias.shape, seed=seed + 1))
    x = randn(*size, seed=seed + 2).requires_grad_()
    with fb.mean_weights(layer), fb.algorithm(algorithm):
        output = layer(x)
    incoming = randn(*output.shape, seed=seed + 3)
    (gradient,) = torch.autograd.grad(output, x, incoming)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    back = weight.transpose(0, 1)  # the gradient is a convolution with the filters turned round
    back = back.contiguous() if back.ndim == 2 else back.flip(2, 3)
    found = {}
    for name, got, problem in (
        ("output", output.detach(), (x.detach(), weight, bias)),
        ("input", gradient, (incoming, back, None)),
    ):
        exact = _exact(*problem)
        found[name] = {"ours": got - exact, "chains": _convolved(*problem) - exact}
    return found


def _assert_errors(shape: Shape, algorithm: str) -> None:
    """Over three seeds: root mean square and largest."""
    found = [_errors(shape, 10 * seed, algorithm) for seed in range(3)]
    for name in ("output", "input"):
        ours = torch.stack([errors[name]["ours"] for errors in found])
        chains = torch.stack([errors[name]["chains"] for errors in found])
        root = float(ours.square().mean().sqrt() / chains.square().mean().sqrt())
        assert root <= ROOT[algorithm], name
        assert float(ours.abs().max() / chains.abs().max()) <= LARGEST[algorithm], name


@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape: Shape, isa: str) -> None:
    _assert_errors(shape, "direct")


@pytest.mark.parametrize("algorithm", list(ROOT))
@pytest.mark.parametrize("shape", CONV, ids=str)
def test_a_few_small_images(shape: Shape, algorithm: str, isa: str) -> None:
    _assert_errors(shape, algorithm)
