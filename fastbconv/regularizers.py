"""Regularisers of activities and variables: ``l1``, ``l2``, ``l1_l2``, with the defaults of Keras.

A regulariser is a function of one tensor that returns a 0-dim tensor. Any callable serves; the
ones here have a configuration, so that a layer that uses them can be written to JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "L1L2",
    "Regularizer",
    "RegularizerLike",
    "get",
    "l1",
    "l1_l2",
    "l2",
    "serialize",
]

Regularizer = Callable[[Tensor], Tensor]
"""A function of one tensor that returns a 0-dim tensor."""

RegularizerLike = str | Mapping[str, Any] | Regularizer | None
"""What ``get`` takes."""


class L1L2:
    """``l1 * sum(abs(x)) + l2 * sum(x ** 2)``, summed in float32 at least.

    Args:
        l1: weight of the absolute values.
        l2: weight of the squares.

    Raises:
        TypeError: a weight is not a number.
        ValueError: a weight is negative or not finite.

    Example:
        >>> float(L1L2(l1=0.5)(torch.tensor([1.0, -3.0])))
        2.0
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1 = _weight("l1", l1)
        self.l2 = _weight("l2", l2)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        total = x.new_zeros(())
        if self.l1:
            total = total + self.l1 * x.abs().sum()
        if self.l2:
            total = total + self.l2 * x.square().sum()
        return total

    def get_config(self) -> dict[str, float]:
        """The weights, by name."""
        return {"l1": self.l1, "l2": self.l2}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, L1L2) and (self.l1, self.l2) == (other.l1, other.l2)

    def __hash__(self) -> int:
        return hash((self.l1, self.l2))

    def __repr__(self) -> str:
        return f"l1_l2(l1={self.l1}, l2={self.l2})"


def l1(l1: float = 0.01) -> L1L2:
    """``l1 * sum(abs(x))``.

    Args:
        l1: weight of the absolute values.

    Returns:
        The regulariser.

    Example:
        >>> float(l1(0.5)(torch.tensor([1.0, -3.0])))
        2.0
    """
    return L1L2(l1=l1)


def l2(l2: float = 0.01) -> L1L2:
    """``l2 * sum(x ** 2)``.

    Args:
        l2: weight of the squares.

    Returns:
        The regulariser.

    Example:
        >>> float(l2(0.5)(torch.tensor([1.0, -3.0])))
        5.0
    """
    return L1L2(l2=l2)


def l1_l2(l1: float = 0.01, l2: float = 0.01) -> L1L2:
    """``l1 * sum(abs(x)) + l2 * sum(x ** 2)``.

    Args:
        l1: weight of the absolute values.
        l2: weight of the squares.

    Returns:
        The regulariser.

    Example:
        >>> float(l1_l2(0.5, 0.5)(torch.tensor([1.0, -3.0])))
        7.0
    """
    return L1L2(l1=l1, l2=l2)


_NAMED: dict[str, Callable[..., L1L2]] = {"l1": l1, "l2": l2, "l1_l2": l1_l2, "l1l2": L1L2}


def get(identifier: Any, name: str = "regularizer") -> Regularizer | None:
    """The regulariser that an argument means.

    Args:
        identifier: None, a callable, a name ("l1", "l2", "l1_l2") or the result of ``serialize``.
        name: name of the argument, for messages.

    Returns:
        A callable of one tensor, or None.

    Raises:
        TypeError: an unknown name, which in Keras would fail in the first call.
        ValueError: none of the accepted forms.

    Example:
        >>> get("l2")
        l1_l2(l1=0.0, l2=0.01)
    """
    if identifier is None or (callable(identifier) and not isinstance(identifier, type)):
        return identifier
    if isinstance(identifier, type) and callable(identifier):
        return identifier()
    if isinstance(identifier, Mapping):
        config = identifier.get("config", {})
        return _named(identifier.get("class_name"), name)(**config)
    if isinstance(identifier, str):
        return _named(identifier, name)()
    raise ValueError(
        f"{name}: expected None, a callable, a configuration or one of 'l1', 'l2', 'l1_l2', "
        f"got {identifier!r}"
    )


def serialize(regularizer: L1L2) -> dict[str, Any]:
    """A JSON-safe description that ``get`` reads, with the class names of Keras.

    Args:
        regularizer: an object of this module.

    Returns:
        A dictionary.

    Example:
        >>> serialize(l2(0.5))
        {'class_name': 'L2', 'config': {'l2': 0.5}}
    """
    config = regularizer.get_config()
    if not regularizer.l2 and regularizer.l1:
        return {"class_name": "L1", "config": {"l1": config["l1"]}}
    if not regularizer.l1 and regularizer.l2:
        return {"class_name": "L2", "config": {"l2": config["l2"]}}
    return {"class_name": "L1L2", "config": config}


def _named(identifier: object, name: str) -> Callable[..., L1L2]:
    factory = _NAMED.get(identifier.lower()) if isinstance(identifier, str) else None
    if factory is None:
        raise TypeError(f"{name}: expected one of 'l1', 'l2', 'l1_l2', got {identifier!r}")
    return factory


def _weight(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite non-negative number, got {value}")
    return float(value)
