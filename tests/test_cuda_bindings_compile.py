"""The CUDA bindings compile where there are CUDA headers, against a PyTorch with or without CUDA.

A PyTorch without CUDA has c10's CUDA headers but for one that its build makes: a stub stands in.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from fastbconv import _build

CSRC = Path(__file__).resolve().parents[1] / "csrc"
BINDINGS = CSRC / "bindings"
# All that CUDA changes: its own files, and those that ask device.h.
SOURCES = sorted(
    path
    for path in BINDINGS.glob("*.cpp")
    if path.name.startswith("cuda_") or '"device.h"' in path.read_text()
)


def cuda_include() -> Path | None:
    nvcc = _build.cuda.find_nvcc()
    if nvcc is None:
        return None
    folders = [Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    return next((path for path in folders if (path / "cuda_runtime_api.h").exists()), None)


INCLUDE = cuda_include()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stub")
    header = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    header.parent.mkdir(parents=True)
    header.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    (folder / _build.STAMP_HEADER).write_text(
        '#pragma once\n#define FBC_SOURCE_HASH ""\n#define FBC_BUILD_STAMP ""\n'
    )
    return folder


@pytest.mark.parametrize("path", SOURCES if INCLUDE else [], ids=lambda path: path.name)
def test_binding_compiles_with_cuda(path: Path, stub: Path) -> None:
    import sysconfig

    spec = _build.build_spec(CSRC)
    folders = [stub, *spec.include_dirs, sysconfig.get_paths()["include"]]
    torch_folders = cpp_extension.include_paths()  # the stub before what a CUDA build generated
    command = [
        *_build.compiler_command().split(),
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-DFBC_WITH_CUDA",
        *(f"-I{folder}" for folder in folders),
        *(f"-isystem{folder}" for folder in (*torch_folders, INCLUDE)),
        str(path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "warning" not in run.stderr, run.stderr[-4000:]
