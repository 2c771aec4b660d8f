"""Settings and fixtures of all tests. Nothing here skips a test or softens a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cuda_resources
import hypothesis
import pytest
import torch

from fastbconv import _native

# Tests of a GPU need one; where there is none they are not collected.
collect_ignore = [] if torch.cuda.is_available() else ["cuda"]

# The same cases on every run: a failure that nobody can repeat helps nobody.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def _use_test_library(path: str | None) -> None:
    """Another library in place of the package's own: test_cuda_path.py runs tests that way."""
    if path is not None:
        _native._state.module = _native._import(Path(path))
        _native._state.built, _native._state.library = "jit", Path(path)
        _native._state.decided = True


_use_test_library(os.environ.get("FASTBCONV_TEST_LIBRARY"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Whether the tests that need nvcc or a GPU exist here; the header is not shown under -q."""
    terminalreporter.write_line(cuda_resources.summary())


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


ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set; one that this processor lacks stands for its best."""
    native = _native.load()
    before = native.current_isa()
    native.limit_isa(request.param)
    most = min(ISAS.index(request.param), ISAS.index(native.cpu_capability()))
    assert native.current_isa() == ISAS[most]
    yield request.param
    native.limit_isa(before)
