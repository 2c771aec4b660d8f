"""The native test programs of tests/simt, compiled by nvcc and run on the GPU that is here."""

from __future__ import annotations

from pathlib import Path

import cuda_resources
import pytest
import simt_gpu
import torch

NVCC = cuda_resources.find_nvcc()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert NVCC is not None
    target = tmp_path_factory.mktemp("simt_gpu")
    major, minor = torch.cuda.get_device_capability()
    simt_gpu.build(NVCC, target, f"{major}{minor}")
    return target


class TestPrograms:
    __test__ = NVCC is not None

    @pytest.mark.parametrize("program", simt_gpu.PROGRAMS)
    def test_program(self, folder: Path, program: str) -> None:
        result = simt_gpu.run_program(folder, program, "0")
        assert result.passed, f"status {result.status}\n{result.output[-8000:]}"
