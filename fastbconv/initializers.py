"""First values of variables, with the names, arguments and defaults of Keras.

An initialiser is a function ``f(shape, dtype) -> tensor``. Any callable serves; the ones here have
a name (``"he_normal"``, ``"HeNormal"``) and a configuration, so that a layer that uses them can be
written to JSON. Formulas are those of the Keras documentation
(https://keras.io/api/layers/initializers/).

Values come from PyTorch's generator (``torch.manual_seed``) and are drawn afresh at each call: two
variables of equal shape get different values. They are drawn in float32, or in float64 for float64,
and then rounded to the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _named
from ._initial_values import (
    Constant,
    Identity,
    Ones,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    Zeros,
    refuse_seed,
)

__all__ = [
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "Identity",
    "Initializer",
    "InitializerLike",
    "LecunNormal",
    "LecunUniform",
    "Ones",
    "Orthogonal",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "VarianceScaling",
    "Zeros",
    "get",
    "serialize",
]

Initializer = Callable[[Sequence[int], torch.dtype], Tensor]
"""A function ``f(shape, dtype) -> tensor``."""

InitializerLike = str | Mapping[str, Any] | Initializer | None
"""What ``get`` takes."""

# Standard deviation of a standard normal cut off at two of its own.
_TRUNCATED_STDDEV = 0.87962566103423978
_MODES = ("fan_in", "fan_out", "fan_avg")
_DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")


class VarianceScaling(_named.Named):
    """Values of variance ``scale / n``, where n is a fan of the shape.

    For a shape (*window, C, K), fan in is prod(window) C and fan out prod(window) K.

    Args:
        scale: factor of the variance.
        mode: n: 'fan_in', 'fan_out', or 'fan_avg', the mean of both.
        distribution: 'truncated_normal' (or 'normal'; cut off at two standard deviations, which are
            those of the normal before), 'untruncated_normal', or 'uniform' between plus and minus
            ``sqrt(3 scale / n)``.
        seed: None; there for Keras's configurations.

    Raises:
        TypeError: the scale is not a number.
        ValueError: the scale is not positive and finite, or an unknown mode or distribution.
        NotImplementedError: a seed.

    Example:
        >>> w = VarianceScaling(2.0, "fan_out", "uniform")((5, 5, 3, 6), torch.float32)
        >>> bool(w.abs().max() <= (3 * 2.0 / (25 * 6)) ** 0.5)
        True
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: None = None,
    ) -> None:
        self.scale = _named.number("scale", scale, least=0.0)
        if self.scale == 0.0:
            raise ValueError("scale: expected a positive number, got 0")
        self.mode = _one_of("mode", mode, _MODES)
        given = "truncated_normal" if distribution == "normal" else distribution
        self.distribution = _one_of("distribution", given, _DISTRIBUTIONS)
        refuse_seed(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        fan_in, fan_out = _fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2.0}[self.mode]
        variance = self.scale / max(1.0, fan)
        draw: Initializer
        if self.distribution == "uniform":
            limit = math.sqrt(3.0 * variance)
            draw = RandomUniform(-limit, limit)
        elif self.distribution == "untruncated_normal":
            draw = RandomNormal(0.0, math.sqrt(variance))
        else:
            draw = TruncatedNormal(0.0, math.sqrt(variance) / _TRUNCATED_STDDEV)
        return draw(shape, dtype)


class _Scaling(VarianceScaling):
    """A VarianceScaling with a name of its own, without arguments."""

    _arguments: tuple[float, str, str]

    def __init__(self, seed: None = None) -> None:
        super().__init__(*self._arguments, seed)

    def get_config(self) -> dict[str, Any]:
        """No arguments."""
        return {}


class GlorotUniform(_Scaling):
    """Uniform between plus and minus ``sqrt(6 / (fan_in + fan_out))``; Keras's default.

    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010.

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> GlorotUniform()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Scaling):
    """Truncated normal of variance ``2 / (fan_in + fan_out)``.

    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", AISTATS 2010.

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> GlorotNormal()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Scaling):
    """Uniform between plus and minus ``sqrt(6 / fan_in)``.

    K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015 (arXiv:1502.01852).

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> HeUniform()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (2.0, "fan_in", "uniform")


class HeNormal(_Scaling):
    """Truncated normal of variance ``2 / fan_in``.

    K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015 (arXiv:1502.01852).

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> HeNormal()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Scaling):
    """Uniform between plus and minus ``sqrt(3 / fan_in)``.

    Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of
    the Trade, 1998.

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> LecunUniform()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (1.0, "fan_in", "uniform")


class LecunNormal(_Scaling):
    """Truncated normal of variance ``1 / fan_in``.

    Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of
    the Trade, 1998.

    Args:
        seed: as in ``VarianceScaling``.

    Raises:
        NotImplementedError: a seed.

    Example:
        >>> LecunNormal()((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    _arguments = (1.0, "fan_in", "truncated_normal")


# --- names ----------------------------------------------------------------------------------------

CLASSES: tuple[type[_named.Named], ...] = (
    Constant,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Identity,
    LecunNormal,
    LecunUniform,
    Ones,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    VarianceScaling,
    Zeros,
)
_ALIASES = {"normal": RandomNormal, "uniform": RandomUniform, "one": Ones, "zero": Zeros}


def get(identifier: InitializerLike, name: str = "initializer") -> Initializer | None:
    """The initialiser that an argument means.

    Args:
        identifier: None, a callable, a class of this module, a name of Keras ("zeros", "Zeros",
            "glorot_uniform", ...) or the result of ``serialize``, here or in Keras.
        name: name of the argument, for messages.

    Returns:
        A callable ``f(shape, dtype) -> tensor``, or None.

    Raises:
        ValueError: an unknown name, or a bad configuration.
        TypeError: another type, or a bad argument in a configuration.
        NotImplementedError: a configuration with a seed.

    Example:
        >>> get("random_normal")
        RandomNormal(mean=0.0, stddev=0.05)
        >>> get({"class_name": "Constant", "config": {"value": -3.0}})
        Constant(value=-3.0)
    """
    _named.refuse_in_place(name, identifier)
    return _named.resolve(identifier, name, CLASSES, _ALIASES, "f(shape, dtype) -> tensor")


def serialize(initializer: Any) -> dict[str, Any]:
    """A JSON-safe description of an object of this module, which ``get`` reads.

    Args:
        initializer: an object of this module.

    Returns:
        A dictionary with the class names of Keras.

    Example:
        >>> serialize(Zeros())
        {'class_name': 'Zeros', 'config': {}}
    """
    return _named.serialize(initializer)


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Fan in and fan out of a shape (*window, C, K)."""
    if len(shape) < 2:
        return (math.prod(shape),) * 2
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def _one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value.lower() not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value.lower()
