"""The two-dimensional transposed convolution: our sampling pass, the library's convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbconv import _arguments, _call, activations, estimators, kl
from fastbconv._arguments import IntPair
from fastbconv.activations import ActivationLike
from fastbconv.estimators import Estimator
from fastbconv.kl import PriorLike


def bayes_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
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
    r"""2-d transposed convolution with weights drawn from a mean-field normal posterior.

    .. code-block:: text

        w_s    = weight + (floor + softplus(weight_rho)) * eps(seed, s)     s < num_samples
        output = activation(conv_transpose2d(input, w_s) + bias_s)
        kl     = sum over elements of KL(N(weight, scale^2) || prior)

    It is the adjoint of the convolution with the same weight, which reads it as (K, C/groups, R,
    S). Noise is numbered as for that convolution: the first dimension, taps, the second, here in
    the order C, R, S, K/groups. ``noise.weight_eps(seed, weight.shape)`` is the eps of the weight.

    The weights and their KL come from our fused sampling pass, the convolution from the library.
    What is saved for backward holds the drawn weight, unlike for convolutions of two dimensions.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        weight: (C, K/groups, R, S) posterior mean.
        weight_rho: untransformed scale, like ``weight``; None: a point mass.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.
        stride: int or pair.
        padding: int or pair: rows and columns taken from each side of the output.
        output_padding: int or pair: rows and columns added to the end of the output; less than
            the stride or the dilation.
        groups: number of groups.
        dilation: int or pair.
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
        output: (rows, K, H_out, W_out), in the memory format of ``input``;
        H_out = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.

    Returns:
        The output, or (output, kl), kl in nats.

    Raises:
        ValueError: a shape or value that does not fit.
        TypeError: a type or dtype that does not fit.

    Example:
        >>> x, loc = torch.randn(1, 3, 8, 8), torch.zeros(3, 2, 4, 4)
        >>> tuple(bayes_conv_transpose2d(x, loc, loc - 3.0, stride=2, padding=1).shape)
        (1, 2, 16, 16)
    """
    resolved = activations.resolve(activation, channel_dim=-3)
    input, unbatched = _arguments.batched_image(input, num_samples)
    _arguments.conv_tensors(input, weight, weight_rho, bias, bias_rho, groups, transposed=True)
    stride, dilation = _arguments.pair("stride", stride), _arguments.pair("dilation", dilation)
    padding = _arguments.pair("padding", padding, 0)
    output_padding = _arguments.pair("output_padding", output_padding, 0)
    _check_extents(input, weight, stride, padding, output_padding, dilation)
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
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
    )
    output = output.squeeze(0) if unbatched else output
    if resolved.fn is not None:
        output = resolved.fn(output)
    return (output, total) if return_kl else output


def least_extents(
    extent: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The extents of the output without ``output_padding``, axis by axis."""
    axes = zip(extent, filter, stride, padding, dilation, strict=True)
    return tuple((size - 1) * s - 2 * p + d * (taps - 1) + 1 for size, taps, s, p, d in axes)


def _check_extents(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    extent, filter = input.shape[2:], weight.shape[2:]
    for axis, added in enumerate(output_padding):
        most = max(stride[axis], dilation[axis]) - 1
        if added > most:
            raise ValueError(
                f"output_padding: expected less than the stride or the dilation, at most {most}, "
                f"got {added}"
            )
    if 0 in extent:
        raise ValueError(f"input: expected an image with pixels, got {tuple(input.shape)}")
    least = least_extents(extent, filter, stride, padding, dilation)
    sizes = tuple(size + added for size, added in zip(least, output_padding, strict=True))
    if min(sizes) < 1:
        raise ValueError(
            f"padding: expected one that leaves an output, got {padding}, which leaves {sizes} "
            f"of an input of {tuple(extent)}"
        )
