"""KL divergences of a mean-field normal posterior, and the priors that they are taken against.

Everything here is plain PyTorch, differentiable by every argument. A KL is a sum over elements, in
nats, divided by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments
from .activations import softplus

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SUM_BLOCK = 512
LEAST_SOFTPLUS = 1e-30  # what a rho stands for at least where it is computed from a scale


@dataclass(frozen=True)
class NormalPrior:
    """N(loc, scale^2) per element: floats, or tensors that broadcast to the parameter."""

    loc: float | Tensor
    scale: float | Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density."""
        return _normal_log_prob(value, self.loc, self.scale)


@dataclass(frozen=True)
class ScaleMixture:
    """pi N(0, s1^2) + (1 - pi) N(0, s2^2) per element.

    There is no closed form: the KL is that of the weights in use, log q(w) - log p(w), in nats.
    C. Blundell, J. Cornebise, K. Kavukcuoglu, D. Wierstra, "Weight uncertainty in neural networks",
    ICML 2015 (arXiv:1505.05424).

    Args:
        pi: weight of the first component, in (0, 1).
        s1: its standard deviation.
        s2: that of the second component.

    Raises:
        TypeError: no numbers. A mixture that is trained is an ``nn.Module`` whose ``forward()``
            returns the distribution: the layer registers its parameters.
        ValueError: ``pi`` outside (0, 1), or a scale that is not positive and finite.

    Example:
        >>> prior = ScaleMixture(pi=0.5, s1=1.0, s2=0.1)
        >>> bool(prior.log_prob(torch.tensor(0.0)) > prior.log_prob(torch.tensor(1.0)))
        True
    """

    pi: float
    s1: float
    s2: float

    def __post_init__(self) -> None:
        for name, value in (("pi", self.pi), ("s1", self.s1), ("s2", self.s2)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(
                    f"{name}: expected a number, got {_arguments.type_name(value)}; for a mixture "
                    "that is trained give an nn.Module whose forward() returns the distribution"
                )
        if not 0.0 < self.pi < 1.0:
            raise ValueError(f"pi: expected a number between 0 and 1, got {self.pi}")
        for name, scale in (("s1", self.s1), ("s2", self.s2)):
            if not 0.0 < scale < math.inf:
                raise ValueError(f"{name}: expected a positive finite scale, got {scale}")

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density."""
        first = _normal_log_prob(value, 0.0, self.s1) + math.log(self.pi)
        second = _normal_log_prob(value, 0.0, self.s2) + math.log1p(-self.pi)
        return torch.logaddexp(first, second)


@dataclass(frozen=True)
class DistributionPrior:
    """A prior by a function that builds a torch distribution at each use, so that the Parameters it
    is made of stay live."""

    factory: Callable[[], Any]
    shape: tuple[int, ...] | None = None  # that values are given in another view of

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value``, to whose shape the distribution's broadcasts.

        Raises:
            TypeError: the function returns no distribution.
            ValueError: its shape does not broadcast: summing its terms would be another KL.
        """
        distribution = self.factory()
        if not isinstance(distribution, torch.distributions.Distribution):
            raise TypeError(
                "prior: expected the function to return a torch.distributions.Distribution, got "
                f"{type(distribution).__name__}"
            )
        value = value if self.shape is None else value.reshape(self.shape)
        given = tuple(distribution.batch_shape + distribution.event_shape)
        if not _arguments.broadcasts(given, value.shape):
            raise ValueError(
                "prior: expected the function to return a distribution whose shape broadcasts to "
                f"{tuple(value.shape)}, got {given}"
            )
        return distribution.log_prob(value)


Prior = NormalPrior | ScaleMixture | DistributionPrior
PriorLike = Prior | Sequence[float | Tensor] | Callable[[], Any] | None


def resolve_prior(prior: PriorLike, name: str = "prior") -> Prior | None:
    """The prior object of any accepted form; None stays None.

    Raises:
        TypeError: none of the accepted forms.
        ValueError: not a pair, or a scale that is not positive.
    """
    if prior is None or isinstance(prior, Prior):
        return prior
    if isinstance(prior, torch.distributions.Distribution):
        raise TypeError(
            f"{name}: expected (loc, scale), a ScaleMixture or a function that builds the "
            f"distribution, got a {type(prior).__name__} object; pass lambda: "
            f"{type(prior).__name__}(...), so that trained values stay live"
        )
    if callable(prior):
        return DistributionPrior(prior)
    if isinstance(prior, (str, Tensor)) or not isinstance(prior, Sequence):
        raise TypeError(
            f"{name}: expected a pair (loc, scale), a ScaleMixture, a function that builds a "
            f"distribution, or None, got {type(prior).__name__}"
        )
    if len(prior) != 2:
        raise ValueError(f"{name}: expected a pair (loc, scale), got {len(prior)} values")
    loc = _check_number(prior[0], f"{name} loc")
    scale = _check_number(prior[1], f"{name} scale")
    # Comparisons, since torch.compile(dynamic=True) traces numbers and knows no isfinite of them.
    if isinstance(loc, float) and not -math.inf < loc < math.inf:
        raise ValueError(f"{name} loc: expected a finite number, got {loc}")
    if isinstance(scale, float) and not 0.0 < scale < math.inf:
        raise ValueError(f"{name} scale: expected a positive finite number, got {scale}")
    return NormalPrior(loc, scale)


def map_prior(
    prior: Prior | None, parameter: Tensor, reshape: Callable[[Tensor], Tensor]
) -> Prior | None:
    """A prior of a parameter, for that parameter reshaped: tensors that broadcast to it are
    reshaped alike, a distribution of its shape gets values in that shape.

    Raises:
        ValueError: a tensor that does not broadcast to ``parameter``.
    """
    if isinstance(prior, DistributionPrior):
        return DistributionPrior(prior.factory, tuple(parameter.shape))
    if not isinstance(prior, NormalPrior):
        return prior
    parts = []
    for part, value in (("loc", prior.loc), ("scale", prior.scale)):
        if isinstance(value, Tensor) and value.ndim:
            value = reshape(_arguments.prior_tensor(f"prior {part}", value, parameter))
        parts.append(value)
    return NormalPrior(*parts)


def _check_number(value: object, name: str) -> float | Tensor:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}: expected a float or a tensor, got {type(value).__name__}")


