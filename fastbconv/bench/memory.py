"""Memory as the benchmark sees it: fresh or recycled pages, and what backward keeps."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# malloc.h of glibc: parameter numbers of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8

MODES = {
    "user": (
        "as a user gets it: the C library's allocator as it is. A large output is fresh pages at "
        "each call, and writing to them costs a page fault every 4 KiB (2 MiB where huge pages "
        "are advised and granted)."
    ),
    "recycled": (
        "outputs recycled on both sides: the allocator keeps what is freed (one arena, no mmap, no "
        "trimming) for every column alike, so that results land in pages that exist already."
    ),
}


def can_recycle() -> bool:
    """Whether the allocator is glibc's, whose settings the mode needs."""
    return platform.libc_ver()[0] == "glibc"


def recycle_pages() -> None:
    """Tells malloc to keep all memory it ever got; for a process of its own, before any work.

    Raises:
        NotImplementedError: the C library has no mallopt, or it refused.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError) as error:
        raise NotImplementedError("mode: 'recycled' needs glibc; use --modes user") from error
    for parameter, value in (
        (_MMAP_MAX, 0),
        (_MMAP_THRESHOLD, 2**30),
        (_TRIM_THRESHOLD, -1),
        (_ARENA_MAX, 1),
    ):
        if mallopt(parameter, value) != 1:
            raise NotImplementedError(
                f"mode: 'recycled' needs mallopt({parameter}, {value}), which was refused"
            )


def grow_pool(size: int) -> None:
    """Touches ``size`` bytes once and frees them: the pages that later results land in."""
    torch.ones(size, dtype=torch.uint8)


def saved_bytes(make: Callable[[], object], known: Sequence[Tensor]) -> int:
    """Bytes that backward keeps beyond what lives anyway.

    Args:
        make: a forward pass with a graph; returns the tensors that its caller holds.
        known: input and parameters.

    Returns:
        Sum over distinct storages that autograd saved, without those of ``known`` and of the
        results.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = make()
    held = [value for value in (*results, *known) if isinstance(value, Tensor)]
    anyway = {value.untyped_storage().data_ptr() for value in held}
    return sum(s.nbytes() for address, s in kept.items() if address not in anyway)


def cache_evictor(size: int) -> Callable[[], None]:
    """A call that leaves ``size`` bytes of something else in the caches."""
    buffer = torch.zeros(size // 4)

    def evict() -> None:
        buffer.add_(1.0)

    return evict
