"""The tensors of one row, shared by all columns, and what a column hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Shape

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SCALE = 0.1  # of the posterior, relative to the spread of loc
KL_WEIGHT = 1.0 / 50_000  # the KL's share in the loss: one over the number of examples


class Result(NamedTuple):
    """What one call computed.

    Attributes:
        output: (N, K, H, H).
        kl: 0-dim, or None for a column without.
        grads: gradients of the column's leaves, in their order; empty for a forward pass.
    """

    output: Tensor
    kl: Tensor | None
    grads: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Program:
    """One column on one row: two calls, ready to be timed.

    Attributes:
        forward: a pass without graph.
        step: a pass and the gradients of ``leaves``.
        graph: a pass with graph and without backward, for what is saved.
        leaves: name -> leaf, among input, loc, rho, bias.
        eps: the noise of the last call made after ``torch.manual_seed(seed)``, by that seed;
            (K, C, k, k). None: a column without noise.
        affine: (seed, input, loc, scale) -> the pre-activation without bias of that call, in the
            dtype of its tensors, for an estimator that does not convolve with loc + scale * eps.
        scale_floor: added to softplus(rho).
        right: results that --check compares: "output", "kl", and names of leaves.
        slack: times the error that --check grants everybody: a column that trades it for speed.
    """

    forward: Callable[[], Result]
    step: Callable[[], Result]
    graph: Callable[[], Result]
    leaves: dict[str, Tensor]
    eps: Callable[[int], Tensor] | None
    affine: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None
    scale_floor: float = 0.0
    right: tuple[str, ...] = ("output", "kl", "input", "loc", "rho", "bias")
    slack: float = 1.0


class Buildable(Protocol):
    """A column, as far as a row knows it: columns.Column."""

    @property
    def build(self) -> Callable[[Problem], Program]:
        """Data of a row -> calls."""


class Problem:
    """Data of one row: images, parameters as a fresh layer has them, an incoming gradient."""

    def __init__(self, shape: Shape, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.shape = shape
        spread = (shape.C * shape.k**2) ** -0.5
        self.input = normal(shape.N, shape.C, shape.H, shape.H)
        self.loc = spread * normal(shape.K, shape.C, shape.k, shape.k)
        self.rho = 0.1 * normal(*self.loc.shape) + torch.tensor(SCALE * spread).expm1().log()
        self.bias = 0.1 * normal(shape.K)
        self.grad_output = normal(shape.N, shape.K, shape.H, shape.H)
        self.grad_kl = torch.tensor(KL_WEIGHT)
        self._images: dict[tuple[str, str], Tensor] = {}

    def build(self, column: Buildable) -> Program:
        """The calls of a column."""
        return column.build(self)

    def image(self, name: str, layout: str) -> Tensor:
        """``input`` or ``grad_output`` in a layout; one tensor for all columns."""
        key = (name, layout)
        if key not in self._images:
            value: Tensor = getattr(self, name)
            self._images[key] = value.contiguous(memory_format=FORMATS[layout])
        return self._images[key]

    def leaf(self, name: str, layout: str) -> Tensor:
        """A leaf that asks for a gradient: "input", "loc", "rho" or "bias"."""
        if name == "input":
            value = self.image(name, layout)
        else:
            value = getattr(self, name)
            value = value.contiguous(memory_format=FORMATS[layout]) if value.ndim == 4 else value
        return value.detach().requires_grad_()


Layer = Callable[..., "Tensor | tuple[Tensor, Tensor | None]"]


def program(
    problem: Problem,
    layer: Layer,
    leaves: dict[str, Tensor],
    layout: str,
    eps: Callable[[int], Tensor] | None,
    **more: object,
) -> Program:
    """A column from a function of its leaves.

    Args:
        problem: the row.
        layer: ``layer(*leaves.values())`` -> (output, kl or None).
        leaves: what gradients are asked for.
        layout: of the incoming gradient.
        eps: as in Program.
        more: further fields of Program.
    """
    tensors = tuple(leaves.values())
    grad_output = problem.image("grad_output", layout)

    def forward() -> Result:
        return Result(*layer(*tensors))

    def step() -> Result:
        output, kl = layer(*tensors)
        if kl is None:
            return Result(output, kl, torch.autograd.grad(output, tensors, grad_output))
        incoming = (grad_output, problem.grad_kl)
        return Result(output, kl, torch.autograd.grad((output, kl), tensors, incoming))

    return Program(forward, step, forward, leaves, eps, **more)


def closed_form_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Sum of KL(N(loc, scale^2) || N(0, 1))."""
    return (0.5 * (scale.square() + loc.square()) - scale.log() - 0.5).sum()


def unfused_layer(
    input: Tensor, loc: Tensor, rho: Tensor, bias: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """The layer that anybody writes: the competitor without a library."""
    scale = F.softplus(rho)
    weight = loc + scale * torch.randn_like(loc)
    output = F.relu(F.conv2d(input, weight, bias, padding=padding))
    return output, closed_form_kl(loc, scale)
