"""A CUDA build that fails leaves a CPU library; what depends on csrc/cuda and what does not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from fake_project import ROOT, FakeProject

from fastbconv import _build, _builder, _native

CUDA = "csrc/cuda/kernel_gpu.cu"

# torch here may be without CUDA: every process of the project believes that it has 13.0.
PRETEND = """
import os
import torch
import torch.utils.cpp_extension as builder
torch.version.cuda = "13.0"
builder.CUDA_HOME = None if "NO_HOME" in os.environ else os.environ.get("CUDA_HOME")
"""
REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastbconv import _native
    for _ in range(2):
        _native.load()
info = _native.build_info()
told = [str(w.message) for w in caught if "fastbconv" in str(w.message)]
names = ("built", "answer", "cuda", "cuda_reason", "attempts")
print(json.dumps({"told": told, **{name: info.get(name) for name in names}}))
"""


class CudaProject(FakeProject):
    """With a kernel, and an nvcc that refuses it and counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.write(CUDA, "int gpu() { return 1; }\n")
        self.write("pretend/sitecustomize.py", PRETEND)
        self.home = folder / "home"
        self.calls = folder / "calls"
        nvcc = self.home / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.1";;
  --list-gpu-arch) echo compute_90;;
  *) echo call >> {self.calls}; echo "nvcc fatal   : no such thing as the kernel" >&2; exit 1;;
esac
"""
        )
        nvcc.chmod(0o755)

    def report(self, **extra: str) -> dict:
        given = {"PYTHONPATH": str(self.folder / "pretend"), "CUDA_HOME": str(self.home), **extra}
        given = {"TORCH_CUDA_ARCH_LIST": "9.0", **given}
        status, out, err = self.run(REPORT, **given)
        assert status == 0, err
        return {**json.loads(out.splitlines()[-1]), "err": err}

    def compiled(self) -> int:
        """How often nvcc was asked to compile."""
        return self.calls.read_text().count("call") if self.calls.exists() else 0

    def record(self) -> Path:
        (found,) = self.cache.glob("*.failed.json")
        return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> CudaProject:
    for name in ("CUDA_PATH", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    return CudaProject(tmp_path)


def test_a_failed_cuda_build_leaves_a_cpu_library(project) -> None:
    first = project.report()
    assert (first["built"], first["answer"], first["cuda"]) == ("jit", 42, False)
    assert project.compiled() == 1
    (told,) = first["told"]
    for text in (told, first["cuda_reason"], first["attempts"][0]):
        assert "nvcc fatal   : no such thing as the kernel" in text
        assert "compiled without CUDA instead" in text
        assert f"rm '{project.record()}'" in text
    assert len(first["attempts"]) == 1
    assert "fastbconv: CUDA is left out: it does not compile" in first["err"]

    again = project.report()  # the same words, and nothing is compiled
    assert project.compiled() == 1
    assert "compiling" not in again["err"]
    for name in ("built", "answer", "told", "cuda_reason", "attempts"):
        assert again[name] == first[name]


def test_a_failed_cuda_build_is_tried_again_when_something_changed(project) -> None:
    project.report()
    project.write(CUDA, "int gpu() { return 2; }\n")
    changed = project.report()
    assert project.compiled() == 2
    assert changed["err"].count("compiling the native library (about") == 0  # the CPU part is there
    project.report(NVCC_APPEND_FLAGS="-DX")
    assert project.compiled() == 3
    for record in project.cache.glob("*.failed.json"):
        record.unlink()
    project.report(NVCC_APPEND_FLAGS="-DX")
    assert project.compiled() == 4
    project.report(NVCC_APPEND_FLAGS="-DX")
    assert project.compiled() == 4


def test_a_home_that_torch_does_not_find(project) -> None:
    found = project.report(NO_HOME="1")
    assert (found["built"], found["answer"]) == ("jit", 42)
    assert "CUDA_HOME environment variable is not set" in found["told"][0]
    assert "Traceback" not in found["told"][0]


def test_no_record_where_the_cpu_part_fails_too(project) -> None:
    project.write("csrc/cpu/kernel.cpp", "int kernel() { return undeclared_name; }\n")
    found = project.report()
    assert found["built"] == "reference"
    assert "undeclared_name" in found["told"][0]
    assert not list(project.cache.glob("*.failed.json"))


def test_wrong_architectures_are_not_compiled(project) -> None:
    found = project.report(TORCH_CUDA_ARCH_LIST="99.0")
    assert project.compiled() == 0
    assert (found["built"], found["told"]) == ("jit", [])
    assert "expected some of 9.0 (nvcc 13.0)" in found["cuda_reason"]
    assert "CUDA is left out: TORCH_CUDA_ARCH_LIST: expected" in found["err"]


def test_a_damaged_record_does_not_count(tmp_path: Path) -> None:
    spec = _build.build_spec()
    for text in ("", "[]", "{}", '{"said": "no", "variables": {"CXX": "other"}}'):
        _builder.failure_record(spec, tmp_path).write_text(text)
        assert _builder.known_failure(spec, tmp_path) is None
    _builder.remember_failure(spec, tmp_path, "no")
    assert _builder.known_failure(spec, tmp_path) == "no"
    _builder.remember_failure(spec, tmp_path / "nowhere", "no")
    assert _builder.known_failure(spec, tmp_path / "nowhere") is None


# --- what a CPU library depends on ----------------------------------------------------------------


def test_a_kernel_file_is_nothing_to_a_cpu_library(project) -> None:
    without = {"TORCH_CUDA_ARCH_LIST": "7.5"}
    project.report(**without)
    project.write(CUDA, "int gpu() { return 3; }\n")
    project.write("csrc/bindings/cuda_ops.cpp", "int ops() { return 3; }\n")
    assert "compiling" not in project.report(**without)["err"]
    no_compiler = project.report(CXX="no-such-compiler", **without)  # the cache without a key
    assert no_compiler["built"] == "jit"
    project.write("csrc/core/answer.h", "#pragma once\ninline int answer() { return 43; }\n")
    assert project.report(**without)["answer"] == 43


def test_a_library_of_either_kind_fits_its_sources(project, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_build.native_sources, "find_root", lambda: project.csrc)
    with_cuda, without = _build.native_sources.hashes(project.csrc)
    assert with_cuda != without
    library = tmp_path / "_C.so"
    found = type("Found", (), {"origin": str(library)})
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: found)

    def fits(source_hash: str) -> bool:
        prefix = _build.native_sources.STAMP_PREFIX
        library.write_text(f"{prefix}{source_hash}:torch={torch.__version__};")
        record = {"source_hash": source_hash, "torch": str(torch.__version__)}
        (tmp_path / "cache/entry").mkdir(parents=True, exist_ok=True)
        text = json.dumps({**record, "platform": _build.platform_tag()})
        (tmp_path / "cache/entry/build.json").write_text(text)
        return _native._cached(tmp_path / "cache") is not None and _native._prebuilt() == library

    refused = pytest.raises(_native.FastbconvBuildError, match="other sources")
    assert fits(with_cuda)
    assert fits(without)
    project.write(CUDA, "int gpu() { return 4; }\n")
    assert fits(without)
    assert not fits(with_cuda)
    with refused:
        _native._prebuilt()
    project.write("csrc/core/answer.h", "inline int answer() { return 4; }\n")
    assert not fits(without)
    with refused:
        _native._prebuilt()


def test_what_the_cpu_hash_leaves_out_is_not_included() -> None:
    root = ROOT / "csrc"
    sources = [str(path) for path in _build.native_sources.compiled(root, False)]
    run = subprocess.run(  # headers that are not found, torch's, count as generated
        [*_build.compiler_command().split(), "-std=c++17", "-MM", "-MG", f"-I{root}", *sources],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "core/noise.h" in run.stdout
    read = [Path(word) for word in run.stdout.split() if not word.endswith((":", "\\"))]
    assert not [path for path in read if "cuda" in path.parts or path.name.startswith("cuda_")]
