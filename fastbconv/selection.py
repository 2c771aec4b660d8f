"""Which kernel a call uses: the process-wide choice and its explanation.

The choice becomes an int argument of the operator, saved for backward; native code reads no state
of a thread or of Python.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Literal

import torch
from torch import Tensor

Algorithm = Literal["auto", "direct", "winograd2", "winograd4", "library", "reference"]

ALGORITHM_ID: Final[dict[str, int]] = {
    "auto": 0,
    "direct": 1,
    "winograd2": 2,
    "winograd4": 3,
    "library": 4,
    "reference": 0,
}


class _Choice:
    """The choice in force. Plain attributes: torch.compile guards on them."""

    def __init__(self) -> None:
        self.name: str = "auto"
        self.keep_weight: bool = False


CHOICE: Final = _Choice()


class algorithm:
    """Chooses the kernels: at once for the process, or for a ``with`` block.

    Args:
        name: "auto" picks by shape, dtype, layout and instruction set; "direct", "winograd2" and
            "winograd4" are the fused kernels, "library" is the fused sampling pass followed by
            PyTorch's convolution, "reference" the definition in plain PyTorch.
        keep_weight: save the sampled weight for backward, in the compute dtype, instead of
            regenerating it.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: "library" under torch.use_deterministic_algorithms(True).

    Example:
        >>> with algorithm("reference"):
        ...     pass
    """

    def __init__(self, name: Algorithm = "auto", *, keep_weight: bool = False) -> None:
        if name not in ALGORITHM_ID:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHM_ID)}, got {name!r}")
        if name == "library" and torch.are_deterministic_algorithms_enabled():
            raise NotImplementedError(
                "algorithm: expected a deterministic one under "
                "torch.use_deterministic_algorithms(True), got 'library', whose weight gradient "
                "depends on the number of threads; use 'auto' or 'direct'"
            )
        self._former = (CHOICE.name, CHOICE.keep_weight)
        CHOICE.name, CHOICE.keep_weight = name, bool(keep_weight)

    def __enter__(self) -> algorithm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        CHOICE.name, CHOICE.keep_weight = self._former


@torch.compiler.assume_constant_result
def native_available() -> bool:
    """Whether the operators are there; loads the native library at the first call."""
    try:
        from . import ops
    except ImportError:
        return False
    return ops.available()


def use_native(tensor: Tensor) -> bool:
    """Whether a call on this tensor goes to the operators, else to the reference."""
    if CHOICE.name == "reference" or tensor.device.type not in ("cpu", "meta"):
        return False
    return native_available()
