"""The three-dimensional convolution: our sampling pass, the library's convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbconv import _arguments, _call, activations, estimators, kl
from fastbconv._arguments import PaddingLike
from fastbconv.activations import ActivationLike
from fastbconv.estimators import Estimator
from fastbconv.kl import PriorLike


def bayes_conv3d(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: PaddingLike = 0,
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
    r"""3-d cross-correlation with weights drawn from a mean-field normal posterior.

    The weights and their KL come from our fused sampling pass, the convolution from the library.
    What is saved for backward holds the drawn weight, unlike in one and two dimensions.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides.
        weight: (K, C/groups, T, R, S) posterior mean.
        weight_rho: untransformed scale, like ``weight``; None: a point mass.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.
        stride: int or three.
        padding: int, three ints, ((front, back), (top, bottom), (left, right)), 'valid' or 'same'
            (TensorFlow's rule).
        dilation: int or three.
        groups: number of groups.
        activation: as in bayes_conv2d, like all that follows.
        prior: see there; tensors broadcast to the weight.
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
        output: (rows, K, D_out, H_out, W_out), in the memory format of ``input``.

    Returns:
        The output, or (output, kl), kl in nats.

    Raises:
        ValueError: a shape or value that does not fit.
        TypeError: a type or dtype that does not fit.

    Example:
        >>> x, loc = torch.randn(1, 2, 4, 6, 6), torch.zeros(3, 2, 3, 3, 3)
        >>> tuple(bayes_conv3d(x, loc, loc - 3.0, padding="same").shape)
        (1, 3, 4, 6, 6)
    """
    resolved = activations.resolve(activation, channel_dim=-4)
    input, unbatched = _arguments.batched_image(input, num_samples, rank=3)
    _arguments.conv_tensors(input, weight, weight_rho, bias, bias_rho, groups, rank=3)
    stride, dilation = (
        _arguments.spatial(name, value, 3)
        for name, value in (("stride", stride), ("dilation", dilation))
    )
    extent, filter = input.shape[2:], weight.shape[2:]
    form = _arguments.padding_form(padding, 3)
    pads = _arguments.resolve_padding(form, extent, filter, stride, dilation)
    _arguments.extents(extent, pads, filter, stride, dilation)
    output, total = _call.run(
        input,
        (weight, weight_rho, bias, bias_rho),
        (
            kl.resolve_prior(prior if weight_kl else None),
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
        stride=stride,
        padding=pads,
        dilation=dilation,
        groups=groups,
    )
    output = output.squeeze(0) if unbatched else output
    if resolved.fn is not None:
        output = resolved.fn(output)
    return (output, total) if return_kl else output
