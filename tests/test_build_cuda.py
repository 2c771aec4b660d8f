"""How CUDA is built: nvcc, architectures, flags, sources; what a CPU-only library says to a GPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from fake_project import FakeProject
from torch._subclasses import FakeTensorMode
from torch.utils import cpp_extension

import fastbconv as fb
from fastbconv import __main__ as command
from fastbconv import _build, _native, noise, ops, selection

cuda = _build.cuda
KNOWN = (75, 80, 86, 89, 90, 100, 103, 120)


def write_nvcc(folder: Path, release: str | None, known: tuple[int, ...] = KNOWN) -> Path:
    """An nvcc that tells its release and architectures, and compiles nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\\n".join(f"compute_{number}" for number in known)
    text = f"Cuda compilation tools, release {release}, V{release}.1" if release else "no compiler"
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{text}';; "
        f"--list-gpu-arch) printf '{lines}\\n';; esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path: Path):
    """A machine with torch for CUDA 13.0, no GPU, and of CUDA nothing but what a test writes."""
    for name in ("CUDA_HOME", "CUDA_PATH", "PYTORCH_NVCC", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    which = cuda.shutil.which

    def find(name: str, path: str | None = None) -> str | None:
        own = path is None or not path.startswith(str(tmp_path))
        return None if own and name == "nvcc" else which(name, path=path)

    monkeypatch.setattr(cuda.shutil, "which", find)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "capabilities", lambda: ())
    cuda._answer.cache_clear()
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    return tmp_path / "csrc"


