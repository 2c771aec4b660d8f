"""The CUDA kernels' own source on a host interpreter (tests/simt), against fp64 references.

Every tests/simt/test_*.cpp is a program ``name [seed of the schedule [quick]]``. It runs under
several schedules, and its quick subset under AddressSanitizer with UBSan and under
ThreadSanitizer, to which each CUDA thread is a thread. tests/simt/planted holds kernels with bugs
to choose from: the interpreter has to catch each of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "simt"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("test_*.cpp"))
SEEDS = (0, 1, 2)

FLAGS = ["-x", "c++", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]
# Device compilers let memory be read as another type than it was written.
FLAGS += ["-fno-strict-aliasing", f"-I{ROOT / 'csrc'}", f"-I{FOLDER}"]
BUILDS = {
    "plain": ["-O2", "-march=native"],
    "memory": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "races": ["-O1", "-g1", "-fsanitize=thread"],
}
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:report_bugs=1",
}
TIME_LIMIT = 300

# What each planted bug shows itself by: the build, and what it prints under some seed.
WRONG, RACE = ("plain", r"FAILED .* differ"), ("races", "WARNING: ThreadSanitizer: data race")
PLANTED: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "tiles": {
        "missing_barrier": (WRONG, RACE),
        "missing_wait": (WRONG,),
        "stage_reused_early": (WRONG, RACE),
        "no_barrier_at_end": (WRONG, RACE),
        "divergent_barrier": (
            ("plain", "sync: divergent: other threads wait in sync, .*tiles.cpp"),
        ),
        "skipped_barrier": (("plain", "divergent|deadlock|lanes of this warp wait in"),),
        "divergent_collective": (("plain", "of this warp wait in shuffle_xor|deadlock"),),
        "different_collectives": (("plain", "divergent: lanes of this warp wait in"),),
        "missing_sync_warp": (WRONG, RACE),
        "wrong_swizzle": (WRONG,),
        "read_past_end": (("memory", "AddressSanitizer: heap-buffer-overflow"),),
        "shared_past_end": (
            ("plain", r"wrote \d+ bytes past its \d+ bytes of shared memory"),
            ("memory", "AddressSanitizer: use-after-poison"),
        ),
        "copy_past_shared": (("plain", "copy_async: 16 bytes at offset 12288 of 12288 bytes"),),
        "misaligned_copy": (("plain", r"copy_async: misaligned global address .*\n.*tiles.cpp"),),
        "copies_in_flight": (("plain", "1 asynchronous copies are in flight"),),
        "lanes_leave": (("plain", "wait in shuffle_xor|lanes of the warp have returned"),),
        "unwritten": (WRONG,),
    },
    "blocks": {
        "never_released": (("plain", "deadlock(.*\n)*.* wait in wait_at_least, .*: 0, want 1"),),
        "not_awaited": (WRONG, RACE),
        "released_early": (WRONG, RACE),
        "read_early": (WRONG, RACE),
        "ticket_early": (RACE,),
        "ticket_not_reset": (WRONG,),
        "plain_launch": (("plain", "blocks of a plain launch need not run at the same time"),),
        "too_many_blocks": (("plain", "launch status 720"),),
        "overlap": (WRONG, RACE),
        "by_blocks": (WRONG,),
    },
}


class Run(NamedTuple):
    """One execution of a program."""

    program: str  # below tests/simt, without .cpp
    build: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join([self.program, self.build, *self.arguments]).replace("/", "-")


class Bug(NamedTuple):
    """A planted bug and one of the ways to see it."""

    program: str
    name: str
    build: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.program}-{self.name}-{self.build}"

    def runs(self) -> list[Run]:
        return [Run(f"planted/{self.program}", self.build, (str(s), self.name)) for s in SEEDS]


RUNS = [
    Run(program, build, arguments)
    for program in PROGRAMS
    for build, arguments in (
        *(("plain", (str(seed),)) for seed in SEEDS),
        ("memory", ("1", "quick")),
        ("races", ("0", "quick")),
    )
]
CLEAN = [
    Run(f"planted/{program}", build, (str(seed), "none"))
    for program in PLANTED
    for build in BUILDS
    for seed in SEEDS
]
BUGS = [
    Bug(program, name, *way)
    for program, bugs in PLANTED.items()
    for name, ways in bugs.items()
    for way in ways
]


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert found, "a C++ compiler is needed to run the interpreter"
    return found


def compile_program(source: Path, *more: str) -> None:
    command = [compiler(), *FLAGS, *more, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "warning:" not in done.stderr, done.stderr[-6000:]


def without_randomised_addresses() -> list[str]:
    """ThreadSanitizer of older compilers cannot place its memory where more than 28 bits vary."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    if bits.exists() and int(bits.read_text()) > 28 and shutil.which("setarch"):
        return ["setarch", "-R"]
    return []


class Workshop:
    """Compiles and runs, two things at a time; everything once, and ahead of who asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.binaries: dict[tuple[str, str], Future[Path]] = {}
        self.results: dict[Run, Future[subprocess.CompletedProcess[str]]] = {}

    def _compile(self, program: str, build: str) -> Path:
        target = self.folder / f"{program.replace('/', '_')}_{build}"
        compile_program(FOLDER / f"{program}.cpp", "-std=c++17", *BUILDS[build], "-o", str(target))
        return target

    def _run(self, run: Run) -> subprocess.CompletedProcess[str]:
        binary = self.binaries[run.program, run.build].result()
        prefix = without_randomised_addresses() if run.build == "races" else []
        return subprocess.run(
            [*prefix, str(binary), *run.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT,
            env={**os.environ, **SANITIZERS},
            check=False,
        )

    def request(self, run: Run) -> None:
        """Queues a run, behind its compilation: the queue is served in order, so nothing waits
        for a compilation that has not begun."""
        key = (run.program, run.build)
        if key not in self.binaries:
            self.binaries[key] = self.pool.submit(self._compile, *key)
        if run not in self.results:
            self.results[run] = self.pool.submit(self._run, run)

    def result(self, run: Run) -> subprocess.CompletedProcess[str]:
        self.request(run)
        return self.results[run].result()


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest) -> Iterator[Workshop]:
    with tempfile.TemporaryDirectory(prefix="fastbconv-simt-") as folder:
        shop = Workshop(Path(folder))
        cases = [
            item.callspec.params.get("case")
            for item in request.session.items
            if item.path == Path(__file__) and hasattr(item, "callspec")
        ]
        for case in cases:
            run = case.runs()[0] if isinstance(case, Bug) else case  # most show themselves at once
            if isinstance(run, Run):
                shop.request(run)
        yield shop
        shop.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_program(workshop: Workshop, case: Run) -> None:
    done = workshop.result(case)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-8000:]}"
    assert re.search(r"^\d+ checks, 0 failures, seed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("case", CLEAN, ids=str)
def test_kernels_without_a_planted_bug_pass(workshop: Workshop, case: Run) -> None:
    done = workshop.result(case)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("case", BUGS, ids=str)
def test_a_planted_bug_is_caught(workshop: Workshop, case: Bug) -> None:
    outputs = []
    for run in case.runs():
        done = workshop.result(run)
        outputs.append(f"{run}: status {done.returncode}\n{done.stdout[-2000:]}")
        if done.returncode != 0 and re.search(case.pattern, done.stdout):
            return
    raise AssertionError("\n".join(outputs))


@pytest.mark.parametrize("case", [c for c in CLEAN if c.build == "plain"][:: len(SEEDS)], ids=str)
def test_every_planted_bug_has_a_test(workshop: Workshop, case: Run) -> None:
    listed = workshop.result(case._replace(arguments=("list",))).stdout.split()
    assert listed == ["none", *PLANTED[case.program.removeprefix("planted/")]]


@pytest.mark.parametrize("case", [Run("test_primitives", "plain", ())], ids=["environment"])
def test_seed_from_the_environment(
    workshop: Workshop, case: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.result(case)
    monkeypatch.setenv("FASTBCONV_SIMT_SEED", "3")
    done = workshop._run(case)
    assert done.returncode == 0, done.stdout
    assert "0 failures, seed 3" in done.stdout


@pytest.mark.parametrize("macros", [[], ["-DFBC_SIMT_UCONTEXT"]], ids=["by-hand", "portable"])
def test_interpreter_as_cxx20(macros: list[str]) -> None:
    compile_program(FOLDER / "test_interpreter.cpp", "-std=c++20", "-fsyntax-only", *macros)
