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
InitializerLike = str | Mapping[str, Any] | Initializer | None

# Standard deviation of a standard normal cut off at two of its own, and its mass in between.
_TRUNCATED_STDDEV = 0.87962566103423978
_TRUNCATED_MASS = math.erf(math.sqrt(2.0))
_MODES = ("fan_in", "fan_out", "fan_avg")
_DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")


# --- fixed values ---------------------------------------------------------------------------------


class Zeros(_named.Named):
    """All values 0."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)


class Ones(_named.Named):
    """All values 1."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ones(tuple(shape), dtype=dtype)


class Constant(_named.Named):
    """All values equal.

    Args:
        value: the value, a number.

    Raises:
        TypeError: not a number.
        ValueError: not finite.

    Example:
        >>> Constant(-3.0)((2,), torch.float32)
        tensor([-3., -3.])
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value = _named.number("value", value)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), self.value, dtype=dtype)


class Identity(_named.Named):
    """``gain`` on the diagonal of a matrix, 0 elsewhere; two axes only, as in Keras.

    Args:
        gain: the value on the diagonal.
    """

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = _named.number("gain", gain)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(shape) != 2:
            raise ValueError(f"Identity: expected a shape of two axes, got {tuple(shape)}")
        return self.gain * torch.eye(*shape, dtype=dtype)


# --- random values --------------------------------------------------------------------------------


class RandomNormal(_named.Named):
    """N(mean, stddev^2), not truncated.

    Two variables of equal shape get different values: TFP's recorded behaviour, one set of numbers
    per shape, starts layers equal and is not reproduced.

    Args:
        mean: mean of the values.
        stddev: their standard deviation.
        seed: None; there for Keras's configurations.

    Raises:
        TypeError: an argument is not a number.
        ValueError: not finite, or a negative standard deviation.
        NotImplementedError: a seed.

    Example:
        >>> RandomNormal(0.0, 0.1)((3, 3, 8, 16), torch.float32).shape
        torch.Size([3, 3, 8, 16])
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: None = None) -> None:
        self.mean = _named.number("mean", mean)
        self.stddev = _named.number("stddev", stddev, least=0.0)
        _refuse(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _empty(shape, dtype).normal_(self.mean, self.stddev).to(dtype)


class TruncatedNormal(RandomNormal):
    """N(mean, stddev^2) within two ``stddev`` of the mean.

    The values' own standard deviation is 0.8796 times ``stddev``. Arguments and exceptions are
    those of ``RandomNormal``.
    """

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # The inverse of the distribution function, at uniform values of the part that is kept.
        uniform = _empty(shape, dtype).uniform_(-_TRUNCATED_MASS, _TRUNCATED_MASS)
        standard = uniform.erfinv_().mul_(math.sqrt(2.0)).clamp_(-2.0, 2.0)
        return standard.mul_(self.stddev).add_(self.mean).to(dtype)


class RandomUniform(_named.Named):
    """Uniform between ``minval`` and ``maxval``.

    Args:
        minval: lower limit.
        maxval: upper limit.
        seed: None; there for Keras's configurations.

    Raises:
        TypeError: an argument is not a number.
        ValueError: not finite, or the upper limit below the lower one.
        NotImplementedError: a seed.
    """

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: None = None) -> None:
        self.minval = _named.number("minval", minval)
        self.maxval = _named.number("maxval", maxval, least=self.minval)
        _refuse(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _empty(shape, dtype).uniform_(self.minval, self.maxval).to(dtype)


class Orthogonal(_named.Named):
    """``gain`` times an orthogonal matrix, from the QR decomposition of normal values.

    A shape of more than two axes is that of the matrix (all axes but the last, last): with at least
    as many rows as columns its columns are orthonormal, otherwise its rows are.

    Args:
        gain: factor of the matrix.
        seed: None; there for Keras's configurations.

    Raises:
        TypeError: the gain is not a number.
        ValueError: the gain is not finite; in the call, a shape of fewer than two axes.
        NotImplementedError: a seed.

    Example:
        >>> w = Orthogonal()((3, 3, 2, 8), torch.float64).flatten(0, 2)
        >>> torch.allclose(w.T @ w, torch.eye(8, dtype=torch.float64))
        True
    """

    def __init__(self, gain: float = 1.0, seed: None = None) -> None:
        self.gain = _named.number("gain", gain)
        _refuse(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(shape) < 2:
            raise ValueError(
                f"Orthogonal: expected a shape of at least two axes, got {tuple(shape)}"
            )
        rows, columns = math.prod(shape[:-1]), shape[-1]
        tall = (max(rows, columns), min(rows, columns))
        q, r = torch.linalg.qr(_empty(tall, dtype).normal_())
        # With the signs of R's diagonal every orthogonal matrix is equally likely.
        q = q * r.diagonal().sign()
        return (self.gain * (q if rows >= columns else q.T)).reshape(tuple(shape)).to(dtype)


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
        _refuse(seed)

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
    """Uniform between plus and minus ``sqrt(6 / (fan_in + fan_out))``; Keras's default."""

    _arguments = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Scaling):
    """Truncated normal of variance ``2 / (fan_in + fan_out)``."""

    _arguments = (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Scaling):
    """Uniform between plus and minus ``sqrt(6 / fan_in)``."""

    _arguments = (2.0, "fan_in", "uniform")


class HeNormal(_Scaling):
    """Truncated normal of variance ``2 / fan_in``."""

    _arguments = (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Scaling):
    """Uniform between plus and minus ``sqrt(3 / fan_in)``."""

    _arguments = (1.0, "fan_in", "uniform")


class LecunNormal(_Scaling):
    """Truncated normal of variance ``1 / fan_in``."""

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
    """A JSON-safe description of an object of this module, which ``get`` reads."""
    return _named.serialize(initializer)


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Fan in and fan out of a shape (*window, C, K)."""
    if len(shape) < 2:
        return (math.prod(shape),) * 2
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    wide = dtype if dtype == torch.float64 else torch.float32
    return torch.empty(tuple(shape), dtype=wide)


def _refuse(seed: object) -> None:
    if seed is not None:
        raise NotImplementedError(
            f"seed: expected None, got {seed!r}; values come from PyTorch's generator, so call "
            "torch.manual_seed before the layer is built"
        )


def _one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value.lower() not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value.lower()
