"""What every operator returns, without computing it: shape, strides, dtype and device.

torch.compile and meta tensors ask here. The rule of each fake is that of the native allocation in
``csrc/bindings``; a test compares them. ``ops.py`` registers what FAKES holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .estimators import LOCAL

FAKES: Final[dict[str, Callable[..., Any]]] = {}


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lists ``_fake_<name>`` as the fake of operator ``name``."""
    FAKES[function.__name__.removeprefix("_fake_")] = function
    return function


def _empty_unless(wanted: bool, like: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.empty_like(like) if wanted and like is not None else parameter.new_empty((0,))


def _empty_image(shape: Sequence[int], like: Tensor) -> Tensor:
    layout = suggest_memory_format(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _wide(parameter: Tensor) -> torch.dtype:
    """Of rho, priors and KL; loc is 16-bit where it was sampled before."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def in_krsc(sample: Tensor) -> Tensor:
    """A sample with the memory that sample_posterior_list gives it."""
    return sample.contiguous(memory_format=_sample_format(sample))


def _sample_format(sample: Tensor) -> torch.memory_format:
    return torch.channels_last if sample.ndim == 4 else torch.contiguous_format


def _kl_shape(wanted: bool) -> tuple[int, ...]:
    return () if wanted else (0,)


def _extent(extent: int, pads: int, filter: int, stride: int, dilation: int) -> int:
    return (extent + pads - (filter - 1) * dilation - 1) // stride + 1


def _one_device(*tensors: Tensor | None) -> None:
    """Meta tensors among others would give a meta result without a word."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected all on one device, got {', '.join(sorted(devices))}")


@_fake
def _fake_bconv2d(
    input: Tensor,
    weight_loc: Tensor,
    *parameters: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    num_samples: int,
    share_input: bool,
    weight_kl: bool,
    bias_kl: bool,
    keep_weight: bool,
    save_pre_activation: bool,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _one_device(input, weight_loc, *parameters)
    top, bottom, left, right = padding
    rows, _, height, width = input.shape
    filters, channels, filter_h, filter_w = weight_loc.shape
    shape = (
        rows * num_samples if share_input else rows,
        filters,
        _extent(height, top + bottom, filter_h, stride[0], dilation[0]),
        _extent(width, left + right, filter_w, stride[1], dilation[1]),
    )
    output = _empty_image(shape, input)
    kept = input.new_empty((num_samples, filters, filter_h, filter_w, channels))
    return (
        output,
        weight_loc.new_empty(_kl_shape(weight_kl or bias_kl), dtype=_wide(weight_loc)),
        torch.empty_like(output) if save_pre_activation else input.new_empty((0,)),
        kept.permute(0, 1, 4, 2, 3) if keep_weight else input.new_empty((0,)),
    )


@_fake
def _fake_bconv2d_backward(
    grad_output: Tensor,
    grad_kl: Tensor | None,
    input: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    weight_loc: Tensor,
    weight_rho: Tensor | None,
    bias_loc: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    *priors: Tensor | None,
    output_mask: Sequence[bool],
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of bconv2d by its nine floating-point tensors, those in ``output_mask``.

    .. code-block:: text

        bconv2d_backward(Tensor grad_output, Tensor? grad_kl, Tensor input, Tensor? saved,
            Tensor? weight, Tensor weight_loc, Tensor? weight_rho, Tensor? bias_loc,
            Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale,
            Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, float[] prior, bool weight_kl,
            bool bias_kl, float scale_floor, int[] stride, int[] padding, int[] dilation,
            int groups, int activation, float activation_param, int num_samples, bool share_input,
            int offset_add, int[] element_offset, int algorithm, bool[] output_mask)
            -> (Tensor grad_input, Tensor grad_weight_loc, Tensor grad_weight_rho,
                Tensor grad_bias_loc, Tensor grad_bias_rho, Tensor grad_prior_loc,
                Tensor grad_prior_scale, Tensor grad_bias_prior_loc, Tensor grad_bias_prior_scale)

    ``saved`` is the output, or the pre-activation for silu, mish and gelu; None for linear.
    """
    grad_input = input.new_empty((0,))
    if output_mask[0]:
        grad_input = _empty_image(input.shape, input)
    likes = (weight_loc, weight_rho, bias_loc, bias_rho, *priors)
    wide = _wide(weight_loc)
    return grad_input, *(
        torch.empty_like(like)
        if wanted and like is not None
        else weight_loc.new_empty((0,), dtype=wide if like is None else like.dtype)
        for wanted, like in zip(output_mask[1:], likes, strict=True)
    )


@_fake
def _fake_bconv2d_affine(
    input: Tensor,
    weight_loc: Tensor,
    *parameters: Tensor | None,
    estimator: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, kl, saved, _ = _fake_bconv2d(
        input, weight_loc, *parameters, keep_weight=False, **options
    )
    deviation = weight_loc.new_empty((0,))
    if estimator == LOCAL:
        dense = weight_loc.new_empty((input.shape[0], *output.shape[2:], output.shape[1]))
        deviation = dense.permute(0, 3, 1, 2)
    return output, kl, saved, deviation


@_fake
def _fake_bconv2d_affine_backward(
    grad_output: Tensor,
    grad_kl: Tensor | None,
    input: Tensor,
    saved: Tensor | None,
    deviation: Tensor | None,
    *parameters: Tensor | None,
    output_mask: Sequence[bool],
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of bconv2d_affine by its nine floating-point tensors, those in ``output_mask``.

    .. code-block:: text

        bconv2d_affine_backward(Tensor grad_output, Tensor? grad_kl, Tensor input, Tensor? saved,
            Tensor? deviation, Tensor weight_loc, Tensor weight_rho, Tensor? bias_loc,
            Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale,
            Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, int estimator, float[] prior,
            bool weight_kl, bool bias_kl, float scale_floor, int[] stride, int[] padding,
            int[] dilation, int groups, int activation, float activation_param, int num_samples,
            bool share_input, int offset_add, int[] element_offset, int row_offset, int algorithm,
            bool[] output_mask)
            -> (Tensor grad_input, Tensor grad_weight_loc, Tensor grad_weight_rho,
                Tensor grad_bias_loc, Tensor grad_bias_rho, Tensor grad_prior_loc,
                Tensor grad_prior_scale, Tensor grad_bias_prior_loc, Tensor grad_bias_prior_scale)

    ``saved`` is as in bconv2d_backward.
    """
    return _fake_bconv2d_backward(
        grad_output, grad_kl, input, saved, None, *parameters, output_mask=output_mask
    )


@_fake
def _fake_sample_posterior(
    loc: Tensor,
    *rest: Tensor | None,
    with_kl: bool,
    num_samples: int,
    dtype: torch.dtype | None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    _one_device(loc, *rest)
    sample = loc.new_empty((num_samples, *loc.shape), dtype=dtype or loc.dtype)
    return sample, loc.new_empty(_kl_shape(with_kl))


@_fake
def _fake_sample_posterior_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    loc: Tensor,
    rho: Tensor | None,
    seed: Tensor,
    *priors: Tensor | None,
    output_mask: Sequence[bool],
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of sample_posterior by loc, rho and the prior tensors.

    .. code-block:: text

        sample_posterior_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor loc, Tensor? rho,
            Tensor seed, Tensor? prior_loc, Tensor? prior_scale, *, float[] prior,
            float scale_floor, int stream, int num_samples, int offset_add, int element_offset,
            bool[] output_mask)
            -> (Tensor grad_loc, Tensor grad_rho, Tensor grad_prior_loc, Tensor grad_prior_scale)
    """
    likes = (loc, rho, *priors)
    return tuple(_empty_unless(w, like, loc) for w, like in zip(output_mask, likes, strict=True))


@_fake
def _fake_sample_posterior_list(
    loc: Sequence[Tensor],
    rho: Sequence[Tensor],
    seed: Tensor,
    prior_loc: Sequence[Tensor | None],
    prior_scale: Sequence[Tensor | None],
    *,
    cast: Sequence[bool],
    dtype: torch.dtype | None,
    **unused: Any,
) -> tuple[list[Tensor], Tensor]:
    _one_device(*loc, *rho, seed, *prior_loc, *prior_scale)
    samples = [
        torch.empty(
            one.shape,
            dtype=dtype if wanted and dtype is not None else one.dtype,
            device=one.device,
            memory_format=_sample_format(one),
        )
        for one, wanted in zip(loc, cast, strict=True)
    ]
    return samples, loc[0].new_empty((len(loc),))


@_fake
def _fake_sample_posterior_list_backward(
    grad_sample: Sequence[Tensor | None],
    grad_kl: Tensor | None,
    loc: Sequence[Tensor],
    rho: Sequence[Tensor],
    seed: Tensor,
    prior_loc: Sequence[Tensor | None],
    prior_scale: Sequence[Tensor | None],
    *,
    output_mask: Sequence[bool],
    **unused: Any,
) -> list[Tensor]:
    """Gradients of sample_posterior_list: all by loc, rho, prior loc and prior scale.

    .. code-block:: text

        sample_posterior_list_backward(Tensor?[] grad_sample, Tensor? grad_kl, Tensor[] loc,
            Tensor[] rho, Tensor seed, Tensor?[] prior_loc, Tensor?[] prior_scale, *,
            float[] prior, float scale_floor, int[] stream, int offset_add,
            int[] element_offset, bool[] output_mask) -> Tensor[]
    """
    likes = (*loc, *rho, *prior_loc, *prior_scale)
    return [_empty_unless(w, like, loc[0]) for w, like in zip(output_mask, likes, strict=True)]


@_fake
def _fake_kl_normal(loc: Tensor, *rest: Tensor | None, **unused: Any) -> Tensor:
    _one_device(loc, *rest)
    return loc.new_empty(())


@_fake
def _fake_kl_normal_backward(
    grad_kl: Tensor, loc: Tensor, *rest: Tensor | None, output_mask: Sequence[bool], **unused: Any
) -> tuple[Tensor, ...]:
    """Gradients of kl_normal by loc, rho and the prior tensors.

    .. code-block:: text

        kl_normal_backward(Tensor grad_kl, Tensor loc, Tensor rho, Tensor? prior_loc,
            Tensor? prior_scale, *, float[] prior, float scale_floor, bool[] output_mask)
            -> (Tensor, Tensor, Tensor, Tensor)
    """
    likes = (loc, *rest)
    return tuple(_empty_unless(w, like, loc) for w, like in zip(output_mask, likes, strict=True))


@_fake
def _fake_standard_normal(seed: Tensor, numel: int, **unused: Any) -> Tensor:
    return seed.new_empty((numel,), dtype=torch.float32)


@_fake
def _fake_random_signs(seed: Tensor, numel: int, **unused: Any) -> Tensor:
    return seed.new_empty((numel,), dtype=torch.float32)


@_fake
def _fake_philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    return counter.new_empty(counter.shape)


@_fake
def _fake_derive_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    return seed.new_empty((count, 2))
