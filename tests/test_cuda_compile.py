"""Gates that need nvcc and no GPU: registers, stack and spills of each kernel; the noise's code.

Without nvcc these tests do not exist; a line below the results says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_resources
import pytest
from cuda_resources import ARCHITECTURES, SOURCES, Compiled

NVCC = cuda_resources.find_nvcc()
DATA = Path(__file__).parent / "data"
LOG = """
ptxas info    : Compiling entry function '_ZN3fbc4cuda1kIfLb1EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN3fbc4cuda1kIfLb1EEEvi
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size
"""


class Jobs:
    """All compilations, two at a time, started before the first test asks."""

    def __init__(self, folder: Path, sources: list[Path]) -> None:
        assert NVCC is not None
        self.pool = ThreadPoolExecutor(2)
        noise = DATA / "noise_unit.cu"
        self.cubins = {
            (arch, fmad): self.pool.submit(
                cuda_resources.compile_cubin, NVCC, noise, arch, fmad, folder
            )
            for arch in ARCHITECTURES
            for fmad in (False, True)
        }
        self.sources: dict[Path, Future[Compiled]] = {
            source: self.pool.submit(cuda_resources.compile_source, NVCC, source, folder)
            for source in sources
        }

    def code(self, arch: str, fmad: bool) -> dict[str, bytes]:
        return cuda_resources.machine_code(self.cubins[arch, fmad].result())


@pytest.fixture(scope="session")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    selected = {getattr(item, "originalname", "") for item in request.session.items}
    all_sources = "test_the_table_has_no_other_rows" in selected
    named = {
        item.callspec.params.get("source")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    sources = [source for source in SOURCES if all_sources or source in named]
    started = Jobs(tmp_path_factory.mktemp("nvcc"), sources)
    yield started
    started.pool.shutdown(cancel_futures=True)


def test_the_output_of_ptxas_is_understood() -> None:
    kernel = cuda_resources.Kernel("k<float, true>", "sm_80", 40, 8, 16)
    assert cuda_resources.parse(LOG) == [kernel]
    assert cuda_resources.limits([kernel._replace(registers=41)]) == {kernel.name: {"sm_80": 48}}
    assert cuda_resources.short_name("void fbc::(anonymous namespace)::k<(int)3>(int)") == "k<3>"


class TestResources:
    __test__ = NVCC is not None

    @pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
    def test_compiles_within_its_limits(self, jobs: Jobs, source: Path) -> None:
        result = jobs.sources[source].result()
        assert result.status == 0, result.log[-6000:]
        assert "warning" not in result.log, result.log[-6000:]
        table = cuda_resources.read_table()
        faults = []
        for kernel in result.kernels:
            allowed = table["allowed"].get(kernel.name, {})
            where = f"{kernel.name} {kernel.architecture}"
            if kernel.stack > allowed.get("stack", 0) or kernel.spills > allowed.get("spills", 0):
                faults.append(f"{where}: {kernel.stack} bytes of stack, {kernel.spills} of spills")
            limit = table["registers"].get(kernel.name, {}).get(kernel.architecture)
            if limit is None:
                row = cuda_resources.limits([k for k in result.kernels if k.name == kernel.name])
                faults.append(f"{where}: no row; add {json.dumps(row)[1:-1]}")
            elif kernel.registers > limit:
                faults.append(f"{where}: {kernel.registers} registers, at most {limit}")
        faults.append("to write the table anew: python tests/cuda_resources.py")
        assert len(faults) == 1, "\n".join(faults)

    def test_the_table_has_no_other_rows(self, jobs: Jobs) -> None:
        kernels = {k.name for job in jobs.sources.values() for k in job.result().kernels}
        table = cuda_resources.read_table()
        assert set(table["registers"]) - kernels == set(), "rows of kernels that are gone"
        assert set(table["allowed"]) - kernels == set(), "excuses for kernels that are gone"
        assert all(row["reason"] for row in table["allowed"].values())


class TestNoiseUnit:
    """Contraction changes a*b + c where it stands in plain operators: the noise has none of it."""

    __test__ = NVCC is not None

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_noise_is_the_same_with_contraction(self, jobs: Jobs, arch: str) -> None:
        off, on = jobs.code(arch, fmad=False), jobs.code(arch, fmad=True)
        noise = {name for name in off if "noise" in name}
        assert len(noise) == 3, sorted(off)
        assert on.keys() == off.keys()
        for name in noise:
            assert len(off[name]) > 1000
            assert off[name] == on[name], f"{name}: a product and a sum are not fused by hand"

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_comparison_can_fail(self, jobs: Jobs, arch: str) -> None:
        off, on = jobs.code(arch, fmad=False), jobs.code(arch, fmad=True)
        plain = [name for name in off if "plain" in name]
        assert len(plain) == 1
        assert off[plain[0]] != on[plain[0]]


@pytest.mark.parametrize("nvcc", ["nvcc", None])
def test_one_line_tells_whether_the_kernels_are_compiled(nvcc: str | None, tmp_path: Path) -> None:
    """In a run of its own: with -q, as ``make test`` runs it."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    (tmp_path / "conftest.py").write_text(
        "import cuda_resources\n"
        f"cuda_resources.find_nvcc = lambda: {nvcc!r}\n"
        "from conftest_of_the_suite import pytest_terminal_summary\n"
    )
    suite = (Path(__file__).parent / "conftest.py").read_text()
    (tmp_path / "conftest_of_the_suite.py").write_text(suite)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("cuda: ")]
    expected = "kernels are compiled by" if nvcc else "no nvcc, so the kernels are run on"
    assert len(lines) == 1
    assert expected in lines[0]
