"""Comparators, and the tolerance policy of tests and benchmarks.

A result is judged against float64, and by the error that PyTorch itself makes at the same dtype
from the same numbers: at most twice for a forward pass, three times for a gradient. There are no
constants per dtype. A failure names the worst element and both values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, kl, noise, reference

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_same(actual: Tensor, expected: Tensor, name: str = "value") -> None:
    """Equality of shape, dtype and every element (NaN equals NaN).

    Raises:
        AssertionError: with the number of differences, the first index and both values there.
    """
    _assert_like(actual, expected, name)
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    count = int(differs.sum())
    if count:
        index = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {count} of {actual.numel()} elements differ, first at {index}: got "
            f"{actual[index].item()!r}, expected {expected[index].item()!r}"
        )


def assert_close(
    actual: Tensor, expected: Tensor, rtol: float, atol: float, name: str = "value"
) -> None:
    """|actual - expected| <= atol + rtol |expected|, compared in float64.

    Raises:
        AssertionError: with the worst index, both values and the bound there.
    """
    _assert_like(actual, expected, name, dtype=False)
    if actual.numel() == 0:
        return
    got, want = actual.detach().double(), expected.detach().double()
    excess = (got - want).abs() - (atol + rtol * want.abs())
    excess = torch.where(torch.isnan(excess) & (got == want), torch.zeros_like(excess), excess)
    worst = torch.where(torch.isnan(excess), torch.full_like(excess, torch.inf), excess)
    if bool((worst > 0).any()):
        raise AssertionError(
            f"{name}: {_worst(got, want, worst)}, bound {atol:g} + {rtol:g} |expected|"
        )


def assert_ratio(
    actual: Tensor, own: Tensor, exact: Tensor, factor: float, name: str = "value"
) -> None:
    """max |actual - exact| <= factor * max |own - exact|, where ``own`` is PyTorch's result.

    One rounding of the largest value is always granted: nobody can do better.

    Args:
        actual: our result.
        own: PyTorch's result at the same dtype.
        exact: the float64 result.
        factor: FORWARD_FACTOR or GRADIENT_FACTOR.
        name: what the message calls it.

    Raises:
        AssertionError: with both errors, the worst index and both values.
    """
    _assert_like(actual, exact, name, dtype=False)
    if actual.numel() == 0:
        return
    got, want = actual.detach().double(), exact.detach().double()
    error = (got - want).abs()
    own_error = (own.detach().double() - want).abs().max().item()
    unit = torch.finfo(actual.dtype).eps * want.abs().max().item()
    bound = factor * own_error + unit
    if not error.max().item() <= bound:
        raise AssertionError(
            f"{name}: {_worst(got, want, error)}, error {error.max().item():.3g}, PyTorch's own "
            f"{own_error:.3g}, bound {bound:.3g}"
        )


def _assert_like(actual: Tensor, expected: Tensor, name: str, dtype: bool = True) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    if dtype and actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: expected {expected.dtype}, got {actual.dtype}")


def _worst(actual: Tensor, expected: Tensor, badness: Tensor) -> str:
    flat = int(badness.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    return f"worst at {index}: got {actual[index].item()!r}, expected {expected[index].item()!r}"


@dataclass
class ConvArguments:
    """The tensors and numbers of one Bayesian convolution, with everything resolved."""

    input: Tensor
    weight: Tensor
    weight_rho: Tensor | None
    bias: Tensor | None
    bias_rho: Tensor | None
    seed: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str
    num_samples: int
    share_input: bool

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that a gradient is asked for."""
        named = {
            "input": self.input,
            "weight": self.weight,
            "weight_rho": self.weight_rho,
            "bias": self.bias,
            "bias_rho": self.bias_rho,
        }
        return {name: value for name, value in named.items() if value is not None}


def plain_bconv2d(
    arguments: ConvArguments, dtype: torch.dtype, leaves: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The layer as ten lines of PyTorch, consuming the kernels' own noise.

    With float64 it is the yardstick; with the dtype of the input it is what PyTorch itself makes of
    the same numbers. The sampled weight is rounded to the dtype of the input in both. A 16-bit
    convolution is computed as PyTorch means to, summed in float32 and rounded once: on CPU its own
    gives wrong numbers for wide strides and narrow outputs (pytorch/pytorch issues 163347, 169688).

    Args:
        arguments: the call.
        dtype: what convolution and activation are computed in.
        leaves: tensors to use in place of those of ``arguments``, for gradients.
    """
    t = {**arguments.leaves(), **(leaves or {})}
    compute = arguments.input.dtype
    rows = reference._split_rows(t["input"].to(dtype), arguments.num_samples, arguments.share_input)
    top, bottom, left, right = arguments.padding
    outputs = []
    for s, x in enumerate(rows):
        weight = _plain_draw(t["weight"], t.get("weight_rho"), arguments.seed, s, "weight")
        weight = weight + (weight.detach().to(compute).to(weight.dtype) - weight.detach())
        bias = t.get("bias")
        if bias is not None:
            bias = _plain_draw(bias, t.get("bias_rho"), arguments.seed, s, "bias").to(dtype)
        x = F.pad(x, (left, right, top, bottom))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        y = F.conv2d(
            x.to(wide),
            weight.to(dtype).to(wide),
            None if bias is None else bias.to(wide),
            arguments.stride,
            0,
            arguments.dilation,
            arguments.groups,
        )
        outputs.append(y.to(dtype))
    resolved = activations.resolve(arguments.activation, channel_dim=1)
    z = torch.cat(outputs)
    return resolved.fn(z) if resolved.fn else activations.apply(resolved.id, z, resolved.param)


def _plain_draw(loc: Tensor, rho: Tensor | None, seed: Tensor, sample: int, stream: str) -> Tensor:
    if rho is None:
        return loc
    eps = noise.weight_eps(seed, tuple(loc.shape), sample, stream=stream).to(loc.dtype)
    return loc + kl.posterior_scale(rho, kl.default_scale_floor(rho.dtype)) * eps
