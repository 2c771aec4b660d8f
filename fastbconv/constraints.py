"""Constraints of variables: ``non_neg``, ``unit_norm``, ``max_norm``, ``min_max_norm`` of Keras.

A constraint is a function of one tensor that returns its projection; ``fb.apply_constraints``
applies those of a model, after an optimiser step. Any callable serves; the ones here have a name
and a configuration, so that a layer that uses them can be written to JSON. Formulas and defaults
are those of the Keras documentation (https://keras.io/api/layers/constraints/).

Norms are taken over ``axis``. The default, 0, is the inputs of a dense kernel (C, units), but the
height only of a convolution's kernel (*window, C, filters): for the norm of each filter give
``axis=(0, 1, 2)`` in two dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _named

__all__ = [
    "Constraint",
    "ConstraintLike",
    "MaxNorm",
    "MinMaxNorm",
    "NonNeg",
    "UnitNorm",
    "get",
    "serialize",
]

Constraint = Callable[[Tensor], Tensor]
"""A function ``w -> w``."""

ConstraintLike = str | Mapping[str, Any] | Constraint | None
"""What ``get`` takes."""

# keras.backend.epsilon()
_EPSILON = 1e-7


class NonNeg(_named.Named):
    """Negative values become 0.

    Example:
        >>> NonNeg()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __call__(self, w: Tensor) -> Tensor:
        return w.clamp(min=0.0)


class UnitNorm(_named.Named):
    """Norms become 1: ``w / (1e-7 + norm)``.

    Args:
        axis: the axes that a norm is taken over, an integer or several.

    Raises:
        TypeError: not an integer or a sequence of integers.
        ValueError: in the call, an axis that the tensor has not.

    Example:
        >>> UnitNorm()(torch.tensor([[3.0], [4.0]]))
        tensor([[0.6000],
                [0.8000]])
    """

    def __init__(self, axis: int | Sequence[int] = 0) -> None:
        self.axis = _axes(axis)

    def __call__(self, w: Tensor) -> Tensor:
        wide = _wide(w)
        return (wide / (_EPSILON + _norm(wide, self.axis))).to(w.dtype)


class MaxNorm(_named.Named):
    """Norms above ``max_value`` become that.

    Args:
        max_value: the largest norm.
        axis: the axes that a norm is taken over, an integer or several.

    Raises:
        TypeError: an argument of another type.
        ValueError: the norm is negative or not finite; in the call, an axis that is not there.

    Example:
        >>> MaxNorm(1.0)(torch.tensor([[3.0, 0.3], [4.0, 0.4]]))
        tensor([[0.6000, 0.3000],
                [0.8000, 0.4000]])
    """

    def __init__(self, max_value: float = 2.0, axis: int | Sequence[int] = 0) -> None:
        self.max_value = _named.number("max_value", max_value, least=0.0)
        self.axis = _axes(axis)

    def __call__(self, w: Tensor) -> Tensor:
        wide = _wide(w)
        norm = _norm(wide, self.axis)
        return (wide * (norm.clamp(max=self.max_value) / (_EPSILON + norm))).to(w.dtype)


class MinMaxNorm(_named.Named):
    """Norms go to the interval from ``min_value`` to ``max_value``.

    Args:
        min_value: the smallest norm.
        max_value: the largest norm.
        rate: the part of the way that one application goes, from 0 to 1.
        axis: the axes that a norm is taken over, an integer or several.

    Raises:
        TypeError: an argument of another type.
        ValueError: norms that are negative or not finite or in the wrong order, a rate outside of
            [0, 1]; in the call, an axis that is not there.

    Example:
        >>> MinMaxNorm(min_value=1.0, max_value=2.0, rate=0.5)(torch.tensor([4.0]))
        tensor([3.])
    """

    def __init__(
        self,
        min_value: float = 0.0,
        max_value: float = 1.0,
        rate: float = 1.0,
        axis: int | Sequence[int] = 0,
    ) -> None:
        self.min_value = _named.number("min_value", min_value, least=0.0)
        self.max_value = _named.number("max_value", max_value, least=self.min_value)
        self.rate = _named.number("rate", rate, least=0.0)
        if self.rate > 1.0:
            raise ValueError(f"rate: expected a number from 0 to 1, got {rate}")
        self.axis = _axes(axis)

    def __call__(self, w: Tensor) -> Tensor:
        wide = _wide(w)
        norm = _norm(wide, self.axis)
        limited = norm.clamp(self.min_value, self.max_value)
        desired = self.rate * limited + (1.0 - self.rate) * norm
        return (wide * (desired / (_EPSILON + norm))).to(w.dtype)


CLASSES: tuple[type[_named.Named], ...] = (MaxNorm, MinMaxNorm, NonNeg, UnitNorm)


def get(identifier: ConstraintLike, name: str = "constraint") -> Constraint | None:
    """The constraint that an argument means.

    Args:
        identifier: None, a callable, a class of this module, a name of Keras ("non_neg", "NonNeg",
            "unit_norm", "max_norm", "min_max_norm") or the result of ``serialize``, here or in
            Keras.
        name: name of the argument, for messages.

    Returns:
        A callable ``w -> w``, or None.

    Raises:
        ValueError: an unknown name, or a bad configuration.
        TypeError: another type, or a bad argument in a configuration.

    Example:
        >>> get("max_norm")
        MaxNorm(max_value=2.0, axis=0)
    """
    return _named.resolve(identifier, name, CLASSES, {}, "w -> w")


def serialize(constraint: Any) -> dict[str, Any]:
    """A JSON-safe description of an object of this module, which ``get`` reads.

    Args:
        constraint: an object of this module.

    Returns:
        A dictionary with the class names of Keras.

    Example:
        >>> serialize(NonNeg())
        {'class_name': 'NonNeg', 'config': {}}
    """
    return _named.serialize(constraint)


def _axes(axis: Any) -> int | tuple[int, ...]:
    try:
        if not isinstance(axis, (list, tuple)):
            return operator.index(axis)
        if axis:
            return tuple(operator.index(one) for one in axis)
    except TypeError:
        pass
    raise TypeError(f"axis: expected an integer or a sequence of integers, got {axis!r}")


def _wide(w: Tensor) -> Tensor:
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def _norm(w: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-w.dim() <= one < w.dim() for one in axes):
        raise ValueError(f"axis: expected axes of the shape {tuple(w.shape)}, got {axis}")
    return w.square().sum(axes, keepdim=True).sqrt()
