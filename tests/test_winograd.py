"""Winograd's ways through a call: many weights, many tiles, either memory format, with signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbconv as fb
from fastbconv import functional as f

# N, C, H, W, K, padding. With packed weights above 8 MB up to 528 tiles are transformed first; 130
# filters and 70 channels make several blocks, 216 tiles several groups.
SIZES = {
    "many-weights": (2, 520, 7, 5, 264, 1),
    "many-tiles": (3, 70, 18, 15, 130, (1, 2)),
    "many-of-both": (9, 520, 16, 17, 264, 1),
    "one-tile-images": (66, 528, 2, 2, 260, 1),
    "no-padding": (2, 264, 6, 9, 520, 0),
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _leaves(size: tuple[Any, ...], layout: torch.memory_format) -> tuple[Tensor, ...]:
    n, c, h, w, k, _ = size
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).contiguous(memory_format=layout)
    loc = torch.randn(k, c, 3, 3).contiguous(memory_format=layout) / (9 * c) ** 0.5
    leaves = (x, loc, torch.full_like(loc, -3.0), torch.randn(k))
    return tuple(leaf.requires_grad_() for leaf in leaves)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, padding: Any, grad: Tensor) -> list[Tensor]:
    """Output and gradients of PyTorch's convolution in the dtype of its arguments."""
    leaves = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(*leaves, padding=padding)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _largest_errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(a.double() - b).abs().max().item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_errors_are_no_larger_than_twice_pytorchs(
    size: tuple[Any, ...], layout: torch.memory_format
) -> None:
    leaves = _leaves(size, layout)
    x, loc, rho, bias = leaves
    weight = f.sample_posterior(loc, rho, seed=7)[0].detach()
    grad = torch.randn_like(F.conv2d(x, weight, bias, padding=size[-1])).detach()
    double = (t.double() for t in (x, weight, bias))
    exact = _plain(*double, size[-1], grad.double())
    theirs = [  # PyTorch sums in another order in either format: the worse of the two
        max(pair)
        for pair in zip(
            *(
                _largest_errors(
                    _plain(x.contiguous(memory_format=form), weight, bias, size[-1], grad), exact
                )
                for form in FORMATS.values()
            ),
            strict=True,
        )
    ]
    with fb.algorithm("winograd2"):
        y = f.bayes_conv2d(*leaves, padding=size[-1], seed=7)
        ours = [y.detach(), *torch.autograd.grad(y, (x, loc, bias), grad)]
    for name, error, bar in zip(
        ["output", "x", "loc", "bias"], _largest_errors(ours, exact), theirs, strict=True
    ):
        assert error <= 2.0 * bar, (name, error, bar)


@pytest.mark.parametrize("estimator", ["reparameterization", "flipout"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_memory_format_changes_no_bit(size: tuple[Any, ...], estimator: Any) -> None:
    results = []
    for layout in FORMATS.values():
        leaves = _leaves(size, layout)
        with fb.algorithm("winograd2"):
            y, kl = f.bayes_conv2d(
                *leaves,
                padding=size[-1],
                seed=7,
                activation="silu",
                estimator=estimator,
                return_kl=True,
            )
            grads = torch.autograd.grad(y.square().sum() + kl, leaves)
        results.append([y, kl, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_signs_agree_with_two_convolutions(size: tuple[Any, ...]) -> None:
    leaves = _leaves(size, torch.channels_last)
    results = []
    for name in ("winograd2", "reference"):
        with fb.algorithm(name):  # type: ignore[arg-type]
            y = f.bayes_conv2d(*leaves, padding=size[-1], seed=7, estimator="flipout")
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
