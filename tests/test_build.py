"""Finding, building and loading the native library; what the package does when it is imported."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from fake_project import ROOT, FakeProject
from torch.utils import cpp_extension

from fastbconv import _build


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


def report(result: tuple[int, str, str]) -> dict:
    status, out, err = result
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# One description


def test_setup_and_first_use_share_one_description(project, monkeypatch) -> None:
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.delenv("FASTBCONV_AOT", raising=False)
    runpy.run_path(str(project.folder / "setup.py"))
    monkeypatch.setattr(
        cpp_extension, "load", lambda *a, **k: given.update(name=a[0], jit=a[1], **k)
    )
    spec = _build.build_spec(project.csrc)
    spec.compile(project.cache)

    (extension,) = given["ext_modules"]
    assert extension.name == f"fastbconv.{given['name']}"
    relative = [os.path.relpath(source, project.folder) for source in given["jit"]]
    assert extension.sources == relative
    assert relative == ["csrc/cpu/kernel.cpp", "csrc/cpu/other.cpp", "csrc/bindings/module.cpp"]
    assert extension.extra_compile_args["cxx"] == given["extra_cflags"] == list(spec.cxx_flags)
    assert extension.extra_link_args == given["extra_ldflags"]
    assert str(project.csrc) in extension.include_dirs
    assert str(project.csrc) in given["extra_include_paths"]


def test_flags_keep_the_bits() -> None:
    flags = _build.build_spec().cxx_flags
    assert "-ffp-contract=off" in flags
    assert not any("fast-math" in flag or "march" in flag for flag in flags)
    assert sys.platform == "darwin" or "-fopenmp" in flags


def test_key_names_all_that_decides(project, monkeypatch) -> None:
    spec = _build.build_spec(project.csrc)
    assert spec.version in spec.key
    assert torch.__version__ in spec.key
    assert spec.source_hash in spec.key
    project.write("csrc/core/answer.h", "inline int answer() { return 43; }\n")
    changed = _build.build_spec(project.csrc)
    assert changed.key != spec.key
    assert changed.work_key == spec.work_key
    here = (changed.key, changed.work_key)
    monkeypatch.setattr(_build.platform, "machine", lambda: "other")
    assert changed.key != here[0]
    assert changed.work_key != here[1]


def test_setup_without_ahead_of_time_build(project, monkeypatch) -> None:
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setenv("FASTBCONV_AOT", "0")
    runpy.run_path(str(project.folder / "setup.py"))
    assert "ext_modules" not in given
    assert "fastbconv._csrc" in given["packages"]


# Importing


def test_import_compiles_nothing_and_starts_no_thread(tmp_path: Path) -> None:
    code = """
import os, sys, torch, numpy
tasks = lambda: len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0
before = tasks()
import fastbconv
assert tasks() == before, 'a thread was started'
assert 'fastbconv._C' not in sys.modules, 'the library was loaded'
assert not torch.cuda.is_initialized()
"""
    environment = {**os.environ, "FASTBCONV_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert not (tmp_path / "cache").exists()


# Building at first use


def test_builds_once_then_only_what_changed(project) -> None:
    first = project.run()
    assert report(first)["built"] == "jit"
    assert report(first)["answer"] == 42
    assert first[2].count("compiling") == 1
    (work,) = project.cache.glob("work-*/")
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.o")}

    again = project.run()
    assert report(again) == report(first)
    assert "compiling" not in again[2]

    project.write("csrc/core/answer.h", "#pragma once\ninline int answer() { return 43; }\n")
    changed = project.run()
    assert report(changed)["answer"] == 43
    after = {path.name: path.stat().st_mtime_ns for path in work.glob("*.o")}
    assert after["other.o"] == before["other.o"]
    assert after["kernel.o"] != before["kernel.o"]

    damaged = Path(report(changed)["library"])
    damaged.write_bytes(b"no library")
    assert "cannot be loaded" in report(project.run())["attempts"][0]
    assert report(project.run())["answer"] == 43


def test_build_killed_half_way_recovers(project) -> None:
    project.hang.touch()
    process = project.start()
    wait_for(lambda: project.hung.exists() and project.hung.read_text().strip() != "")
    compiler = int(project.hung.read_text())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not is_running(compiler), 30)
    (work,) = project.cache.glob("work-*/")
    assert (work / "lock").exists(), "torch's lock is what a later build would wait for"
    project.hang.unlink()
    assert report(project.run())["answer"] == 42


def test_two_processes_build_once(project) -> None:
    processes = [project.start() for _ in range(2)]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append((process.returncode, out, err))
    assert [report(result)["answer"] for result in results] == [42, 42]
    assert sum(err.count("compiling") for _, _, err in results) == 1


def test_interrupt_ends_the_compiler(project) -> None:
    project.hang.touch()
    process = project.start()
    wait_for(lambda: project.hung.exists() and project.hung.read_text().strip() != "")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not is_running(int(project.hung.read_text())), 30)


# Ahead of time


def wheel(folder: Path, **extra: str) -> Path:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra}
    out = folder / "dist"
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, "."],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = out.glob("*.whl")
    return found


def test_ahead_of_time_library_is_used_while_it_fits(project, tmp_path: Path) -> None:
    built = wheel(project.folder, FASTBCONV_AOT="1")
    installed = tmp_path / "installed"
    zipfile.ZipFile(built).extractall(installed)
    shutil.rmtree(project.folder)
    installed.rename(project.folder)  # what was installed, and no checkout around it

    found = report(project.run())
    assert found["built"] == "prebuilt"
    assert not project.cache.exists()

    kernel = project.folder / "fastbconv/_csrc/cuda/kernel.cu"  # nothing to a CPU library
    kernel.parent.mkdir()
    kernel.write_text("int gpu() { return 1; }\n")
    assert report(project.run())["built"] == "prebuilt"

    # No compiler is needed for it.
    assert report(project.run(PATH=str(tmp_path), CXX="c++"))["built"] == "prebuilt"

    library = Path(found["library"])
    whole = library.read_bytes()
    other = b"torch=" + b"9" * len(str(torch.__version__))
    library.write_bytes(whole.replace(f"torch={torch.__version__}".encode(), other))
    outdated = report(project.run())
    assert outdated["built"] == "jit"
    assert "is built for torch 999" in outdated["attempts"][0]

    library.write_bytes(whole)
    header = project.folder / "fastbconv/_csrc/core/answer.h"
    header.write_text(header.read_text().replace("42", "44"))
    edited = report(project.run())
    assert (edited["built"], edited["answer"]) == ("jit", 44)
    assert "other sources" in edited["attempts"][0]


def test_wheel_content(tmp_path: Path) -> None:
    for name in ("fastbconv", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    built = wheel(tmp_path, FASTBCONV_AOT="0")
    assert built.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    expected = {"fastbconv/py.typed"}
    for path in (ROOT / "fastbconv").rglob("*.py"):
        expected.add(path.relative_to(ROOT).as_posix())
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix != ".md":
            expected.add(f"fastbconv/_csrc/{path.relative_to(ROOT / 'csrc').as_posix()}")
    assert names == expected
