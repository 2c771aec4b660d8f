"""``python -m fastbconv bench``: our layers, the deterministic layer and their rivals, timed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see ``cli``, which loads PyTorch's optional parts only when called."""
    from .cli import main as run

    return run(argv)
