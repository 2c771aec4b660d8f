"""The linear map: a convolution of one pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbconv import _arguments, _call, activations, estimators, kl
from fastbconv.activations import ActivationLike
from fastbconv.estimators import Estimator
from fastbconv.kl import PriorLike


def as_filter(weight: Tensor | None) -> Tensor | None:
    """(..., K, C) as (..., K, C, 1, 1)."""
    return None if weight is None else weight[..., None, None]


def bayes_linear(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
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
    r"""activation(x w_s^T + bias_s) with weights drawn from a mean-field normal posterior.

    Args:
        input: (..., in_features); the first dimension is the one that ``num_samples`` divides.
        weight: (out_features, in_features) posterior mean.
        weight_rho: untransformed scale, like ``weight``, or None.
        bias: (out_features,), or None.
        bias_rho: untransformed scale of the bias, or None.
        activation: as in bayes_conv2d; "softmax" is over the last dimension.
        prior: as in bayes_conv2d; tensors broadcast to (out_features, in_features).
        num_samples: as in bayes_conv2d.
        share_input: as in bayes_conv2d.
        seed: as in bayes_conv2d.
        generator: as in bayes_conv2d.
        return_kl: also return the KL: a plain sum in nats.
        bias_prior: like ``prior``, for the bias.
        weight_kl: False leaves the weight out of the KL.
        scale_floor: as in bayes_conv2d.
        element_offset: as in bayes_conv2d.
        estimator: as in bayes_conv2d. The rows of Flipout's signs and of local noise are those of
            the input seen as (rows, in_features).
        row_offset: as in bayes_conv2d.

    Shape:
        output: (..., out_features), the first dimension num_samples times as long with
        ``share_input``.

    Returns:
        The output, or (output, kl).

    Raises:
        ValueError: a shape or value that does not fit.
        TypeError: a type or dtype that does not fit.

    Example:
        >>> loc = torch.zeros(4, 3)
        >>> tuple(bayes_linear(torch.ones(5, 3), loc, loc, num_samples=2, share_input=True).shape)
        (10, 4)
    """
    resolved = activations.resolve(activation, channel_dim=-1)
    _arguments.tensor("input", input)
    _arguments.linear_tensors(input, weight, weight_rho, bias, bias_rho)
    if input.ndim == 1 and num_samples != 1:
        raise ValueError(f"num_samples: expected 1 for an input without rows, got {num_samples}")
    if not share_input and input.ndim > 1:
        _arguments.rows(input, num_samples)
    flat = input.reshape(-1, weight.shape[1], 1, 1)
    output, total = _call.run(
        flat,
        (as_filter(weight), as_filter(weight_rho), bias, bias_rho),
        (
            kl.map_prior(kl.resolve_prior(prior if weight_kl else None), weight, as_filter),
            kl.resolve_prior(bias_prior, "bias_prior"),
        ),
        resolved,
        (seed, generator),
        num_samples=num_samples,
        share_input=share_input,
        return_kl=return_kl,
        scale_floor=scale_floor,
        element_offset=element_offset,
        estimator=estimators.check(estimator),
        row_offset=row_offset,
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
    )
    lead = list(input.shape[:-1])
    if share_input and lead:
        lead[0] *= num_samples
    output = _call.reshaped(output, (*lead, weight.shape[0]))
    if resolved.fn is not None:
        output = resolved.fn(output)
    return (output, total) if return_kl else output
