"""Which library is chosen, what is said when there is none, what ``build_info`` and env tell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_project import ROOT, FakeProject

import fastbconv
from fastbconv import __main__ as command
from fastbconv import _build, _builder, _native


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


# The environment


def test_settings_defaults(tmp_path: Path) -> None:
    found = _build.settings({"XDG_CACHE_HOME": str(tmp_path)})
    assert found == _build.Settings("auto", tmp_path / "fastbconv", None, True)


def test_settings_are_read() -> None:
    given = {
        "FASTBCONV_BACKEND": "Native",
        "FASTBCONV_CACHE": "~/elsewhere",
        "FASTBCONV_ISA": "avx2",
        "FASTBCONV_AOT": "0",
    }
    found = _build.settings(given)
    assert found == _build.Settings("native", Path.home() / "elsewhere", "avx2", False)


@pytest.mark.parametrize("name", ["FASTBCONV_BACKEND", "FASTBCONV_ISA", "FASTBCONV_AOT"])
def test_wrong_value_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected one of .*, got 'fast'"):
        _build.settings({name: "fast"})


def test_wrong_value_stops_the_first_use(project) -> None:
    status, _, err = project.run(FASTBCONV_BACKEND="fast")
    assert status != 0
    assert "FASTBCONV_BACKEND: expected one of auto, native, reference, got 'fast'" in err


def test_cache_without_a_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert str(os.getuid()) in _build.settings({}).cache.name


# Choosing


def test_reference_by_request_is_silent(project) -> None:
    code = "from fastbconv import _native; assert _native.load() is None; print(_native.load())"
    assert project.run(code, FASTBCONV_BACKEND="reference") == (0, "None\n", "")
    assert not project.cache.exists()


def test_instruction_set_is_limited(project) -> None:
    code = "from fastbconv import _native; _native.load()"
    assert "limited to avx2" in project.run(code, FASTBCONV_ISA="avx2")[1]


def test_module_has_one_name(project) -> None:
    code = """
import sys
from fastbconv import _native
module = _native.load()
import fastbconv._C
assert fastbconv._C is module is sys.modules['fastbconv._C'] is _native.load()
assert module.__name__ == 'fastbconv._C'
"""
    status, _, err = project.run(code)
    assert status == 0, err


def test_native_on_request_says_what_was_tried(project) -> None:
    project.write("csrc/cpu/kernel.cpp", "int kernel() { return undeclared_name; }\n")
    code = """
from fastbconv import _native
for attempt in range(2):
    try:
        _native.load()
    except _native.FastbconvBuildError as error:
        message = str(error)
print(message)
"""
    status, out, err = project.run(code, FASTBCONV_BACKEND="native")
    assert status == 0, err
    assert "jit: compiling failed" in out
    assert "undeclared_name" in out, "the compiler's own words"
    assert "FASTBCONV_BACKEND=reference" in out
    assert err.count("compiling") == 1, "a failure is remembered"


def test_cache_that_cannot_be_written(project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "from fastbconv import _native; _native.load()"
    status, _, err = project.run(
        code, FASTBCONV_BACKEND="native", FASTBCONV_CACHE=str(tmp_path / "file" / "cache")
    )
    assert status != 0
    assert "cannot use the build cache" in err
    assert "Set FASTBCONV_CACHE" in err


def test_missing_ninja_is_named(project, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    spec = _build.build_spec(project.csrc)
    monkeypatch.setenv("PATH", str(project.tools))
    with pytest.raises(
        _native.FastbconvBuildError, match="ninja is not on PATH: pip install ninja"
    ):
        _native.ensure_built(spec, tmp_path / "cache")


def test_missing_compiler_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(_native.FastbconvBuildError, match=r"no C\+\+ compiler: .* or set CXX"):
        _build.build_spec()


def test_without_a_compiler_one_warning_and_the_reference(tmp_path: Path) -> None:
    for name in ("fastbconv", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import fastbconv
    weight, x = torch.randn(3, 2, 3, 3), torch.randn(2, 2, 5, 5)
    rho = torch.full_like(weight, -3.0)
    for _ in range(2):
        y, kl = fastbconv.functional.bayes_conv2d(x, weight, rho, seed=1, return_kl=True)
assert y.shape == (2, 3, 3, 3) and y.isfinite().all() and kl > 0
assert fastbconv.build_info()['built'] == 'reference'
(warning,) = [w for w in caught if 'fastbconv' in str(w.message)]
print(warning.category.__name__, warning.message)
"""
    environment = {**os.environ, "PATH": str(tmp_path), "FASTBCONV_CACHE": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("RuntimeWarning using the slow PyTorch reference")
    assert "no C++ compiler: 'c++' is not on PATH" in run.stdout


# What is told


def test_build_info() -> None:
    info = fastbconv.build_info()
    assert info["version"] == fastbconv.__version__
    assert info["torch"] == torch.__version__
    assert info["built"] in ("prebuilt", "jit"), info["attempts"]
    assert info["source_hash"] == _build.build_spec().source_hash
    assert info["isa"] in _build.ISAS
    assert info["compiler"]
    assert isinstance(info["cuda"], bool)
    assert isinstance(info["gpus"], list)
    assert info["cuda_reason"]
    assert info["threads"] == 2
    assert Path(info["library"]).exists()
    stamp = _build.native_sources.read_stamp(Path(info["library"]))
    assert stamp == {"source_hash": info["source_hash"], "torch": info["torch"]}


def test_env_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastbconv", "env"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for row in ("version", "torch", "compiler", "isa", "threads", "built", "cache", "cuda"):
        assert re.search(rf"^{row} +[^-\s]", run.stdout, flags=re.MULTILINE), row


def test_env_command_says_why_there_is_no_library(project) -> None:
    code = "from fastbconv.__main__ import main; raise SystemExit(main(['env']))"
    status, out, err = project.run(code, CXX="no-such-compiler")
    assert (status, err) == (0, "")
    assert re.search(r"^built +reference", out, flags=re.MULTILINE)
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in out


def test_commands(capsys, monkeypatch) -> None:
    assert command.main([]) == 0
    assert "usage" in capsys.readouterr().out
    assert command.main(["fly"]) == 2
    message = "unknown command 'fly': expected one of env, train, bench, keras-weights"
    assert message in capsys.readouterr().err
    assert command.main(["envv"]) == 2
    assert "unknown command 'envv' (did you mean env?)" in capsys.readouterr().err
    assert command.main(["env", "--all"]) == 2
    assert "env: expected no arguments, got --all" in capsys.readouterr().err

    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name="tqdm")

    monkeypatch.setattr(command.importlib, "import_module", missing)
    assert command.main(["train"]) == 2
    assert "tqdm is not installed" in (error := capsys.readouterr().err)
    assert "pip install 'fastbconv[train]'" in error


