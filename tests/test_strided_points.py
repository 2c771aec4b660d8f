"""Filters of one tap with a stride over few channels: a bug of oneDNN that writes past its memory.

uxlfoundation/oneDNN issue 6035: nn.Conv2d itself corrupts the heap there, now and then, in its
weight gradient where channels come last. Nothing here may hand such a problem over as it is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastbconv as fb
from fastbconv.testing import assert_close

PROGRAM = """
import sys, torch, fastbconv as fb
with fb.algorithm(sys.argv[1]):
    for _ in range(30):
        for channels, stride in ((3, 2), (4, (3, 1)), (7, (1, 2)), (12, 4)):
            layer = fb.BayesConv2d(channels, 5, 1, stride=stride)
            x = torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)
            layer(x).sum().backward()
print("survived")
"""


@pytest.mark.parametrize("algorithm", ["auto", "library", "reference"])
def test_the_heap_stays_whole(algorithm: str) -> None:
    command = [sys.executable, "-c", PROGRAM, algorithm]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["survived"], (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("padding", [0, 1, ((0, 1), (2, 0))])
@pytest.mark.parametrize("stride", [2, (1, 3), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("algorithm", ["library", "reference"])
def test_gradients(algorithm: str, groups: int, stride, padding) -> None:
    torch.manual_seed(0)
    layer = fb.BayesConv2d(6, 4, 1, stride=stride, padding=padding, groups=groups)
    x = torch.randn(3, 6, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for name in (algorithm, "direct"):
        with fb.algorithm(name):
            y = layer(x, seed=7, num_samples=3)
        by = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.weight_rho, layer.bias))
        results.append((y, *by))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, 1e-5, 1e-6)
