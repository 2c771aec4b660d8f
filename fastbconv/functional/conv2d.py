"""The two-dimensional convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbconv import _arguments, _call, activations, estimators, kl
from fastbconv._arguments import IntPair, PaddingLike
from fastbconv.activations import ActivationLike
from fastbconv.estimators import Estimator
from fastbconv.kl import PriorLike


def bayes_conv2d(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: PaddingLike = 0,
    dilation: IntPair = 1,
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
    r"""2-d cross-correlation with weights drawn from a mean-field normal posterior.

    .. code-block:: text

        w_s    = weight + (floor + softplus(weight_rho)) * eps(seed, s)     s < num_samples
        output = activation(conv2d(input, w_s) + bias_s)
        kl     = sum over elements of KL(N(weight, scale^2) || prior)

    C. Blundell, J. Cornebise, K. Kavukcuoglu, D. Wierstra, "Weight uncertainty in neural networks",
    ICML 2015 (arXiv:1505.05424); the other estimators have theirs in fastbconv.estimators.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, bfloat16, float16, or float64.
        weight: (K, C/groups, R, S) posterior mean; float32, or float64 with a float64 input.
        weight_rho: untransformed scale, like ``weight``; None: a point mass, no noise and no KL.
        bias: (K,) mean of the bias, or None.
        bias_rho: untransformed scale of the bias; None: the bias is a point mass.
        stride: int or pair.
        padding: int, pair, ((top, bottom), (left, right)), 'valid', or 'same' (TensorFlow's rule:
            the odd zero goes to the end; any stride).
        dilation: int or pair.
        groups: number of groups.
        activation: name, function or module; see fastbconv.activations.
        prior: (loc, scale), each a float, a tensor that broadcasts to the weight, or a Parameter;
            a ScaleMixture; a function that returns a torch distribution (both give a Monte-Carlo KL
            of the weights in use); None: no KL of the weight.
        num_samples: weight draws S. The rows are S equal consecutive groups; draw s serves group s.
        share_input: every draw reads all N rows; the output has S * N rows, sample-major.
        seed: int ``n``, meaning (n, 0), or an int64 tensor (2,); None draws one from ``generator``.
        generator: where a seed is drawn from; None: PyTorch's default generator.
        return_kl: also return the KL: a plain sum in nats.
        bias_prior: like ``prior``, for the bias; None: no KL of the bias.
        weight_kl: False leaves the weight out of the KL.
        scale_floor: added to softplus(rho); None: 2^-23 (2^-52 for float64).
        element_offset: noise numbers of the first weight and bias element, for a shard.
        estimator: 'reparameterization', or 'flipout' (a weight of its own for every row, from sign
            flips of one draw) or 'local' (the pre-activations are drawn, entry by entry); see
            fastbconv.estimators. Without ``weight_rho`` they are the same.
        row_offset: number of the first row, for a shard of a batch: the signs of flipout and the
            noise of local are numbered by row.

    Shape:
        output: (rows, K, H_out, W_out), rows = num_samples * N with ``share_input``, else N; in the
        memory format of ``input`` (of ``weight``, for the one channel that has both).

    Returns:
        The output in the dtype of ``input`` (of autocast, inside it); with ``return_kl`` the pair
        (output, kl), kl 0-dim in the dtype of the parameters. Differentiable by input, weight,
        weight_rho, bias, bias_rho and by prior tensors.

    Raises:
        ValueError: a shape or value that does not fit.
        TypeError: a type or dtype that does not fit.

    Example:
        >>> x, loc = torch.randn(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
        >>> y, kl = bayes_conv2d(x, loc, loc - 3.0, padding=1, seed=0, return_kl=True)
        >>> tuple(y.shape)
        (2, 4, 8, 8)
    """
    resolved = activations.resolve(activation, channel_dim=-3)  # of (N, K, P, Q) and (K, P, Q)
    input, unbatched = _arguments.batched_image(input, num_samples)
    _arguments.conv_tensors(input, weight, weight_rho, bias, bias_rho, groups)
    input = _arguments.one_channel(input, weight)
    stride, dilation = _arguments.pair("stride", stride), _arguments.pair("dilation", dilation)
    filter = (weight.shape[2], weight.shape[3])
    extent = (input.shape[2], input.shape[3])
    pads = _arguments.resolve_padding(
        _arguments.padding_form(padding), extent, filter, stride, dilation
    )
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
