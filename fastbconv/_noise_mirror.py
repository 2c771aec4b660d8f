"""The native generator in plain PyTorch, on any device and under every transform.

The integers here equal the native ones exactly, the float32 draws to a few units in the last place
(the kernels use fixed polynomials). The counter layout is Note [Noise addressing] of
``csrc/core/noise.h``. ``fastbconv.noise`` passes the names on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

STREAMS: Final[dict[str, int]] = {
    "weight": 0,
    "bias": 1,
    "sign_input": 2,
    "sign_output": 3,
    "local": 4,
    "rounding": 5,
    "derive": 15,
}

_MASK32: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> list[Tensor]:
    """Ten rounds on int64 tensors that hold uint32 values. int64 products wrap modulo 2^64, so that
    the low and (masked) high halves are those of the unsigned product."""
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _MASK32) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = product1 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def _noise_words(seed: Tensor, block: Tensor, stream: int, sample: int) -> list[Tensor]:
    """The four words of each block: counter and key as in Note [Noise addressing]."""
    key, offset = seed[0], seed[1] + sample
    zero = torch.zeros_like(block)
    return _rounds(
        block & _MASK32,
        ((block >> 32) & 0x0FFFFFFF) | (stream << 28),
        (offset & _MASK32) + zero,
        ((offset >> 32) & _MASK32) + zero,
        key & _MASK32,
        (key >> 32) & _MASK32,
    )


def check_words(name: str, words: Tensor, last: int) -> None:
    if words.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 holding uint32 values, got {words.dtype}")
    if words.ndim == 0 or words.shape[-1] != last:
        raise ValueError(f"{name}: expected shape (..., {last}), got {tuple(words.shape)}")


def mirror_philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """philox4x32_10 in plain PyTorch."""
    check_words("counter", counter, 4)
    check_words("key", key, 2)
    return torch.stack(_rounds(*counter.unbind(-1), *key.unbind(-1)), dim=-1)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of normals. u and the angle are rounded to float32 as the kernels round them; the
    functions are then evaluated in float64 and rounded once."""
    u = (radius_word >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
    radius = torch.sqrt((-2.0 * torch.log(u.to(torch.float64))).clamp_min(0.0))
    doubled = (angle_word << 1) & _MASK32
    signed = doubled - ((doubled >> 31) << 32)
    angle = (signed.to(torch.float32) * 2.0**-31).to(torch.float64) * (math.pi / 2)
    sign = (1 - 2 * (angle_word >> 31)).to(torch.float64)
    cosine, sine = radius * torch.cos(angle) * sign, radius * torch.sin(angle)
    return cosine.to(torch.float32), sine.to(torch.float32)


def _element_words(
    seed: Tensor, numel: int, stream: int, sample: int, element_offset: int
) -> tuple[list[Tensor], slice]:
    """The words of the blocks that hold some elements, and where those elements lie in them."""
    first = element_offset // 4
    last = (element_offset + numel + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    start = element_offset - 4 * first
    return _noise_words(seed, block, stream, sample), slice(start, start + numel)


def mirror_standard_normal(
    seed: Tensor, numel: int, *, stream: int = 0, sample: int = 0, element_offset: int = 0
) -> Tensor:
    """Draws of elements [element_offset, element_offset + numel) in plain PyTorch: (numel,)."""
    word, where = _element_words(seed, numel, stream, sample, element_offset)
    pairs = (*_box_muller(word[0], word[1]), *_box_muller(word[2], word[3]))
    return torch.stack(pairs, dim=-1).flatten()[where]


def mirror_random_signs(
    seed: Tensor, numel: int, *, stream: int, sample: int = 0, element_offset: int = 0
) -> Tensor:
    """Signs of elements [element_offset, element_offset + numel) in plain PyTorch: (numel,)."""
    word, where = _element_words(seed, numel, stream, sample, element_offset)
    return (1 - 2 * (torch.stack(word, dim=-1).flatten()[where] & 1)).to(torch.float32)


def mirror_weight_eps(
    seed: Tensor,
    weight_shape: Sequence[int],
    sample: int = 0,
    *,
    stream: int = 0,
    element_offset: int = 0,
) -> Tensor:
    """weight_eps in plain PyTorch."""
    numel = math.prod(weight_shape)
    flat = mirror_standard_normal(
        seed, numel, stream=stream, sample=sample, element_offset=element_offset
    )
    return from_element_order(flat, weight_shape)


def from_element_order(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """(numel,) in element order (K, taps, C) -> ``shape`` = (K, C, *taps), as a view."""
    if len(shape) < 2:
        return flat.reshape(tuple(shape))
    return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def mirror_derive_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    """derive_range in plain PyTorch."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=seed.device)
    return children_of(seed, block)


def children_of(parent: Tensor, block: Tensor) -> Tensor:
    word = _noise_words(parent, block, STREAMS["derive"], 0)
    return torch.stack((word[0] | (word[1] << 32), word[2] | (word[3] << 32)), dim=-1)
