"""Posterior, prior, tensor and divergence functions of the TFP face, and their distributions.

Posterior and prior functions are called as ``fn(dtype, shape, name, trainable, add_variable_fn)``
and return a distribution; tensor functions take that distribution; divergence functions take
posterior, prior and sample. The built-in functions are objects with a name, so that a layer
recognises them and takes its fused path, and so that they can be written to a configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import kl_divergence as torch_kl_divergence

from fastbconv import kl
from fastbconv.constraints import ConstraintLike
from fastbconv.initializers import InitializerLike, RandomNormal
from fastbconv.regularizers import RegularizerLike

from .tfp_distribution_classes import Deterministic, SeededNormal
from .tfp_variables import resolve_options

VariableFn = Callable[..., Tensor]
# softplus(rho) for rho above this is rho to the last bit, in float64 too.
_SOFTPLUS_THRESHOLD = 40.0


# --- tensor functions -----------------------------------------------------------------------------


def posterior_sample(distribution: Any) -> Tensor:
    """The default tensor function: one draw, shared by the whole batch.

    Args:
        distribution: the posterior.

    Returns:
        The drawn tensor, with gradients where the distribution has ``rsample``.

    Example:
        >>> tuple(posterior_sample(Normal(torch.zeros(2), 1.0)).shape)
        (2,)
    """
    return distribution.sample()


def posterior_mean(distribution: Any) -> Tensor:
    """The tensor function that uses the mean: ``lambda d: d.mean()`` in TFP.

    In PyTorch ``mean`` is a property, so the lambda would be ``lambda d: d.mean``.

    Args:
        distribution: the posterior.

    Returns:
        Its mean.

    Example:
        >>> posterior_mean(Normal(torch.zeros(2), 1.0))
        tensor([0., 0.])
    """
    return distribution.mean


# --- divergence -----------------------------------------------------------------------------------


def kl_divergence(q: Any, p: Any, sample: Tensor | None = None) -> Tensor:
    """The default divergence: KL(q || p) in closed form, summed over all elements, in nats.

    Any mix of ``Normal`` and ``Independent(Normal)`` is accepted, and a point mass q, whose KL is
    defined as ``-log p(loc)``. Other pairs go to ``torch.distributions.kl_divergence``.

    Args:
        q: posterior.
        p: prior; its parameters broadcast to those of q.
        sample: does not matter.

    Returns:
        0-dim tensor (float32 where the distributions are float16 or bfloat16).

    Raises:
        NotImplementedError: no closed form is known for the pair.
    """
    q0, p0 = _base(q), _base(p)
    if isinstance(q0, Deterministic):
        return -p0.log_prob(q0.loc).sum()
    if isinstance(q0, Normal) and isinstance(p0, Normal):
        out = torch.promote_types(q0.loc.dtype, torch.float32)
        wide = (t.double() for t in (q0.loc, q0.scale, p0.loc, p0.scale))
        return kl.kl_normal_normal(*wide).sum().to(out)
    for pair in ((q0, p0), (q, p)):
        with contextlib.suppress(NotImplementedError):
            return torch_kl_divergence(*pair).sum()
    # Flipout and local layers have no sample of the kernel: the function has to draw.
    start = "def fn(q, p, w): w = q.rsample(); return" if sample is None else "lambda q, p, w:"
    raise NotImplementedError(
        f"divergence: expected distributions with a closed-form KL, got {kind_of(q)} and "
        f"{kind_of(p)}; pass a divergence function, for instance the Monte-Carlo estimate "
        f"{start} (q.log_prob(w) - p.log_prob(w)).sum()"
    )


def kind_of(distribution: Any) -> str:
    """The name of a distribution's class in messages, without ``Independent``."""
    base = _base(distribution)
    return "Normal" if isinstance(base, SeededNormal) else type(base).__name__