# --- nvcc -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "torch_cuda", "reason"),
    [
        ("12.4", "13.0", "nvcc 12.4 and torch's CUDA 13.0 have different major versions"),
        ("13.2", None, f"torch {torch.__version__} is built without CUDA"),
        (None, "13.0", "--version does not name a release"),
    ],
)
def test_why_there_is_no_cuda(release, torch_cuda, reason, machine, tmp_path, monkeypatch) -> None:
    write_nvcc(tmp_path / "home/bin", release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    toolkit, said = cuda.support(machine)
    assert toolkit is None
    assert reason in said


def test_nvcc_is_the_one_torch_takes(machine, tmp_path, monkeypatch) -> None:
    for name in ("home", "path", "own"):
        write_nvcc(tmp_path / name / "bin", "13.2")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert cuda.find_nvcc() == str(tmp_path / "path/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.find_nvcc() == str(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))  # torch looks nowhere else then
    nowhere = f"CUDA_HOME={tmp_path}/nowhere has no bin/nvcc"
    assert cuda.support(machine) == (None, nowhere)
    with monkeypatch.context() as other:
        other.setattr(cuda.shutil, "which", lambda name, path=None: None if path else "bin/nvcc")
        there = "(there is one on PATH: bin/nvcc; unset CUDA_HOME to use it)"
        assert cuda.support(machine) == (None, f"{nowhere} {there}")
    monkeypatch.setenv("PYTORCH_NVCC", f"ccache {tmp_path}/own/bin/nvcc")
    assert cuda.find_nvcc() == str(tmp_path / "own/bin/nvcc")


def test_no_nvcc_anywhere(machine, monkeypatch) -> None:
    monkeypatch.setattr(cuda.shutil, "which", lambda name, path=None: None)
    said = "nvcc is neither on PATH nor in /usr/local/cuda/bin, and CUDA_HOME is not set"
    assert cuda.support(machine) == (None, said)
    monkeypatch.setenv("PYTORCH_NVCC", "ccache elsewhere/nvcc")
    said = "PYTORCH_NVCC=ccache elsewhere/nvcc names no program that is there"
    assert cuda.support(machine) == (None, said)


def test_version_without_cuda_kernels(tmp_path: Path) -> None:
    assert cuda.support(tmp_path / "empty") == (None, "this version has no CUDA kernels")


def test_prebuilt_libraries_and_the_cuda_here(machine, tmp_path, monkeypatch) -> None:
    assert cuda.story(machine, True) == "built ahead of time"
    write_nvcc(tmp_path / "bin", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert cuda.story(machine, True) == "nvcc 13.2 for sm_90"
    assert cuda.story(machine, False, prebuilt=False) == (
        "compiled without CUDA; nvcc 13.2 for sm_90 is here now: start Python again: it will be "
        "compiled then"
    )
    assert cuda.story(machine, False) == (
        "built ahead of time without CUDA; nvcc 13.2 for sm_90 is here now: install fastbconv again"
    )


# --- architectures --------------------------------------------------------------------------------


def described(
    monkeypatch, wanted: str = "", gpus=(), known: tuple[int, ...] = KNOWN, early: bool = True
) -> list[str]:
    monkeypatch.setattr(cuda, "capabilities", lambda: tuple(gpus))
    if wanted:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags, problem = cuda.architectures(
        [cuda._version(str(number)) for number in known], early, "13.0"
    )
    if not flags:
        return [problem]
    return cuda.Toolkit("nvcc", "13.0", flags).describe().split(" for ")[1].split(", ")


EXPECTED = (
    "TORCH_CUDA_ARCH_LIST: expected some of 8.0, 8.6, 8.9, 9.0, 10.0, 10.3, 12.0 (nvcc 13.0), "
    "separated by ';' or spaces, with '+PTX' behind one for what comes later, got "
)


@pytest.mark.parametrize(
    ("wanted", "gpus", "expected"),
    [
        ("", [], ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "PTX 120"]),
        ("", [(9, 0)], ["sm_90"]),
        ("native", [(8, 0), (9, 0)], ["sm_80", "sm_90"]),
        ("", [(7, 5), (9, 0)], ["sm_90"]),
        ("", [(12, 1)], ["sm_120", "PTX 120"]),
        ("", [(8, 7)], ["sm_86", "PTX 86"]),
        ("", [(7, 5)], ["the GPU here has no architecture of sm_80 or later that nvcc knows"]),
        ("9.0", [(8, 0)], ["sm_90"]),
        ("8.0;8.6 9.0a+PTX", [], ["sm_80", "sm_86", "sm_90a", "PTX 90a"]),
        ("7.5;8.0+PTX", [], ["sm_80", "PTX 80"]),
        ("Hopper", [], ["sm_90", "PTX 90"]),
        ("7.5", [], ["TORCH_CUDA_ARCH_LIST: 7.5 is too old: sm_80 or later"]),
        ("Volt", [], [EXPECTED + '"Volt"']),
        ("9.0;99.0", [], [EXPECTED + '"99.0"']),
        ("8.0,9.0", [], [EXPECTED + '"8.0,9.0"']),
        (";", [(9, 0)], ["sm_90"]),
        ("Blackwell", [], ["sm_100", "sm_103", "sm_120"]),
    ],
)  # fmt: skip
def test_architectures(wanted: str, gpus, expected: list[str], monkeypatch) -> None:
    got = described(monkeypatch, wanted, gpus)
    assert got == expected


def test_first_use_without_a_gpu_leaves_cuda_out(monkeypatch) -> None:
    (reason,) = described(monkeypatch, early=False)
    assert reason.startswith("there is no GPU here; TORCH_CUDA_ARCH_LIST=9.0")
    assert described(monkeypatch, gpus=[(9, 0)], early=False) == ["sm_90"]
    assert described(monkeypatch, "8.0", early=False) == ["sm_80"]


def test_torch_is_asked_where_the_driver_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    assert cuda._told_by_torch() == ((8, 0), (9, 0))


def test_default_list_is_what_nvcc_knows(monkeypatch) -> None:
    older = described(monkeypatch, known=(75, 80, 86, 89, 90))
    assert older == ["sm_80", "sm_86", "sm_89", "sm_90", "PTX 90"]
    assert described(monkeypatch, known=()) == [
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "PTX 120"
    ]  # fmt: skip
    nothing = "nvcc has no architecture of sm_80 or later that nvcc knows"
    assert described(monkeypatch, known=(75,)) == [nothing]


def test_asking_for_gpus_starts_nothing() -> None:
    code = """
import torch
from fastbconv import _build
print(_build.cuda.capabilities())
assert not torch.cuda.is_initialized()
_build.cuda._NVML = "libno-such-library.so"
_build.cuda.capabilities.cache_clear()
assert _build.cuda.capabilities() == ()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_gpus_of_a_driver(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "nvml.c"
    source.write_text("""
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 4; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) {
  *d = (void*)(long)(i + 1); return i == 3;
}
int nvmlDeviceGetCudaComputeCapability(void* d, int* major, int* minor) {
  *major = (long)d == 2 ? 8 : 9; *minor = 0; return 0;
}
""")  # fmt: skip
    library = tmp_path / "libnvml.so"
    compiler = _build.compiler_command().split()
    command_line = [*compiler, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command_line, check=True)
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "_NVML", str(library))
    cuda.capabilities.cache_clear()
    try:
        assert cuda.capabilities() == ((8, 0), (9, 0))
    finally:
        cuda.capabilities.cache_clear()


# --- the description ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    made = FakeProject(tmp_path)
    made.write("csrc/cuda/kernel_gpu.cu", "int gpu() { return 1; }\n")
    made.write("csrc/cuda/choice.cpp", "int choice() { return 1; }\n")
    made.write("csrc/bindings/cuda_ops.cpp", "int cuda_ops() { return 1; }\n")
    return made


def names(spec: _build.BuildSpec) -> set[str]:
    return {path.relative_to(spec.root).as_posix() for path in spec.sources}


def test_what_is_compiled_with_and_without_cuda(project, tmp_path, monkeypatch) -> None:
    without = _build.build_spec(project.csrc)
    assert not without.cuda
    assert names(without) == {"cpu/kernel.cpp", "cpu/other.cpp", "bindings/module.cpp"}
    assert without.nvcc_flags == ()
    assert "-DFBC_WITH_CUDA" not in without.cxx_flags

    write_nvcc(tmp_path / "home/bin", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert not _build.build_spec(project.csrc).cuda  # no GPU to build for
    built = _build.build_spec(project.csrc, ahead_of_time=True)
    assert built.cuda
    assert names(built) - names(without) == {
        "cuda/kernel_gpu.cu", "cuda/choice.cpp", "bindings/cuda_ops.cpp"
    }  # fmt: skip
    assert {"-O3", "--fmad=false", "-lineinfo", "-DFBC_WITH_CUDA"} <= set(built.nvcc_flags)
    assert not any("fast" in flag or flag.startswith("-std") for flag in built.nvcc_flags)
    assert "-gencode=arch=compute_90,code=sm_90" in built.nvcc_flags
    assert "-DFBC_WITH_CUDA" in built.cxx_flags
    assert (built.source_hash, without.source_hash) == _build.native_sources.hashes(project.csrc)


def test_key_names_architectures_and_nvcc(project, tmp_path, monkeypatch) -> None:
    write_nvcc(tmp_path / "home/bin", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    keys = set()
    for wanted in ("", "8.0", "9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        keys.add(_build.build_spec(project.csrc, ahead_of_time=True).key)
    write_nvcc(tmp_path / "home/bin", "13.0")
    cuda._answer.cache_clear()
    keys.add(_build.build_spec(project.csrc).key)
    monkeypatch.delenv("CUDA_HOME")
    keys.add(_build.build_spec(project.csrc).key)
    assert len(keys) == 5


def test_setup_and_first_use_compile_cuda_alike(project, tmp_path, monkeypatch) -> None:
    write_nvcc(tmp_path / "home/bin", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTBCONV_AOT", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cpp_extension, "load", lambda *a, **k: given.update(jit=a[1], **k))
    made = []
    monkeypatch.setattr(
        cpp_extension, "CUDAExtension", lambda *a, **k: made.append((a, k)) or "extension"
    )
    runpy.run_path(str(project.folder / "setup.py"))
    _build.build_spec(project.csrc).compile(project.cache)
    ((_, sources), options) = made[0]
    assert given["ext_modules"] == ["extension"]
    assert sources == [os.path.relpath(source, project.folder) for source in given["jit"]]
    assert options["extra_compile_args"]["nvcc"] == given["extra_cuda_cflags"]
    assert given["with_cuda"] is True
    # torch adds architectures of its own only where it finds none among the flags.
    assert cpp_extension._get_cuda_arch_flags(given["extra_cuda_cflags"]) == []


# --- a library without CUDA -----------------------------------------------------------------------


class OnGpu:
    device = torch.device("cuda", 0)


def test_a_cuda_tensor_is_told_how_to_get_cuda(monkeypatch) -> None:
    monkeypatch.setitem(ops._state, "cuda", False)
    with pytest.raises(
        NotImplementedError, match=r"input: expected a CPU tensor, got one on cuda:0"
    ):
        selection.use_native(OnGpu())
    with fb.algorithm("reference"):
        assert not selection.use_native(OnGpu())
    monkeypatch.setitem(ops._state, "cuda", True)
    assert selection.use_native(OnGpu())
    monkeypatch.setitem(ops._state, "available", False)
    assert not selection.use_native(OnGpu())


def test_explaining_cuda_is_refused_in_the_same_words(monkeypatch) -> None:
    monkeypatch.setitem(ops._state, "cuda", False)
    x, w = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    with pytest.raises(NotImplementedError) as tensor:
        selection.use_native(OnGpu())
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)):
        with pytest.raises(NotImplementedError, match="device: expected cpu, got cuda") as caught:
            fb.explain(x, w, device=device)
        assert str(caught.value).split(": ", 2)[2] == str(tensor.value).split(": ", 2)[2]


def test_every_function_says_so_before_the_dispatcher(monkeypatch) -> None:
    monkeypatch.setitem(ops._state, "cuda", False)
    reason = _native.build_info()["cuda_reason"]
    with FakeTensorMode():
        x, w = torch.empty(1, 3, 8, 8, device="cuda"), torch.empty(4, 3, 3, 3, device="cuda")
        s = torch.empty(2, dtype=torch.int64, device="cuda")
        calls = [
            lambda: fb.functional.bayes_conv2d(x, w, w, seed=s),
            lambda: fb.functional.kl_normal(w, w),
            lambda: fb.functional.sample_posterior(w, w, seed=s),
        ]
        for call in calls:
            with pytest.raises(NotImplementedError, match="nvcc") as caught:
                call()
            assert reason in str(caught.value)
            assert "algorithm('reference')" in str(caught.value)
    y = torch.empty(1, 3, 8, 8, device="meta")
    out = fb.functional.bayes_conv2d(y, torch.empty(4, 3, 3, 3, device="meta"), None)
    assert out.device.type == "meta"


def test_noise_falls_back_to_plain_operations(monkeypatch) -> None:
    monkeypatch.setitem(ops._state, "cuda", False)
    assert noise._native_ops(torch.device("cuda")) is None
    monkeypatch.setitem(ops._state, "cuda", True)
    assert noise._native_ops(torch.device("cuda")) is ops


def test_env_tells_the_story(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "capabilities", lambda: ((9, 0),))
    assert command.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "sm_90" in out
    assert "cuda   " in out
    assert "no (" in out or "yes (" in out
