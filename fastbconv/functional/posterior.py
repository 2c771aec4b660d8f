"""The posterior by itself: its divergence from a prior, and draws of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbconv import _arguments, _call, kl, noise, reference
from fastbconv.kl import NormalPrior, PriorLike


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
        TypeError: a type or dtype that does not fit.
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

    Example:
        >>> loc = torch.zeros(4, 3, 5, 5)
        >>> tuple(sample_posterior(loc, loc - 3.0, seed=7, num_samples=2).shape)
        (2, 4, 3, 5, 5)
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
