"""The estimators of a random affine map: how noise enters z = conv(x, w), w ~ N(loc, scale^2).

.. code-block:: text

    reparameterization   z = conv(x, loc + scale * eps)               eps as w, shared by all rows
    flipout              z = conv(x, loc) + t * conv(x * r, delta)    delta = scale * eps
    local                z = conv(x, loc) + e * sqrt(conv(x^2, scale^2))     e as z

r is one sign for each row and input channel, t for each row and output channel: constant over
space, so that every row sees one convolution, with the weight loc + t r^T * delta, which has the
same distribution as w and is nearly uncorrelated between rows. The mean is never flipped. Y. Wen,
P. Vicol, J. Ba, D. Tran, R. Grosse, "Flipout: efficient pseudo-independent weight perturbations on
mini-batches", ICLR 2018 (arXiv:1803.04386). In bfloat16 and float16 what is rounded is either the
weight of a row or loc and delta, by what is formed.

The entries of a local z have the right mean and variance and are independent, while those of a
convolution are not: neighbouring pixels share weights. It is another objective, not an ELBO of
lower variance. For a linear map, where all entries of a row use weights of their own, it is exact.
D. P. Kingma, T. Salimans, M. Welling, "Variational dropout and the local reparameterization trick",
NeurIPS 2015 (arXiv:1506.02557).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["Estimator"]

Estimator = Literal["reparameterization", "flipout", "local"]
"""The names that ``estimator=`` takes."""

# The operators' numbers.
ESTIMATOR_ID: Final[dict[str, int]] = {"reparameterization": 0, "flipout": 1, "local": 2}
FLIPOUT: Final = 1
LOCAL: Final = 2


def check(estimator: object) -> int:
    """The number of an estimator, from its name.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(estimator, str) or estimator not in ESTIMATOR_ID:
        known = ", ".join(map(repr, ESTIMATOR_ID))
        raise ValueError(f"estimator: expected one of {known}, got {estimator!r}")
    return ESTIMATOR_ID[estimator]


def flipout(
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    loc: Tensor,
    delta: Tensor,
    sign_input: Tensor,
    sign_output: Tensor,
) -> Tensor:
    """apply(x, loc) + sign_output * apply(x * sign_input, delta); the signs broadcast."""
    return apply(x, loc) + perturbation(apply, x, delta, sign_input, sign_output)


def perturbation(
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    delta: Tensor,
    sign_input: Tensor,
    sign_output: Tensor,
) -> Tensor:
    """Flipout's second term, which differs from draw to draw."""
    return sign_output * apply(x * sign_input, delta)


def local_moments(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every entry of apply(x, w)."""
    return apply(x, loc), guarded_sqrt(apply(x * x, scale * scale))


def guarded_sqrt(variance: Tensor) -> Tensor:
    """sqrt(variance) with derivative 0 where the variance is 0, as for a row of zeros: the root's
    own is infinite there, and times the zero that follows it NaN. A sum that rounding has left
    below zero counts as 0; a NaN shows."""
    zero = variance <= 0
    root = torch.where(zero, torch.ones_like(variance), variance).sqrt()
    return torch.where(zero, torch.zeros_like(root), root)
