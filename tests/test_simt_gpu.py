"""The programs of tests/simt compile for a GPU too; tests/cuda runs them where there is one."""

from __future__ import annotations

from pathlib import Path

import cuda_resources
import pytest
import simt_gpu

NVCC = cuda_resources.find_nvcc()


def test_every_program_is_listed() -> None:
    programs = {path.stem for path in simt_gpu.FOLDER.glob("test_*.cpp")}
    assert programs == {*simt_gpu.PROGRAMS, "test_interpreter"}


def test_a_program_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\necho begun\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(simt_gpu, "TIME_LIMIT", 1)
    result = simt_gpu.run_program(tmp_path, "hangs")
    assert not result.passed
    assert result.status is None
    assert "begun" in result.output


class TestCompilation:
    __test__ = NVCC is not None

    @pytest.mark.parametrize("program", simt_gpu.PROGRAMS)
    def test_program_compiles(self, program: str, tmp_path: Path) -> None:
        assert NVCC is not None
        simt_gpu.compile_program(
            NVCC, program, tmp_path / "code.ptx", "-ptx", "-arch=compute_80", "-Xcicc=-O0"
        )
