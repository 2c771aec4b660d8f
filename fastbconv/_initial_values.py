"""Initialisers that know no fans: fixed values, and random ones of a given width.

``fastbconv.initializers`` passes the names on, and says what an initialiser is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _named

# The mass of a standard normal within two standard deviations.
_TRUNCATED_MASS = math.erf(math.sqrt(2.0))


# --- fixed values ---------------------------------------------------------------------------------


class Zeros(_named.Named):
    """All values 0.

    Example:
        >>> Zeros()((2,), torch.float32)
        tensor([0., 0.])
    """

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)


class Ones(_named.Named):
    """All values 1.

    Example:
        >>> Ones()((2,), torch.float32)
        tensor([1., 1.])
    """

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

    Raises:
        TypeError: the gain is not a number.
        ValueError: the gain is not finite; in the call, a shape of other than two axes.

    Example:
        >>> Identity(2.0)((2, 2), torch.float32)
        tensor([[2., 0.],
                [0., 2.]])
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
        refuse_seed(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _empty(shape, dtype).normal_(self.mean, self.stddev).to(dtype)


class TruncatedNormal(RandomNormal):
    """N(mean, stddev^2) within two ``stddev`` of the mean.

    The values' own standard deviation is 0.8796 times ``stddev``.

    Args:
        mean: as in ``RandomNormal``, like all that follows.

    Raises:
        TypeError, ValueError, NotImplementedError: as in ``RandomNormal``.

    Example:
        >>> bool(TruncatedNormal(0.0, 0.1)((3, 3, 8, 16), torch.float32).abs().max() <= 0.2)
        True
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

    Example:
        >>> bool(RandomUniform(-0.1, 0.1)((3, 3, 8, 16), torch.float32).abs().max() <= 0.1)
        True
    """

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: None = None) -> None:
        self.minval = _named.number("minval", minval)
        self.maxval = _named.number("maxval", maxval, least=self.minval)
        refuse_seed(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _empty(shape, dtype).uniform_(self.minval, self.maxval).to(dtype)


class Orthogonal(_named.Named):
    """``gain`` times an orthogonal matrix, from the QR decomposition of normal values.

    A shape of more than two axes is that of the matrix (all axes but the last, last): with at least
    as many rows as columns its columns are orthonormal, otherwise its rows are. A. Saxe, J.
    McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks", ICLR 2014 (arXiv:1312.6120).

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
        refuse_seed(seed)

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


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    wide = dtype if dtype == torch.float64 else torch.float32
    return torch.empty(tuple(shape), dtype=wide)


def refuse_seed(seed: object) -> None:
    if seed is not None:
        raise NotImplementedError(
            f"seed: expected None, got {seed!r}; values come from PyTorch's generator, so call "
            "torch.manual_seed before the layer is built"
        )