def _normal_log_prob(value: Tensor, loc: float | Tensor, scale: float | Tensor) -> Tensor:
    z = (value - loc) / scale
    log_scale = math.log(scale) if isinstance(scale, float) else torch.log(scale)
    return -0.5 * z * z - log_scale - _HALF_LOG_2PI


def default_scale_floor(dtype: torch.dtype) -> float:
    """The floor of the torch face: 2^-52 for float64, 2^-23 for every other dtype."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-23


def kl_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the KL of parameters of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def posterior_scale(rho: Tensor, scale_floor: float) -> Tensor:
    """scale = floor + softplus(rho): finite and positive for every finite rho."""
    return softplus(rho) + scale_floor


def rho_of_scale(scale: Tensor, scale_floor: float) -> Tensor:
    """The rho with floor + softplus(rho) = scale: the inverse of ``posterior_scale``, in float64.

    With s = scale - floor it is s + log(1 - exp(-s)), which neither overflows nor cancels. A scale
    at the floor or below it gets the floor, by a rho near -69, where softplus is 1e-30.
    """
    s = (scale.to(torch.float64) - scale_floor).clamp(min=LEAST_SOFTPLUS)
    return s + torch.log(-torch.expm1(-s))


def kl_normal_normal(
    loc: Tensor,
    scale: Tensor,
    prior_loc: float | Tensor,
    prior_scale: float | Tensor,
) -> Tensor:
    """Elementwise KL(N(loc, scale^2) || N(prior_loc, prior_scale^2)) in nats.

    1/2 d^2 + 1/2 (r^2 - 1) - log r with d = (loc - prior_loc) / prior_scale, r = scale /
    prior_scale. With l = log r the last two terms are 1/2 expm1(2 l) - l, which is exact at r = 1.
    The formula is evaluated in the dtype given: near r = 1 its two terms cancel, so pass float64
    for full accuracy.
    """
    d = (loc - prior_loc) / prior_scale
    l = torch.log(scale / prior_scale)  # noqa: E741
    return 0.5 * d * d + (0.5 * torch.expm1(2.0 * l) - l)


def kl_normal_rho(
    loc: Tensor,
    rho: Tensor,
    prior_loc: float | Tensor,
    prior_scale: float | Tensor,
    scale_floor: float,
) -> Tensor:
    """Sum of the KL over the elements of one posterior: 0-dim, in the dtype of ``loc``.

    Evaluated in float64, so that float32 parameters lose nothing to cancellation or summation.
    """
    wide = torch.float64
    scale = posterior_scale(rho.to(wide), scale_floor)
    prior_loc = prior_loc.to(wide) if isinstance(prior_loc, Tensor) else prior_loc
    prior_scale = prior_scale.to(wide) if isinstance(prior_scale, Tensor) else prior_scale
    return kl_normal_normal(loc.to(wide), scale, prior_loc, prior_scale).sum().to(loc.dtype)


def kl_of_sample(
    prior: Prior, loc: Tensor, rho: Tensor | None, eps: Tensor, scale_floor: float
) -> Tensor:
    """log q(w) - log p(w) of w = loc + scale * eps, summed: one term of a Monte-Carlo KL.

    log q is taken from eps itself, -1/2 eps^2 - log scale - 1/2 log 2 pi: (w - loc) / scale would
    lose all digits where the scale is far below |loc|.

    Shape:
        loc, rho, eps: the parameter's. Returns a 0-dim tensor in the dtype of ``loc``.
    """
    scale = posterior_scale(rho, scale_floor)
    log_q = -0.5 * eps * eps - torch.log(scale) - _HALF_LOG_2PI
    log_p = prior.log_prob(loc + scale * eps)
    return (_fixed_sum(log_q) - _fixed_sum(log_p)).to(loc.dtype)


def _fixed_sum(values: Tensor) -> Tensor:
    """The sum in float64, in an order that does not depend on the number of threads: a full
    reduction is cut by thread, the rows of a matrix are not."""
    sums = values.to(torch.float64).reshape(-1)
    while sums.numel() > _SUM_BLOCK:
        sums = F.pad(sums, (0, -sums.numel() % _SUM_BLOCK)).reshape(-1, _SUM_BLOCK).sum(-1)
    return sums.sum()
