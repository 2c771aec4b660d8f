"""Standard-normal noise by address: seeds, and the Python mirror of the native generator.

A draw is a pure function of (key, offset + sample, stream, element) and of nothing else. The
counter layout is Note [Noise addressing] of ``csrc/core/noise.h``.

The functions named ``mirror_*`` are plain PyTorch (``_noise_mirror.py``). The public ones use the
native generator where it is loaded, and return its bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from ._arguments import integer
from ._noise_mirror import STREAMS as _STREAMS
from ._noise_mirror import (
    check_words,
    children_of,
    from_element_order,
    mirror_philox4x32_10,
    mirror_random_signs,
    mirror_standard_normal,
)
from ._noise_mirror import mirror_derive_seeds as mirror_derive_seeds
from ._noise_mirror import mirror_weight_eps as mirror_weight_eps
from ._ranks import data_parallel_group as data_parallel_group
from ._ranks import rank_offset as rank_offset
from ._seeds import as_int64
from ._seeds import draw_seed as draw_seed
from ._seeds import seed_tensor as seed_tensor

__all__ = [
    "STREAMS",
    "data_parallel_group",
    "derive",
    "derive_range",
    "draw_seed",
    "philox4x32_10",
    "random_signs",
    "rank_offset",
    "seed_tensor",
    "standard_normal",
    "stream_id",
    "weight_eps",
]


STREAMS: Final[dict[str, int]] = _STREAMS
"""Name -> number of the streams: draws of different streams are unrelated."""


def stream_id(stream: str | int) -> int:
    """The number of a noise stream, from its name.

    Args:
        stream: a name, one of ``STREAMS``, or a number.

    Returns:
        The number.

    Raises:
        ValueError: an unknown name, or a negative number.
        TypeError: neither a string nor an integer.

    Example:
        >>> stream_id("bias")
        1
    """
    if isinstance(stream, str):
        if stream not in STREAMS:
            raise ValueError(f"stream: expected one of {sorted(STREAMS)}, got {stream!r}")
        return STREAMS[stream]
    return integer("stream", stream, 0)


# --- seeds ----------------------------------------------------------------------------------------


def derive(seed: int | Tensor, index: int) -> Tensor:
    """An independent child seed: the four Philox words of block ``index`` in stream 15.

    Args:
        seed: the parent, an int or an int64 tensor of shape (2,).
        index: non-negative number of the child.

    Returns:
        int64 tensor (2,): key = word 0 | word 1 << 32, offset = word 2 | word 3 << 32.

    Raises:
        ValueError: ``index`` is negative, or a seed of another shape.
        TypeError: ``index`` is no integer, or a seed of another type.

    Example:
        >>> first, second = derive(7, 0), derive(7, 1)
        >>> torch.equal(first, second)
        False
    """
    parent = seed_tensor(seed)
    if not isinstance(index, Tensor):
        return derive_range(parent, integer("index", index, 0), 1)[0]
    block = torch.as_tensor(index, dtype=torch.int64, device=parent.device)
    return children_of(parent, block)


def derive_range(seed: int | Tensor, first: int, count: int) -> Tensor:
    """The children ``first`` to ``first + count`` of a seed, as ``derive`` gives them: (count, 2).

    One launch on a device that the native library serves.

    Args:
        seed: the parent, as in ``derive``.
        first: number of the first child.
        count: how many.

    Returns:
        int64 tensor (count, 2).

    Raises:
        ValueError, TypeError: a seed that ``seed_tensor`` does not take.

    Example:
        >>> torch.equal(derive_range(7, 2, 3)[1], derive(7, 3))
        True
    """
    parent = seed_tensor(seed)
    native = _native_ops(parent.device)
    if native is None:
        return mirror_derive_seeds(parent, first, count)
    return native.derive_seeds(parent, first, count)


# --- Philox4x32-10 --------------------------------------------------------------------------------


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: the generator of all noise, as the kernels compute it.

    J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011
    (doi:10.1145/2063384.2063405). The example is one of its published known answers.

    Args:
        counter: (..., 4) int64 holding uint32 values.
        key: (..., 2) int64 holding uint32 values; leading dimensions broadcast.

    Returns:
        (..., 4) int64 holding uint32 values.

    Raises:
        TypeError: another dtype.
        ValueError: another last dimension.

    Example:
        >>> words = philox4x32_10(torch.zeros(4, dtype=torch.int64), torch.zeros(2).long())
        >>> [f"{word:08x}" for word in words.tolist()]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    check_words("counter", counter, 4)
    check_words("key", key, 2)
    native = _native_ops(counter.device)
    if native is None:
        return mirror_philox4x32_10(counter, key)
    lead = torch.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    return native.philox4x32_10(counter.expand(*lead, 4), key.expand(*lead, 2))


# --- normals --------------------------------------------------------------------------------------


def standard_normal(
    seed: int | Tensor,
    shape: int | Sequence[int],
    *,
    sample: int = 0,
    stream: str | int = "weight",
    element_offset: int = 0,
) -> Tensor:
    """Standard-normal draws: the row-major index is the element number.

    Two words of Philox make two normals by the transformation of G. Box, M. Muller, "A note on the
    generation of random normal deviates", Annals of Mathematical Statistics 29, 1958.

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
        TypeError: an argument of another type.

    Example:
        >>> draws = standard_normal(7, (1000,))
        >>> torch.equal(standard_normal(7, (10,), element_offset=5), draws[5:15])
        True
    """
    return _draw("standard_normal", seed, shape, sample, stream, element_offset)


def random_signs(
    seed: int | Tensor,
    shape: int | Sequence[int],
    *,
    sample: int = 0,
    stream: str | int = "sign_input",
    element_offset: int = 0,
) -> Tensor:
    """Random signs, +1 or -1 with equal probability: the low bit of each element's word.

    Flipout's signs of an input with N rows and C channels are
    ``random_signs(seed, (N, C), stream="sign_input")``, those of its K output channels
    ``random_signs(seed, (N, K), stream="sign_output")``. With several draws N are the rows of one,
    and ``sample`` is the draw. The noise of local reparameterisation is
    ``standard_normal(seed, (N, P, Q, K), sample=draw, stream="local")``.

    Args:
        seed: as in ``standard_normal``, like all that follows.
        shape: shape of the result.
        sample: see there.
        stream: see there.
        element_offset: see there.

    Returns:
        float32 tensor of shape ``shape`` on the device of ``seed``.

    Raises:
        ValueError: a negative size or offset, or an unknown stream.
        TypeError: an argument of another type.

    Example:
        >>> random_signs(7, (2, 3)).abs().sum()
        tensor(6.)
    """
    return _draw("random_signs", seed, shape, sample, stream, element_offset)


_MIRRORS: Final = {"standard_normal": mirror_standard_normal, "random_signs": mirror_random_signs}


def _draw(
    kind: str,
    seed: int | Tensor,
    shape: int | Sequence[int],
    sample: int,
    stream: str | int,
    element_offset: int,
) -> Tensor:
    shape = tuple(shape) if isinstance(shape, Sequence) else (integer("shape", shape, 0),)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected non-negative sizes, got {shape}")
    element_offset = integer("element_offset", element_offset, 0)
    seed = seed_tensor(seed)
    native = _native_ops(seed.device)
    draw = _MIRRORS[kind] if native is None else getattr(native, kind)
    flat = draw(
        seed,
        math.prod(shape),
        stream=stream_id(stream),
        sample=as_int64(operator.index(sample)),
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

    Raises:
        ValueError: a negative size or offset, or an unknown stream.
        TypeError: an argument of another type.

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
    return from_element_order(flat, tuple(weight_shape))


def _native_ops(device: torch.device) -> ModuleType | None:
    """fastbconv.ops where the native library serves this device, and no transform is active."""
    if device.type not in ("cpu", "cuda") or torch._C._are_functorch_transforms_active():
        return None
    from . import ops

    return ops if ops.available() and (device.type == "cpu" or ops.cuda()) else None
