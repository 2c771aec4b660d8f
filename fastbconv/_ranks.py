"""Which process of a distributed run this is, as far as noise is concerned."""

from __future__ import annotations

from types import TracebackType
from typing import Final

import torch

_RANK_SHIFT: Final = 48


class _Group:
    """The process group whose rank separates drawn seeds; "world" is the default."""

    def __init__(self) -> None:
        self.group: object = "world"


_GROUP: Final = _Group()


class data_parallel_group:
    """Names the group whose rank separates the noise of ranks; None: all ranks share their noise.

    Seeds that a layer draws itself are moved by ``rank << 48`` draws, so that ranks differ even
    after equal ``torch.manual_seed``. Seeds given by the caller are never moved. Takes effect at
    once for the process; used in a ``with`` statement, it restores the former group at the end.

    Args:
        group: a torch.distributed process group, "world", or None.

    Example:
        >>> with data_parallel_group(None):    # every rank draws the same weights
        ...     rank_offset()
        0
    """

    def __init__(self, group: object = "world") -> None:
        self._former = _GROUP.group
        _GROUP.group = group

    def __enter__(self) -> data_parallel_group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _GROUP.group = self._former


def rank_offset() -> int:
    """What is added to the offset of a drawn seed: ``rank << 48``, 0 outside distributed runs.

    Returns:
        An int that fits into 64 bits with sign.

    Example:
        >>> rank_offset()
        0
    """
    group = _GROUP.group
    if group is None or not torch.distributed.is_available():
        return 0
    if not torch.distributed.is_initialized():
        return 0
    rank = torch.distributed.get_rank(None if isinstance(group, str) else group)
    value = (max(rank, 0) << _RANK_SHIFT) & ((1 << 64) - 1)
    return value - (1 << 64) if value >> 63 else value
