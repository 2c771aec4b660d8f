"""The distributions of the TFP face, as classes of ``torch.distributions``."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints
from torch.distributions.kl import register_kl


class SeededNormal(Normal):
    """A normal whose draws come from ``eps_source(number of the draw)`` where one is set.

    A layer sets it, so that a seed governs the sample whichever path computes it. Successive draws
    have successive numbers.
    """

    eps_source: Callable[[int], Tensor] | None = None
    _drawn = 0

    def __repr__(self) -> str:
        # A user knows the class that this one stands in for.
        return super().__repr__().replace(type(self).__name__, "Normal", 1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``loc + scale * eps``, differentiable by loc and scale."""
        if self.eps_source is None:
            return super().rsample(torch.Size(sample_shape))
        count = math.prod(sample_shape)
        eps = [self.eps_source(self._drawn + draw).to(self.loc) for draw in range(count)]
        self._drawn += count
        shape = (*sample_shape, *self.loc.shape)
        return self.loc + self.scale * (torch.stack(eps) if sample_shape else eps[0]).reshape(shape)


class Deterministic(Distribution):
    """A point mass at ``loc``: sample, mean and mode are ``loc``, the scale is 0.

    ``log_prob`` is 0 at ``loc`` and -inf elsewhere. KL(point mass || p) is *defined* as
    ``-log p(loc)``, as in TFP; it is not the limit of a divergence of densities.
    """

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012  torch's own form
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.loc)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``loc``, expanded."""
        return self.loc.expand(torch.Size(sample_shape) + self.loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        zero = torch.zeros_like(self.loc)
        return torch.where(value == self.loc, zero, torch.full_like(zero, -torch.inf))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> Deterministic:
        return Deterministic(self.loc.expand(tuple(batch_shape)), validate_args=False)


@register_kl(Deterministic, Distribution)
def _kl_point_mass(q: Deterministic, p: Distribution) -> Tensor:
    return -p.log_prob(q.loc)


@functools.lru_cache(maxsize=256)
def _reparameterized_class(kind: type[Distribution]) -> type[Distribution]:
    def sample(self: Distribution, sample_shape: Sequence[int] = ()) -> Tensor:
        """``rsample``: the draw carries gradients."""
        return self.rsample(torch.Size(sample_shape))

    return type(kind.__name__, (kind,), {"sample": sample, "__module__": kind.__module__})


def reparameterized(distribution: Any, what: str = "posterior") -> Any:
    """The distribution with ``sample`` meaning ``rsample``, as in TFP.

    It is a copy of a dynamic subclass: isinstance and the dispatch of KL divergences go on working.
    Without an rsample the distribution is returned as it is, with one warning.
    """
    if not isinstance(distribution, Distribution):
        return distribution
    if not distribution.has_rsample:
        warnings.warn(
            f"{what}: {type(distribution).__name__} has no rsample, so its variables get no "
            "gradient through the sample",
            stacklevel=3,
        )
        return distribution
    result = copy.copy(distribution)
    result.__class__ = _reparameterized_class(type(distribution))
    return result