# The cache


@pytest.fixture
def spec(project) -> _build.BuildSpec:
    return _build.build_spec(project.csrc)


def test_temporary_cache_is_private(spec, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "guessable"
    monkeypatch.setattr(_build, "temporary_cache", lambda: cache)
    monkeypatch.setattr(
        _builder, "compile_native", lambda spec, work: (_ for _ in ()).throw(OSError())
    )
    with pytest.raises(_native.FastbconvBuildError, match="cannot use the build cache"):
        _native.ensure_built(spec, cache)
    assert cache.stat().st_mode & 0o777 == 0o700

    refused = pytest.raises(_native.FastbconvBuildError, match=rf"{cache} is not a folder of this")
    cache.chmod(0o777)
    with refused:
        _native.ensure_built(spec, cache)
    cache.chmod(0o700)
    uid = os.getuid()
    with monkeypatch.context() as other, refused:
        other.setattr(os, "getuid", lambda: uid + 1)
        _native.ensure_built(spec, cache)
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    with refused:
        _native.ensure_built(spec, cache)
    with refused:
        _native._cached(cache)


def test_missing_filelock_is_a_warning(project) -> None:
    code = """
import sys
sys.modules['filelock'] = None
from fastbconv import _native
assert _native.load() is None
"""
    status, _, err = project.run(code)
    assert status == 0, err
    assert "jit: filelock is missing: pip install filelock" in err


def test_unreadable_cache_is_named(spec, tmp_path: Path, monkeypatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(_native.FastbconvBuildError, match=r"cannot use the build cache .*denied"):
        _native.ensure_built(spec, tmp_path / "cache")


def test_eviction_takes_what_was_used_longest_ago(spec, tmp_path: Path, monkeypatch) -> None:
    names = [f"old{number}" for number in range(_native._KEPT_LIBRARIES + 1)]
    for age, name in enumerate([*names, spec.key]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "build.json").touch()
        os.utime(tmp_path / name / "build.json", (age, age))
    # Found in the cache: used now.
    assert _native.ensure_built(spec, tmp_path).parent.name == spec.key
    assert (tmp_path / spec.key / "build.json").stat().st_mtime > len(names)

    built = tmp_path / "_C.so"
    built.touch()
    with monkeypatch.context() as failing:
        failing.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError()))
        _native._publish(spec, built, tmp_path / "new")
    assert (tmp_path / "old0").exists()
    _native._publish(spec, built, tmp_path / "new")
    left = {path.name for path in tmp_path.iterdir() if (path / "build.json").exists()}
    assert left == {"new", spec.key, *names[-_native._KEPT_LIBRARIES + 2 :]}
    assert not list(tmp_path.glob("evicted-*"))


def test_evicted_library_is_built_again_and_a_cached_one_needs_no_compiler(project) -> None:
    code = """
from fastbconv import _native
library = _native.ensure_built(_native._build.build_spec(), _native._build.settings().cache)
library.unlink()
info = _native.build_info()
print(info['built'], len(info['attempts']))
"""
    status, out, err = project.run(code)
    assert (status, out) == (0, "jit 1\n"), err
    code = "from fastbconv import _native; print(_native.build_info()['built'])"
    assert project.run(code, CXX="no-such-compiler") == (0, "jit\n", "")
    project.write("csrc/core/answer.h", "#pragma once\ninline int answer() { return 43; }\n")
    assert project.run(code, CXX="no-such-compiler")[1] == "reference\n"
