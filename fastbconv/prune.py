"""Weights that are mostly noise become points at zero."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kl
from ._surgery import bayesian_by_name, check_model, shown, subject
from .layers._base import BayesLayer


class Pruned(NamedTuple):
    """A pruned model.

    Attributes:
        model: the model.
        shares: name of each Bayesian layer -> share of its weights that are pruned, in [0, 1].
    """

    model: nn.Module
    shares: dict[str, float]


def prune(model: nn.Module, snr: float, *, inplace: bool = False) -> Pruned:
    r"""Sets weights with a signal-to-noise ratio below ``snr`` to points at 0.

    .. code-block:: text

        |loc| / scale < snr   ->   loc = 0, scale = floor

    Graves 2011, "Practical variational inference for neural networks"; Blundell et al. 2015
    (arXiv:1505.05424), section 5.1. Biases that are Bayesian are pruned likewise.

    **For inference.** A pruned weight is (0, smallest scale), a point, which is far from any prior:
    its KL rises to log(prior scale / smallest scale) - 1/2 nats, 15.4 for N(0, 1) in float32. The
    KL of a pruned model is large, and says nothing about it.

    **Further training revives the weights.** A pruned scale stays at the floor (its rho has no
    gradient to speak of), but an optimiser moves loc away from 0 again, and |loc| / scale is then
    huge: a second ``prune`` counts those as kept. To train on, keep ``mask = layer.weight != 0`` of
    each layer, and multiply its weight by it after each step.

    **Tied weights are pruned everywhere.** A weight is changed in its memory: an Embedding that
    shares that of a layer has those entries of its rows set to 0 too.

    Args:
        model: any module.
        snr: the ratio, at least 0; 0 prunes nothing.
        inplace: change ``model``; False: a deep copy.

    Returns:
        (model, shares).

    Raises:
        TypeError: no module, or ``snr`` is no number.
        ValueError: ``snr`` is negative or not finite; a layer before its first call.
        NotImplementedError: a layer of the TFP face with a posterior of your own.

    Example:
        >>> from fastbconv import BayesLinear
        >>> layer = BayesLinear(16, 4)
        >>> prune(layer, 1e6).shares
        {'': 1.0}
    """
    if not isinstance(snr, numbers.Real) or isinstance(snr, bool):
        raise TypeError(f"snr: expected a number, got {type(snr).__name__}")
    if not 0.0 <= snr < math.inf:
        raise ValueError(f"snr: expected a finite number of at least 0, got {snr}")
    check_model(model)
    model = subject(model, inplace)
    posteriors = {name: _posteriors(name, layer) for name, layer in bayesian_by_name(model).items()}
    with torch.no_grad():
        shares = {name: _prune_layer(parts, snr) for name, parts in posteriors.items()}
    return Pruned(model, shares)


def _posteriors(name: str, layer: Any) -> list[tuple[Tensor, Tensor, float]]:
    """(loc, rho, floor) of each part, in the memory of the parameters."""
    if isinstance(layer, BayesLayer):
        floor = kl.default_scale_floor(layer.weight.dtype)
        parts = [(layer.weight, layer.weight_rho, floor), (layer.bias, layer.bias_rho, floor)]
        return [part for part in parts if part[1] is not None]
    found = []
    for part in ("kernel", "bias"):
        if getattr(layer, f"{part}_posterior_fn") is None:
            continue
        if not layer._is_built_in(part, mean=True):
            raise NotImplementedError(
                f"model: expected mean-field normal posteriors, got {shown(name)} "
                f"({type(layer).__name__}) with a {part}_posterior_fn of your own; prune its "
                "variables themselves"
            )
        loc, rho = layer._built_in_posterior(part, mean=False)
        if rho is not None:
            found.append((loc, rho, torch.finfo(loc.dtype).eps))
    return found


def _prune_layer(parts: list[tuple[Tensor, Tensor, float]], snr: float) -> float:
    pruned = total = 0
    for loc, rho, floor in parts:
        wide = torch.promote_types(loc.dtype, torch.float32)
        noisy = loc.abs().to(wide) < snr * kl.posterior_scale(rho.to(wide), floor)
        loc.masked_fill_(noisy, 0.0)
        rho.masked_fill_(noisy, math.log(kl.LEAST_SOFTPLUS))
        pruned, total = pruned + int(noisy.sum()), total + noisy.numel()
    return pruned / total if total else 0.0
