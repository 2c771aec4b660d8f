"""The native programs as the GPU measuring script builds and runs them, by stand-ins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import simt_gpu
import torch
from gpu import built, correctness, process, programs, stages
from gpu.stage import Bench, outcome, run_items
from h200_support import bench_of

NVCC = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
case "$3" in
  *test_dgrad.cpp) echo 'error: planted'; exit 2 ;;
  *test_fprop.cpp) sleep 60 ;;
esac
printf '#!/bin/sh\\necho "schedule $1"\\n' > "$2" && chmod +x "$2"
"""
BAD = {"test_dgrad", "test_fprop"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A stage that believes in a GPU; nvcc writes shell scripts."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setattr(programs, "folder_of", lambda architecture, nvcc: tmp_path / "programs")
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    monkeypatch.setattr(programs, "listed", lambda: simt_gpu)
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = bench_of(tmp_path / "file.json")
    made.clock.cuda, made.clock.alive = True, lambda: True
    return made


def test_programs_are_built_together_and_each_is_recorded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "BUILD_LIMIT", 6.0)
    monkeypatch.setenv("MAX_JOBS", "4")
    began = time.monotonic()
    programs.begin(bench)
    assert time.monotonic() - began < 1.0  # in the background
    found = outcome(bench, lambda: programs.build(bench))
    assert time.monotonic() - began < 20.0
    assert found["architecture"] == "90"
    assert list(found["programs"]) == list(simt_gpu.PROGRAMS)
    bad = {name for name, row in found["programs"].items() if row["status"] != "ok"}
    assert (found["status"], bad) == ("failed", BAD)
    assert "planted" in found["programs"]["test_dgrad"]["output"]
    assert "did not end" in found["programs"]["test_fprop"]["reason"]
    names = {path.name for path in (programs.ROOT / "programs").iterdir()}
    assert names == {*simt_gpu.PROGRAMS} - BAD  # whole or not at all
    bench.record.begin("build")["items"]["native programs"] = found
    assert "schedule 0" in programs.run_one(bench, "test_primitives")["output"]
    row = outcome(bench, lambda: programs.run_one(bench, "test_dgrad"))
    assert row["status"] == "not measured"
    assert "nvcc: status 2" in row["reason"]
    folder = programs.ROOT / "programs"
    assert programs.compile_one("no-such-nvcc", "test_primitives", folder, "", 0.0)["found"]


def test_programs_have_limits_one_by_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = programs.ROOT / "programs"
    folder.mkdir()
    texts = {"fails": "echo wrong at 3; exit 1", "hangs": "exec sleep 60", "works": "echo fine"}
    order = ("fails", "works", "hangs", "hangs too", "late")
    for name in order:
        (folder / name).write_text(f"#!/bin/sh\n{texts.get(name.split()[0], 'true')}\n")
        (folder / name).chmod(0o755)
    rows = {name: {"status": "ok"} for name in order}
    section = bench.record.begin("build")
    section["items"]["native programs"] = {"programs": rows, "folder": "programs"}
    monkeypatch.setattr(programs, "RUN_LIMIT", 0.5)
    monkeypatch.setattr(process, "PATIENCE", 0.5)
    monkeypatch.setattr(programs, "names", lambda: order)
    listed = [item for item in correctness.items(bench) if item.name.startswith("native ")]
    run_items(bench, listed)
    items = bench.record.items("facts")
    assert list(items) == [f"native {name}" for name in order]
    assert items["native fails"]["reason"] == "status 1: wrong at 3"
    assert (items["native works"]["status"], items["native works"]["exit status"]) == ("ok", 0)
    assert "did not end" in items["native hangs"]["reason"]
    assert items["native late"]["status"] == "not measured"
    assert "2 programs before it did not end" in items["native late"]["reason"]
    bench.kept.update({"stuck": 0, "programs ran": programs.RUN_TOTAL})
    row = outcome(bench, lambda: programs.run_one(bench, "late"))
    assert "45 s together" in row["reason"]


def test_programs_belong_to_both_stages(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "file.json")
    assert programs.names() == simt_gpu.PROGRAMS
    assert "native programs" in [item.name for item in built.items(bench)]
    names = [item.name for item in correctness.items(bench)]
    assert names[: len(simt_gpu.PROGRAMS)] == [f"native {name}" for name in simt_gpu.PROGRAMS]
    assert names.index("pytest") > len(simt_gpu.PROGRAMS)
    row = outcome(bench, lambda: programs.build(bench))
    assert row == {"status": "not measured", "reason": "dry run: they need a GPU"}
    assert sum(stage.share for stage in stages.STAGES.values()) == 480
    assert stages.STAGES["build"].share >= programs.BUILD_LIMIT


def test_binaries_are_told_apart() -> None:
    first = programs.folder_of("90", "/a/nvcc")
    assert first == programs.folder_of("90", "/a/nvcc")
    assert len({first, programs.folder_of("80", "/a/nvcc"), programs.folder_of("90", "/b")}) == 3
    assert first.parent == programs.ROOT / "build"
