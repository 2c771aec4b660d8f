"""Standard-normal noise by address: seeds, and the Python mirror of the native generator.

A draw is a pure function of (key, offset + sample, stream, element) and of nothing else. The
counter layout is Note [Noise addressing] of ``csrc/core/noise.h``; the integers here equal the
native ones exactly, the float32 draws to a few units in the last place (the kernels use fixed
polynomials).

The functions named ``mirror_*`` are plain PyTorch and run on any device and under every transform.
The public ones use the native generator where it is loaded, and return its bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from ._arguments import integer, type_name
from ._ranks import data_parallel_group as data_parallel_group
from ._ranks import rank_offset as rank_offset

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


def stream_id(stream: str | int) -> int:
    """The number of a noise stream, from its name."""
    if isinstance(stream, str):
        if stream not in STREAMS:
            raise ValueError(f"stream: expected one of {sorted(STREAMS)}, got {stream!r}")
        return STREAMS[stream]
    return integer("stream", stream, 0)


def _as_int64(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# --- seeds ----------------------------------------------------------------------------------------


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
        return torch.tensor([_as_int64(seed), 0], dtype=torch.int64)
    # A copy from the host would wait for the device, and cannot be captured in a graph.
    tensor = torch.zeros(2, dtype=torch.int64, device=device)
    tensor[:1].fill_(_as_int64(seed))
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

    Raises:
        NotImplementedError: a generator object is given while torch.compile is tracing.
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


def derive(seed: int | Tensor, index: int) -> Tensor:
    """An independent child seed: the four Philox words of block ``index`` in stream 15.

    Args:
        seed: the parent, an int or an int64 tensor of shape (2,).
        index: non-negative number of the child.

    Returns:
        int64 tensor (2,): key = word 0 | word 1 << 32, offset = word 2 | word 3 << 32.

    Raises:
        ValueError: ``index`` is negative.
        TypeError: ``index`` is no integer.
    """
    parent = seed_tensor(seed)
    if not isinstance(index, Tensor):
        return derive_range(parent, integer("index", index, 0), 1)[0]
    block = torch.as_tensor(index, dtype=torch.int64, device=parent.device)
    return _children(parent, block)


def derive_range(seed: int | Tensor, first: int, count: int) -> Tensor:
    """The children ``first`` to ``first + count`` of a seed, as ``derive`` gives them: (count, 2).

    One launch on a device that the native library serves.
    """
    parent = seed_tensor(seed)
    native = _native_ops(parent.device)
    if native is None:
        return mirror_derive_seeds(parent, first, count)
    return native.derive_seeds(parent, first, count)


def mirror_derive_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    """derive_range in plain PyTorch."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=seed.device)
    return _children(seed, block)


def _children(parent: Tensor, block: Tensor) -> Tensor:
    word = _noise_words(parent, block, STREAMS["derive"], 0)
    return torch.stack((word[0] | (word[1] << 32), word[2] | (word[3] << 32)), dim=-1)


# --- Philox4x32-10 --------------------------------------------------------------------------------


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


def _check_words(name: str, words: Tensor, last: int) -> None:
    if words.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 holding uint32 values, got {words.dtype}")
    if words.ndim == 0 or words.shape[-1] != last:
        raise ValueError(f"{name}: expected shape (..., {last}), got {tuple(words.shape)}")


