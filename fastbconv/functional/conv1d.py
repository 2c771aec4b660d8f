"""The one-dimensional convolution: one row of the two-dimensional one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbconv import _arguments, _call, activations, kl
from fastbconv.activations import ActivationLike
from fastbconv.estimators import Estimator
from fastbconv.kl import PriorLike

from .conv2d import bayes_conv2d


def as_plane(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: _arguments.PaddingLike,
    dilation: int | Sequence[int],
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(image of one row, filter of one row, geometry) of a one-dimensional convolution."""
    form = _arguments.padding_form(padding, 1)
    geometry = {
        "stride": (1, *_arguments.spatial("stride", stride, 1)),
        "padding": form if isinstance(form, str) else ((0, 0), form),
        "dilation": (1, *_arguments.spatial("dilation", dilation, 1)),
    }
    return input.unsqueeze(-2), weight.unsqueeze(-2), geometry


def bayes_conv1d(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: ActivationLike = None,
    prior: PriorLike = (0.0, 1.0),
    num_samples: int = 1,
    share_input: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    return_kl: bool = False,
    bias_prior: PriorLike = None,
    weight_kl: bool = True,
    scale_floor: float | None = None,
    element_offset: tuple[int, int] = (0, 0),
    estimator: Estimator = "reparameterization",
    row_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""1-d cross-correlation with weights drawn from a mean-field normal posterior.

    Runs the kernels of ``bayes_conv2d`` on images of one row; noise and numbers are theirs.

    Args:
        input: (N, C, L) or (C, L), any strides; (N, L, C) memory is the fast one.
        weight: (K, C/groups, S) posterior mean.
        weight_rho: untransformed scale, like ``weight``; None: a point mass.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.
        stride: int.
        padding: int, ((left, right),), 'valid' or 'same' (TensorFlow's rule).
        dilation: int.
        groups: number of groups.
        activation: as in bayes_conv2d, like all that follows; a function of one's own receives the
            three-dimensional output.
        prior: see there; tensors broadcast to (K, C/groups, S).
        num_samples: see there.
        share_input: see there.
        seed: see there.
        generator: see there.
        return_kl: see there.
        bias_prior: see there.
        weight_kl: see there.
        scale_floor: see there.
        element_offset: see there.
        estimator: see there.
        row_offset: see there.

    Shape:
        output: (rows, K, L_out).

    Returns:
        The output, or (output, kl), kl in nats.

    Raises:
        ValueError: a shape or value that does not fit.
        TypeError: a type or dtype that does not fit.

    Example:
        >>> x, loc = torch.randn(2, 3, 16), torch.zeros(4, 3, 5)
        >>> tuple(bayes_conv1d(x, loc, loc - 3.0, padding="same", stride=2).shape)
        (2, 4, 8)
    """
    resolved = activations.resolve(activation, channel_dim=-2)
    input, unbatched = _arguments.batched_image(input, num_samples, rank=1)
    _arguments.conv_tensors(input, weight, weight_rho, bias, bias_rho, groups, rank=1)
    input, plane, geometry = as_plane(input, weight, stride, padding, dilation)
    result = bayes_conv2d(
        input,
        plane,
        None if weight_rho is None else weight_rho.unsqueeze(2),
        bias,
        bias_rho,
        **geometry,
        groups=groups,
        activation=resolved if resolved.fn is None else None,
        prior=kl.map_prior(kl.resolve_prior(prior), weight, lambda value: value.unsqueeze(-2)),
        num_samples=num_samples,
        share_input=share_input,
        seed=seed,
        generator=generator,
        return_kl=return_kl,
        bias_prior=bias_prior,
        weight_kl=weight_kl,
        scale_floor=scale_floor,
        element_offset=element_offset,
        estimator=estimator,
        row_offset=row_offset,
    )
    output, total = result if return_kl else (result, None)
    output = _call.reshaped(output, (*output.shape[:2], output.shape[3]))
    output = output.squeeze(0) if unbatched else output
    if resolved.fn is not None:
        output = resolved.fn(output)
    return output if total is None else (output, total)
