"""Settings and fixtures of all tests. Nothing here skips a test or softens a failure."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# The same cases on every run: a failure that nobody can repeat helps nobody.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _fixed_state():
    """Each test starts from the same generator, thread count and default dtype."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own, so that a test's data do not depend on what it draws elsewhere."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def seed() -> torch.Tensor:
    """A noise seed, (key, offset)."""
    return torch.tensor([0x243F6A8885A308D3, 7], dtype=torch.int64)
