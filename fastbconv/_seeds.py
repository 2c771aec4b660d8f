"""Seeds: what a caller gives, and what is drawn from PyTorch's generator.

``fastbconv.noise`` passes the names on.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ._arguments import type_name


def as_int64(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2^64."""
    # Seeds first, by comparison: the compiler traces an int that changes, and knows no mask of one
    # that is negative or above 2^63.
    if -(1 << 63) <= value < 1 << 63:
        return value
    if 1 << 63 <= value < 1 << 64:
        return value - (1 << 64)
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def seed_tensor(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The int64 tensor ``(key, offset)`` that the operators take.

    Args:
        seed: an int ``n`` (NumPy's too), meaning ``(n, 0)``, or an int64 tensor of shape (2,).
        device: where the tensor is needed; None leaves it where it is.

    Returns:
        int64 tensor of shape (2,).

    Raises:
        TypeError: ``seed`` is neither an int nor an int64 tensor.
        ValueError: the shape is not (2,), the int does not fit into 64 bits, or a tensor on the
            meta device, which has no values, is to serve another device.

    Example:
        >>> seed_tensor(7)
        tensor([7, 0])
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.shape != (2,):
            raise ValueError(f"seed: expected shape (2,), got {tuple(seed.shape)}")
        if device is None or seed.device == torch.device(device):
            return seed
        if seed.device.type == "meta":
            raise ValueError(
                f"seed: expected a tensor on {device}, got one on meta, which has no values"
            )
        return seed.to(device)
    seed = _seed_number(seed)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: expected an integer of at most 64 bits, got {seed}")
    if device is None or torch.device(device).type == "cpu":
        return torch.tensor([as_int64(seed), 0], dtype=torch.int64)
    # A copy from the host would wait for the device, and cannot be captured in a graph.
    tensor = torch.zeros(2, dtype=torch.int64, device=device)
    tensor[:1].fill_(as_int64(seed))
    return tensor


def _seed_number(seed: object) -> int:
    """An int seed; anything with __index__ except the bools is one."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return seed
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(
            f"seed: expected an int or an int64 tensor of shape (2,), got {type_name(seed)}"
        )
    return operator.index(seed)


def draw_seed(
    generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """A fresh seed from PyTorch's generator: ``torch.manual_seed`` governs it.

    The ``generator`` keyword is passed even when it is None: without it the compiler would replace
    the draw by one of its own stream, and a compiled layer would differ from an eager one.

    Args:
        generator: where the seed is drawn from; None: PyTorch's default generator of the device.
        device: of the seed, and of the generator.

    Returns:
        int64 tensor (2,). The offset of a rank (``rank_offset``) is not in it.

    Raises:
        NotImplementedError: a generator object is given while torch.compile is tracing.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> first = draw_seed()
        >>> _ = torch.manual_seed(0)
        >>> torch.equal(draw_seed(), first)
        True
    """
    if generator is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "generator: expected None under torch.compile, got a torch.Generator; draw the seed "
            "outside the compiled function with fastbconv.noise.draw_seed(generator) and pass it "
            "as seed="
        )
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )
