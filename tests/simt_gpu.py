"""The programs of tests/simt on a real GPU: the cheapest check of the kernels, without torch.

    python tests/simt_gpu.py build FOLDER --architecture 90    needs nvcc, and no GPU
    python tests/simt_gpu.py run FOLDER                        needs a GPU, and no nvcc
    python tests/simt_gpu.py run FOLDER --sanitizer racecheck  the quick subset

Where managed memory does not work, FASTBCONV_TEST_MEMORY=pinned keeps the data in the host's. The
programs can be compiled on one machine and run on another; they run in the order in which each
relies on the ones before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_resources

FOLDER = Path(__file__).resolve().parent / "simt"
# test_interpreter.cpp is about the interpreter. Primitives first, what is built of them last.
PROGRAMS = (
    "test_primitives",
    "test_matrices",
    "test_posterior",
    "test_posterior_backward",
    "test_epilogue",
    "test_wgrad",
    "test_dgrad",
    "test_fprop",
    "test_fprop_layouts",
)
FLAGS = ("-x", "cu", "-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Werror", "all-warnings")
FLAGS += (f"-I{FOLDER.parents[1] / 'csrc'}", f"-I{FOLDER}", "-Xcompiler=-ffp-contract=off")
TIME_LIMIT = 180  # seconds: blocks that wait for one another forever must not hold the GPU


class Result(NamedTuple):
    """One execution: its status (None: it was stopped at the time limit) and what it printed."""

    program: str
    status: int | None
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == 0


def source_of(program: str) -> Path:
    return FOLDER / f"{program}.cpp"


def compile_program(nvcc: str, program: str, target: Path, *more: str) -> str:
    """Compiles; returns what nvcc said, or raises with it."""
    command = [nvcc, *FLAGS, *more, "-o", str(target), str(source_of(program))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{program}: {(run.stdout + run.stderr)[-4000:]}")
    return run.stdout + run.stderr


def build(nvcc: str, folder: Path, architecture: str) -> None:
    """Compiles all programs for one architecture ("90"), with PTX for later ones."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"-gencode=arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", jobs))) as pool:
        list(pool.map(lambda name: compile_program(nvcc, name, folder / name, code), PROGRAMS))


def run_program(
    folder: Path, program: str, *arguments: str, prefix: tuple[str, ...] = ()
) -> Result:
    command = [*prefix, str(folder / program), *arguments]
    begin = time.monotonic()
    try:
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT,
            check=False,
        )
        status, output = run.returncode, run.stdout
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        status, output = None, f"{text}\nstopped after {TIME_LIMIT} s"
    return Result(program, status, output, time.monotonic() - begin)


def run_all(folder: Path, sanitizer: str | None) -> list[Result]:
    results = []
    prefix: tuple[str, ...] = ()
    arguments = ("0",)
    if sanitizer is not None:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        prefix = (tool, "--tool", sanitizer, "--error-exitcode", "3")
        arguments = ("0", "quick")
    for program in PROGRAMS:
        if not (folder / program).exists():
            continue
        result = run_program(folder, program, *arguments, prefix=prefix)
        results.append(result)
        word = "ok" if result.passed else f"FAILED, status {result.status}"
        print(f"{program:28s} {result.seconds:6.1f} s  {word}", flush=True)
        print(result.output[-600 if result.passed else -6000 :], flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="90", help="of build: 80, 86, 89, 90, 100, 120")
    parser.add_argument("--sanitizer", help="of run: memcheck, racecheck, initcheck, synccheck")
    options = parser.parse_args()
    if options.step == "build":
        nvcc = cuda_resources.find_nvcc()
        if nvcc is None:
            print(cuda_resources.summary(), file=sys.stderr)
            return 1
        build(nvcc, options.folder, options.architecture)
        return 0
    results = run_all(options.folder, options.sanitizer)
    return 0 if results and all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