def mirror_philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """philox4x32_10 in plain PyTorch."""
    _check_words("counter", counter, 4)
    _check_words("key", key, 2)
    return torch.stack(_rounds(*counter.unbind(-1), *key.unbind(-1)), dim=-1)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: the generator of all noise, as the kernels compute it.

    Args:
        counter: (..., 4) int64 holding uint32 values.
        key: (..., 2) int64 holding uint32 values; leading dimensions broadcast.

    Returns:
        (..., 4) int64 holding uint32 values.

    Raises:
        TypeError: another dtype.
        ValueError: another last dimension.
    """
    _check_words("counter", counter, 4)
    _check_words("key", key, 2)
    native = _native_ops(counter.device)
    if native is None:
        return mirror_philox4x32_10(counter, key)
    lead = torch.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    return native.philox4x32_10(counter.expand(*lead, 4), key.expand(*lead, 2))


# --- normals --------------------------------------------------------------------------------------


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


def mirror_standard_normal(
    seed: Tensor, numel: int, *, stream: int = 0, sample: int = 0, element_offset: int = 0
) -> Tensor:
    """Draws of elements [element_offset, element_offset + numel) in plain PyTorch: (numel,)."""
    first = element_offset // 4
    last = (element_offset + numel + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    word = _noise_words(seed, block, stream, sample)
    pairs = (*_box_muller(word[0], word[1]), *_box_muller(word[2], word[3]))
    start = element_offset - 4 * first
    return torch.stack(pairs, dim=-1).flatten()[start : start + numel]


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
    return _from_element_order(flat, weight_shape)


def _from_element_order(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """(numel,) in element order (K, taps, C) -> ``shape`` = (K, C, *taps), as a view."""
    if len(shape) < 2:
        return flat.reshape(tuple(shape))
    return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def standard_normal(
    seed: int | Tensor,
    shape: int | Sequence[int],
    *,
    sample: int = 0,
    stream: str | int = "weight",
    element_offset: int = 0,
) -> Tensor:
    """Standard-normal draws: the row-major index is the element number.

    Args:
        seed: an int ``n``, meaning ``(n, 0)``, or an int64 tensor of shape (2,).
        shape: shape of the result.
        sample: number of the draw; sample 1 of ``(n, m)`` is sample 0 of ``(n, m + 1)``.
        stream: name of the stream, one of ``STREAMS``.
        element_offset: number of the first element.

    Returns:
        float32 tensor of shape ``shape`` on the device of ``seed``.

    Raises:
        ValueError: a negative size or offset, or an unknown stream.
    """
    shape = tuple(shape) if isinstance(shape, Sequence) else (integer("shape", shape, 0),)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected non-negative sizes, got {shape}")
    element_offset = integer("element_offset", element_offset, 0)
    seed = seed_tensor(seed)
    native = _native_ops(seed.device)
    draw = mirror_standard_normal if native is None else native.standard_normal
    flat = draw(
        seed,
        math.prod(shape),
        stream=stream_id(stream),
        sample=_as_int64(operator.index(sample)),
        element_offset=element_offset,
    )
    return flat.reshape(shape)


def weight_eps(
    seed: int | Tensor,
    weight_shape: Sequence[int],
    sample: int = 0,
    *,
    stream: str | int = "weight",
    element_offset: int = 0,
) -> Tensor:
    """The eps of exactly that weight: ``weight = loc + scale * eps``.

    Args:
        seed: an int ``n``, meaning ``(n, 0)``, or an int64 tensor of shape (2,).
        weight_shape: (K, C/G, R, S), (K, C) for a linear layer, (K,) for a bias.
        sample: number of the draw.
        stream: "weight", or "bias" for a bias.
        element_offset: number of the first element, for a shard of a larger weight.

    Returns:
        float32 tensor of shape ``weight_shape``, a view whose memory is in KRSC order.

    Example:
        >>> eps = weight_eps(7, (8, 3, 5, 5))
        >>> tuple(eps.shape)
        (8, 3, 5, 5)
    """
    flat = standard_normal(
        seed,
        math.prod(weight_shape),
        sample=sample,
        stream=stream,
        element_offset=element_offset,
    )
    return _from_element_order(flat, tuple(weight_shape))


def _native_ops(device: torch.device) -> ModuleType | None:
    """fastbconv.ops where the native library serves this device, and no transform is active."""
    if device.type not in ("cpu", "cuda") or torch._C._are_functorch_transforms_active():
        return None
    from . import ops

    return ops if ops.available() and (device.type == "cpu" or ops.cuda()) else None
