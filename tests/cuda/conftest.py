"""Fixtures of the tests that need a GPU; the folder is collected only where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def _fixed_precision() -> Iterator[None]:
    """cuDNN's settings as a fresh process has them, whatever a test changes."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
