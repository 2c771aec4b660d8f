"""The kernels without PyTorch, under AddressSanitizer and UBSan, on every instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
FLAGS = [
    "-std=c++17",
    "-O1",
    # Without it, -O1 leaves out vzeroupper: all that runs after an AVX kernel is 30 times slower.
    "-fexpensive-optimizations",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
PROGRAMS = {
    "test_math": [],
    "test_storage": [],
    "test_posterior": [],
    "test_conv": ["250"],
    "test_affine": ["80"],
}


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "a C++ compiler is needed to test the native kernels"
    return found


def compile_one(source: Path, target: Path, *more: str) -> None:
    command = [compiler(), *FLAGS, *more, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test program, linked with the kernels; two compilers at a time."""
    folder = tmp_path_factory.mktemp("native")
    sources = sorted(CPU.glob("*.cpp"))
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: compile_one(*pair, "-c"), zip(sources, objects, strict=True)))
        names = [(ROOT / "tests" / "native" / f"{name}.cpp", folder / name) for name in PROGRAMS]
        list(pool.map(lambda pair: compile_one(*pair, *map(str, objects)), names))
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(programs: Path, name: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1"}
    done = subprocess.run(
        [str(programs / name), *PROGRAMS[name]], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " 0 failures" in done.stdout
