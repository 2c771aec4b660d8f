"""Stateless Bayesian layers: check, normalise, choose a kernel, call.

Every function is pure: noise is a function of ``seed`` and of element numbers, backward regenerates
it, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _arguments, _call, activations, kl, noise, reference
from ._arguments import IntPair, PaddingLike
from .kl import NormalPrior, Prior, PriorLike

ActivationLike = str | Callable[[Tensor], Tensor] | activations.Resolved | None


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""2-d cross-correlation with weights drawn from a mean-field normal posterior.

    .. code-block:: text

        w_s    = weight + (floor + softplus(weight_rho)) * eps(seed, s)     s < num_samples
        output = activation(conv2d(input, w_s) + bias_s)
        kl     = sum over elements of KL(N(weight, scale^2) || prior)

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

    Shape:
        output: (rows, K, H_out, W_out), rows = num_samples * N with ``share_input``, else N; in the
        memory format of ``input``.

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
        stride=stride,
        padding=pads,
        dilation=dilation,
        groups=groups,
    )
    output = output.squeeze(0) if unbatched else output
    if resolved.fn is not None:
        output = resolved.fn(output)
    return (output, total) if return_kl else output


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
        (_as_filter(weight), _as_filter(weight_rho), bias, bias_rho),
        (
            _prior_of_linear(kl.resolve_prior(prior if weight_kl else None), weight),
            kl.resolve_prior(bias_prior, "bias_prior"),
        ),
        resolved,
        (seed, generator),
        num_samples=num_samples,
        share_input=share_input,
        return_kl=return_kl,
        scale_floor=scale_floor,
        element_offset=element_offset,
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
    )
    lead = list(input.shape[:-1])
    if share_input and lead:
        lead[0] *= num_samples
    output = output.reshape(*lead, weight.shape[0])
    if resolved.fn is not None:
        output = resolved.fn(output)
    return (output, total) if return_kl else output


def kl_normal(
    loc: Tensor,
    rho: Tensor,
    prior: PriorLike = (0.0, 1.0),
    *,
    scale_floor: float | None = None,
) -> Tensor:
    """Sum of KL(N(loc, scale^2) || N(prior)) over elements, in nats; scale = floor + softplus(rho).

    Args:
        loc: posterior mean, any shape.
        rho: untransformed scale, like ``loc``.
        prior: (loc, scale), each a float or a tensor that broadcasts to ``loc``.
        scale_floor: as in bayes_conv2d.

    Returns:
        0-dim tensor in the dtype of ``loc`` (float32 for bfloat16 and float16). Differentiable by
        loc, rho and prior tensors.

    Raises:
        ValueError: shapes or values that do not fit.
        NotImplementedError: a prior without a closed form.

    Example:
        >>> rho = torch.full((10,), 0.5413248)       # softplus(rho) = 1
        >>> kl_normal(torch.zeros(10), rho).abs() < 1e-5
        tensor(True)
    """
    _arguments.tensor("loc", loc)
    _arguments.posterior("loc", loc, rho, loc)
    resolved = kl.resolve_prior(prior)
    if not isinstance(resolved, NormalPrior):
        raise NotImplementedError(
            f"prior: expected a pair (loc, scale), got {prior!r}; other priors have no closed "
            "form: use bayes_conv2d(..., return_kl=True), whose KL is that of the weights in use"
        )
    loc, rho = _arguments.wide_parameter(loc), _arguments.wide_parameter(rho)
    numbers, tensors = _call.split_prior(resolved, loc, "prior")
    if hasattr(loc, "full_tensor"):  # a DTensor: only plain operators know its placement
        total = reference.kl_normal(
            loc, rho, *tensors, prior=numbers, scale_floor=_call.floor_of(scale_floor, loc)
        )
        return total.full_tensor()
    return _call.backend(loc).kl_normal(
        loc, rho, *tensors, prior=numbers, scale_floor=_call.floor_of(scale_floor, loc)
    )


def sample_posterior(
    loc: Tensor,
    rho: Tensor | None,
    *,
    seed: int | Tensor,
    num_samples: int = 1,
    stream: str | int = "weight",
    scale_floor: float | None = None,
    dtype: torch.dtype | None = None,
    element_offset: int = 0,
    sample: int = 0,
) -> Tensor:
    """Draws of a mean-field normal posterior: loc + scale * eps, differentiable by loc and rho.

    Args:
        loc: posterior mean: (K, C, *taps) or (K,).
        rho: untransformed scale, like ``loc``; None: a point mass.
        seed: int or int64 tensor (2,).
        num_samples: number of draws.
        stream: "weight" or "bias": the noise of the weight or bias of a layer.
        scale_floor: as in bayes_conv2d.
        dtype: of the result; None: that of ``loc``.
        element_offset: noise number of the first element.
        sample: number of the first draw.

    Returns:
        (num_samples, *loc.shape): the very weights of a convolution with this seed.

    Raises:
        ValueError: shapes or values that do not fit.
        TypeError: a type or dtype that does not fit.
    """
    _arguments.tensor("loc", loc)
    _arguments.posterior("loc", loc, rho, loc)
    _arguments.integer("num_samples", num_samples, 1)
    dtype = loc.dtype if dtype is None else dtype
    loc = _arguments.wide_parameter(loc)
    rho = None if rho is None else _arguments.wide_parameter(rho)
    draws, _ = _call.backend(loc).sample_posterior(
        loc,
        rho,
        noise.seed_tensor(seed, loc.device),
        None,
        None,
        prior=(0.0, 1.0),
        with_kl=False,
        scale_floor=_call.floor_of(scale_floor, loc),
        stream=noise.stream_id(stream),
        num_samples=num_samples,
        offset_add=sample,
        element_offset=_arguments.integer("element_offset", element_offset, 0),
        dtype=None if dtype == loc.dtype else dtype,
    )
    return draws


def _as_filter(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight[:, :, None, None]


def _prior_of_linear(prior: Prior | None, weight: Tensor) -> Prior | None:
    """Prior tensors of a (K, C) weight, with the two filter axes added."""
    if not isinstance(prior, NormalPrior):
        return prior
    parts = []
    for part, value in (("loc", prior.loc), ("scale", prior.scale)):
        if isinstance(value, Tensor):
            value = _arguments.prior_tensor(f"prior {part}", value, weight)
            value = value[..., None, None] if value.ndim else value
        parts.append(value)
    return NormalPrior(*parts)
