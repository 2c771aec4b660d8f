"""First values of variables: ``f(shape, dtype) -> tensor``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Initializer = Callable[[Sequence[int], torch.dtype], Tensor]


class RandomNormal:
    """Initialiser N(mean, stddev^2), drawn from PyTorch's generator at each call.

    Two variables of equal shape get different values: TFP's recorded behaviour, one set of numbers
    per shape, starts layers equal and is not reproduced.

    Args:
        mean: mean of the values.
        stddev: their standard deviation (not truncated).
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05) -> None:
        self.mean, self.stddev = float(mean), float(stddev)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        wide = dtype if dtype == torch.float64 else torch.float32
        return torch.empty(tuple(shape), dtype=wide).normal_(self.mean, self.stddev).to(dtype)

    def get_config(self) -> dict[str, float]:
        """The arguments, by name."""
        return {"mean": self.mean, "stddev": self.stddev}

    def __repr__(self) -> str:
        return f"RandomNormal(mean={self.mean}, stddev={self.stddev})"


def glorot_uniform(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Keras's initialiser of a weight that names none."""
    fan_in, fan_out = (shape[-2], shape[-1]) if len(shape) > 1 else (math.prod(shape),) * 2
    window = math.prod(shape[:-2])
    limit = math.sqrt(6.0 / max(window * (fan_in + fan_out), 1))
    return torch.empty(tuple(shape)).uniform_(-limit, limit).to(dtype)
