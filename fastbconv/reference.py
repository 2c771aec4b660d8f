"""The definition of every operator in plain, differentiable PyTorch.

What is here is what "correct" means: kernels are compared with it, and it serves where no native
library can be built. The functions have the signatures of the operators. Noise comes from the
Python mirror of the generator, which equals the kernels' to a few units in the last place of
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import activations, kl, noise
from ._library import convolve, in_memory_format, outside_autocast, suggested_memory_format


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 on int64 tensors that hold uint32: (..., 4), (..., 2) -> (..., 4)."""
    return noise.mirror_philox4x32_10(counter, key)


def standard_normal(
    seed: Tensor, numel: int, *, stream: int, sample: int, element_offset: int
) -> Tensor:
    """float32 draws of elements [element_offset, element_offset + numel): (numel,)."""
    return noise.mirror_standard_normal(
        seed, numel, stream=stream, sample=sample, element_offset=element_offset
    )


def random_signs(
    seed: Tensor, numel: int, *, stream: int, sample: int, element_offset: int
) -> Tensor:
    """float32 signs, +1 or -1, of elements [element_offset, element_offset + numel): (numel,)."""
    return noise.mirror_random_signs(
        seed, numel, stream=stream, sample=sample, element_offset=element_offset
    )


def kl_normal(
    loc: Tensor,
    rho: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    scale_floor: float,
) -> Tensor:
    """Sum over elements of KL(N(loc, scale^2) || prior), scale = floor + softplus(rho); 0-dim."""
    return kl.kl_normal_rho(
        loc,
        rho,
        prior[0] if prior_loc is None else prior_loc,
        prior[1] if prior_scale is None else prior_scale,
        scale_floor,
    )


def sample_posterior(
    loc: Tensor,
    rho: Tensor | None,
    seed: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    with_kl: bool,
    scale_floor: float,
    stream: int,
    num_samples: int,
    offset_add: int,
    element_offset: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Draws loc + scale * eps, rounded once to ``dtype``: (num_samples, *loc.shape), and the KL."""
    draws = [
        _round(_draw(loc, rho, seed, scale_floor, stream, offset_add + s, element_offset), dtype)
        for s in range(num_samples)
    ]
    total = _no_kl(loc, with_kl)
    if with_kl and rho is not None:
        total = kl_normal(loc, rho, prior_loc, prior_scale, prior=prior, scale_floor=scale_floor)
    return torch.stack(draws).to(loc.dtype if dtype is None else dtype), total


def sample_posterior_list(
    loc: Sequence[Tensor],
    rho: Sequence[Tensor],
    seed: Tensor,
    prior_loc: Sequence[Tensor | None],
    prior_scale: Sequence[Tensor | None],
    *,
    prior: Sequence[float],
    with_kl: Sequence[bool],
    scale_floor: float,
    stream: Sequence[int],
    offset_add: int,
    element_offset: Sequence[int],
    cast: Sequence[bool],
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    """One draw of each of n posteriors, four-dimensional ones in KRSC memory, and their n KLs."""
    samples, terms = [], []
    for i, mean in enumerate(loc):
        draw, kl_term = sample_posterior(
            mean,
            rho[i],
            seed[i],
            prior_loc[i],
            prior_scale[i],
            prior=prior[2 * i : 2 * i + 2],
            with_kl=with_kl[i],
            scale_floor=scale_floor,
            stream=stream[i],
            num_samples=1,
            offset_add=offset_add,
            element_offset=element_offset[i],
            dtype=dtype if cast[i] else None,
        )
        layout = torch.channels_last if mean.ndim == 4 else torch.contiguous_format
        samples.append(draw[0].contiguous(memory_format=layout))
        terms.append(kl_term if with_kl[i] else mean.new_zeros(()))
    return samples, torch.stack(terms)


def derive_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    """Child seeds ``first`` to ``first + count``: (count, 2)."""
    return noise.mirror_derive_seeds(seed, first, count)


def bconv2d(
    input: Tensor,
    weight_loc: Tensor,
    weight_rho: Tensor | None,
    bias_loc: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    bias_prior_loc: Tensor | None,
    bias_prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    weight_kl: bool,
    bias_kl: bool,
    scale_floor: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    activation_param: float,
    num_samples: int,
    share_input: bool,
    offset_add: int,
    element_offset: Sequence[int],
    algorithm: int,
    keep_weight: bool,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Bayesian convolution: output, KL, pre-activation and sampled weight.

    output[s] = activation(conv(round(input), round(loc + scale * eps_s)) + bias_s), rows in
    ``num_samples`` equal consecutive groups (all rows for each draw with ``share_input``). Products
    of bfloat16 and float16 values are summed in float32, and the output is rounded once.
    """
    with outside_autocast(input) as cast:
        x = input.to(cast)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = _split_rows(x.to(wide), num_samples, share_input)
        weights, outputs = [], []
        for s, part in enumerate(rows):
            at = offset_add + s
            weight = _draw(weight_loc, weight_rho, seed, scale_floor, 0, at, element_offset[0])
            weight = _round(weight, x.dtype).to(wide)
            bias = None
            if bias_loc is not None:
                bias = _draw(bias_loc, bias_rho, seed, scale_floor, 1, at, element_offset[1])
            outputs.append(convolve(part, weight, bias, stride, padding, dilation, groups))
            weights.append(weight)
        z = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        layout = suggested_memory_format(input)
        output = activations.apply(activation, z, activation_param)
        output = in_memory_format(output.to(x.dtype), layout)
        empty = x.new_empty((0,))
        saved = in_memory_format(z.to(x.dtype), layout) if save_pre_activation else empty
        kept = torch.stack(weights).to(x.dtype) if keep_weight else empty
        total = _no_kl(weight_loc, weight_kl or bias_kl)
        if weight_kl and weight_rho is not None:
            total = total + kl_normal(
                weight_loc,
                weight_rho,
                prior_loc,
                prior_scale,
                prior=prior[:2],
                scale_floor=scale_floor,
            )
        if bias_kl and bias_loc is not None and bias_rho is not None:
            total = total + kl_normal(
                bias_loc,
                bias_rho,
                bias_prior_loc,
                bias_prior_scale,
                prior=prior[2:],
                scale_floor=scale_floor,
            )
    return output, total, saved, kept


def _no_kl(parameter: Tensor, wanted: bool) -> Tensor:
    """The KL of a point mass, or, where none was asked for, a tensor of shape (0,)."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.new_zeros(() if wanted else (0,), dtype=wide)


def _draw(
    loc: Tensor,
    rho: Tensor | None,
    seed: Tensor,
    scale_floor: float,
    stream: int,
    sample: int,
    element_offset: int,
) -> Tensor:
    """loc + scale * eps in the dtype of the parameters; loc itself for a point mass."""
    if rho is None:
        return loc
    eps = noise.mirror_weight_eps(
        seed, loc.shape, sample, stream=stream, element_offset=element_offset
    )
    return torch.addcmul(loc, kl.posterior_scale(rho, scale_floor), eps.to(loc.dtype))


def _round(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``value`` with its digits rounded to ``dtype``, still in its own dtype, and with a gradient
    that passes unrounded: casting back and forth would round the gradient too."""
    if dtype is None or dtype == value.dtype or torch.finfo(dtype).bits > 16:
        return value
    rounded = value.detach().to(dtype).to(value.dtype)
    return value + (rounded - value.detach())


def _split_rows(x: Tensor, num_samples: int, share_input: bool) -> Sequence[Tensor]:
    if share_input or num_samples == 1:
        return [x] * num_samples
    return x.split(x.shape[0] // num_samples) if x.shape[0] else [x] * num_samples