def _base(distribution: Any) -> Any:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def normal_parameters(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """(loc, scale) of an elementwise normal, plain or Independent; else None."""
    base = _base(distribution)
    return (base.loc, base.scale) if isinstance(base, Normal) else None


# --- posterior and prior functions ----------------------------------------------------------------


def scale_of(rho: Tensor) -> Tensor:
    """eps + softplus(rho), with the machine epsilon of the dtype."""
    return F.softplus(rho, threshold=_SOFTPLUS_THRESHOLD) + torch.finfo(rho.dtype).eps


class LocScaleFn:
    """What ``default_loc_scale_fn`` returns: ``fn(dtype, shape, name, trainable, add_variable_fn)``
    creates the variables and returns ``(loc, scale)``, with scale None for a point mass."""

    def __init__(
        self,
        is_singular: bool = False,
        loc_initializer: InitializerLike = None,
        untransformed_scale_initializer: InitializerLike = None,
        loc_regularizer: RegularizerLike = None,
        untransformed_scale_regularizer: RegularizerLike = None,
        loc_constraint: ConstraintLike = None,
        untransformed_scale_constraint: ConstraintLike = None,
    ) -> None:
        self.is_singular = bool(is_singular)
        self.loc_initializer, self.loc_regularizer, self.loc_constraint = resolve_options(
            "loc_{}", loc_initializer, loc_regularizer, loc_constraint, RandomNormal(0.0, 0.1)
        )
        (
            self.untransformed_scale_initializer,
            self.untransformed_scale_regularizer,
            self.untransformed_scale_constraint,
        ) = resolve_options(
            "untransformed_scale_{}",
            untransformed_scale_initializer,
            untransformed_scale_regularizer,
            untransformed_scale_constraint,
            RandomNormal(-3.0, 0.1),
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the role in the names of the variables, in order of creation."""
        return ("loc",) if self.is_singular else ("loc", "untransformed_scale")

    def add_variables(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        name: str | None,
        trainable: bool,
        add_variable_fn: VariableFn,
    ) -> list[Tensor]:
        """Creates loc and, unless singular, the untransformed scale."""
        prefix = "" if name is None else f"{name}_"
        return [
            add_variable_fn(
                name=prefix + suffix,
                shape=shape,
                initializer=getattr(self, f"{suffix}_initializer"),
                regularizer=getattr(self, f"{suffix}_regularizer"),
                constraint=getattr(self, f"{suffix}_constraint"),
                dtype=dtype,
                trainable=trainable,
            )
            for suffix in self.suffixes
        ]

    def __call__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        name: str | None,
        trainable: bool,
        add_variable_fn: VariableFn,
    ) -> tuple[Tensor, Tensor | None]:
        variables = self.add_variables(dtype, shape, name, trainable, add_variable_fn)
        if self.is_singular:
            return variables[0], None
        return variables[0], scale_of(variables[1])


class MeanFieldNormalFn(LocScaleFn):
    """What ``default_mean_field_normal_fn`` returns: a posterior (or trainable prior) function."""

    def __call__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        name: str | None,
        trainable: bool,
        add_variable_fn: VariableFn,
    ) -> Independent:
        loc, scale = super().__call__(dtype, shape, name, trainable, add_variable_fn)
        base: Distribution
        if scale is None:
            base = Deterministic(loc, validate_args=False)
        else:
            base = SeededNormal(loc, scale, validate_args=False)
        return Independent(base, loc.dim(), validate_args=False)


def default_mean_field_normal_fn(
    is_singular: bool = False,
    loc_initializer: InitializerLike = None,
    untransformed_scale_initializer: InitializerLike = None,
    loc_regularizer: RegularizerLike = None,
    untransformed_scale_regularizer: RegularizerLike = None,
    loc_constraint: ConstraintLike = None,
    untransformed_scale_constraint: ConstraintLike = None,
) -> MeanFieldNormalFn:
    """A function that creates a trainable mean-field normal, or a point mass.

    ``scale = eps + softplus(untransformed_scale)`` with the machine epsilon of the dtype.

    Args:
        is_singular: a point mass at loc, without a scale.
        loc_initializer: ``f(shape, dtype) -> tensor``, or a name or configuration of Keras, as
            ``fastbconv.initializers.get`` takes it; default N(0, 0.1^2).
        untransformed_scale_initializer: likewise; default N(-3, 0.1^2), a scale of about 0.0488.
        loc_regularizer: a penalty on loc, a term of the layer's ``losses``; a callable, or what
            ``fastbconv.regularizers.get`` takes.
        untransformed_scale_regularizer: likewise.
        loc_constraint: a projection, applied by ``apply_constraints`` after an optimiser step; a
            callable, or what ``fastbconv.constraints.get`` takes.
        untransformed_scale_constraint: likewise.

    Returns:
        ``fn(dtype, shape, name, trainable, add_variable_fn)`` that returns an Independent normal.

    Raises:
        ValueError: an unknown name of an initialiser or constraint, or a bad configuration.
        TypeError: an unknown name of a regulariser, or another type.

    Example:
        >>> from fastbconv import DenseReparameterization
        >>> random_bias = default_mean_field_normal_fn(loc_initializer="zeros")
        >>> layer = DenseReparameterization(10, bias_posterior_fn=random_bias)
    """
    return MeanFieldNormalFn(
        is_singular,
        loc_initializer,
        untransformed_scale_initializer,
        loc_regularizer,
        untransformed_scale_regularizer,
        loc_constraint,
        untransformed_scale_constraint,
    )


def default_loc_scale_fn(
    is_singular: bool = False,
    loc_initializer: InitializerLike = None,
    untransformed_scale_initializer: InitializerLike = None,
    loc_regularizer: RegularizerLike = None,
    untransformed_scale_regularizer: RegularizerLike = None,
    loc_constraint: ConstraintLike = None,
    untransformed_scale_constraint: ConstraintLike = None,
) -> LocScaleFn:
    """As ``default_mean_field_normal_fn``, for a function that returns the pair (loc, scale).

    Use it in a posterior function of your own.

    Args:
        is_singular: as in ``default_mean_field_normal_fn``, like all that follows.

    Returns:
        ``fn(dtype, shape, name, trainable, add_variable_fn)`` that returns (loc, scale), with scale
        None when ``is_singular``.

    Raises:
        ValueError, TypeError: as in ``default_mean_field_normal_fn``.

    Example:
        >>> make = default_loc_scale_fn()
        >>> def laplace_posterior(dtype, shape, name, trainable, add_variable_fn):
        ...     loc, scale = make(dtype, shape, name, trainable, add_variable_fn)
        ...     return torch.distributions.Laplace(loc, scale)
    """
    return LocScaleFn(
        is_singular,
        loc_initializer,
        untransformed_scale_initializer,
        loc_regularizer,
        untransformed_scale_regularizer,
        loc_constraint,
        untransformed_scale_constraint,
    )


def default_multivariate_normal_fn(
    dtype: torch.dtype,
    shape: Sequence[int],
    name: str | None,
    trainable: bool,
    add_variable_fn: VariableFn,
) -> Independent:
    """The default prior: standard normal in every element, without variables.

    Args:
        dtype: of its parameters.
        shape: of the variable that it is the prior of.
        name: does not matter, nor do the two that follow.
        trainable: see there.
        add_variable_fn: see there.

    Returns:
        An Independent normal of that shape.

    Example:
        >>> default_multivariate_normal_fn(torch.float32, (3, 2), "kernel_prior", True, None).mean
        tensor([[0., 0.],
                [0., 0.],
                [0., 0.]])
    """
    del name, trainable, add_variable_fn
    zeros = torch.zeros(tuple(shape), dtype=dtype)
    return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), len(shape))
