"""Finds, builds and loads the native library ``fastbconv._C``.

The order, decided once per process: the library built ahead of time, where it was compiled from the
sources at hand for this torch; a library built earlier and kept in the cache; a new build into the
cache; the pure-PyTorch reference, with one warning. Importing this module does none of it.

Note [Build cache]. A build runs in a process of its own, in the folder
``<cache>/work-<environment>-<source tree>``, where object files stay, so that an edit recompiles
little. The finished library is copied to ``<version>-torch<version>-<environment>-<sources>``
beside it, and ``build.json`` is written last, by rename: a folder without it does not count. The
whole is done under a lock file of ours, with a second look at the cache inside it. A killed build
leaves a lock that the system has released, object files that ninja checks again, and torch's own
``lock`` file, which is removed while holding ours.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import stat
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _build, _builder
from ._build import BuildSpec, FastbconvBuildError, Settings

__all__ = ["FastbconvBuildError", "build_info", "load"]

_FULL_NAME = f"{__package__}.{_build.MODULE_NAME}"
_RECORD = "build.json"
_EVICTED = "evicted-"
_KEPT_LIBRARIES = 8


@dataclass
class _State:
    """What this process decided; filled once by :func:`load`."""

    decided: bool = False
    module: ModuleType | None = None
    built: str = "reference"  # prebuilt, jit, reference
    library: Path | None = None
    attempts: list[str] = field(default_factory=list)
    cuda_problem: str = ""  # why CUDA did not compile


_state = _State()
_mutex = threading.RLock()


def load() -> ModuleType | None:
    """Loads the native library, building it if need be, and remembers the outcome.

    Returns:
        The module, or None where the reference implementation is to be used: by request
        (``FASTBCONV_BACKEND=reference``), or because the library cannot be had, which warns once.

    Raises:
        FastbconvBuildError: ``FASTBCONV_BACKEND=native`` and the library cannot be had.
        ValueError: An environment variable has a value that does not exist.
    """
    with _mutex:
        if _state.decided:
            if _state.module is None and _build.settings().backend == "native":
                raise FastbconvBuildError(_explain(_state.attempts))
            return _state.module
        config = _build.settings()
        if config.backend == "reference":
            _state.attempts.append("not tried: FASTBCONV_BACKEND=reference")
        else:
            _find_library(config)
        _state.decided = True
        if _state.module is not None:
            _configure(_state.module, config)
        elif config.backend == "native":
            raise FastbconvBuildError(_explain(_state.attempts))
        elif config.backend == "auto":
            warnings.warn(
                f"using the slow PyTorch reference. {_explain(_state.attempts)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return _state.module


def build_info() -> dict[str, Any]:
    """What is running: versions, compiler, instruction set, how the library was built, and where.

    Loads the native library if that has not happened yet.

    Returns:
        A dict with ``version``, ``torch``, ``python``, ``compiler``, ``isa``, ``cuda`` (bool),
        ``cuda_reason``, ``gpus`` (their architectures), ``source_hash``, ``built``
        (``'prebuilt'``, ``'jit'`` or ``'reference'``), ``library`` (path or None), ``cache``
        (folder), ``threads`` and ``attempts`` (what was tried and did not work).

    Raises:
        FastbconvBuildError: ``FASTBCONV_BACKEND=native``, and the library cannot be built.
        ValueError: an environment variable of ours with an unknown value.

    Example:
        >>> build_info()["built"] in ("prebuilt", "jit", "reference")
        True
    """
    import torch

    module = load()
    info: dict[str, Any] = {
        "version": _build._package_version(),
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "compiler": None,
        "isa": None,
        "cuda": False,
        "cuda_reason": "no native library",
        "source_hash": None,
    }
    if module is not None:
        info.update(module.build_info())
        info.pop("stamp", None)
        info["cuda"] = bool(info["cuda"])
        info["cuda_reason"] = _state.cuda_problem or _build.cuda.story(
            _build.native_sources.find_root(), info["cuda"], _state.built == "prebuilt"
        )
    info.update(
        built=_state.built,
        gpus=[f"sm_{major}{minor}" for major, minor in _build.cuda.capabilities()],
        library=None if _state.library is None else str(_state.library),
        cache=str(_build.settings().cache),
        threads=torch.get_num_threads(),
        attempts=list(_state.attempts),
    )
    return info


def _configure(module: ModuleType, config: Settings) -> None:
    if _state.cuda_problem:
        warnings.warn(
            f"fastbconv has no CUDA kernels: {_state.cuda_problem}", RuntimeWarning, stacklevel=3
        )
    if config.isa is not None:
        module.limit_isa(config.isa)
    if not config.huge_pages:
        module.use_huge_pages(False)
    if not module.build_info().get("openmp", True):
        warnings.warn(
            "the native library is built without OpenMP: it uses one thread",
            RuntimeWarning,
            stacklevel=3,
        )


def _explain(attempts: list[str]) -> str:
    tried = "\n".join(f"  - {attempt}" for attempt in attempts)
    return (
        f"fastbconv has no native library. Tried:\n{tried}\n"
        "To have it: install a C++ compiler and ninja (pip install ninja) and start again, or run "
        "'python -m fastbconv env' to see the whole story. FASTBCONV_BACKEND=reference asks for "
        "the reference without this message."
    )


def _find_library(config: Settings) -> None:
    """Fills the state from the first source that works; notes what the others said."""
    problem = ""
    try:
        spec: BuildSpec | None = _build.build_spec()
    except (FastbconvBuildError, ImportError, OSError) as error:
        spec, problem = None, str(error)
    # The cache a second time: a library found there may be evicted before it is loaded.
    for kind in ("prebuilt", "jit", "jit"):
        library = None
        try:
            if kind == "prebuilt":
                library = _prebuilt()
                if library is None:
                    continue
            elif spec is None:
                library = _cached(config.cache)
                if library is None:
                    raise FastbconvBuildError(problem)
            else:
                library = _with_or_without_cuda(spec, config.cache)
            _state.module = _import(library)
        except (FastbconvBuildError, ImportError, OSError) as error:
            said = str(error) if library is None else f"{library} cannot be loaded ({error})"
            _state.attempts.append(f"{kind}: {said}")
            if kind == "jit" and library is not None:
                # It was whole when it was built: damaged (the next start builds it anew) or gone.
                with contextlib.suppress(OSError):
                    (library.parent / _RECORD).unlink(missing_ok=True)
            if kind == "jit" and (library is None or library.exists()):
                return
        else:
            _state.built, _state.library = kind, library
            return


def _prebuilt() -> Path | None:
    """The library in the package, if it was built from these sources for this torch."""
    import torch

    found = importlib.util.find_spec(_FULL_NAME)
    if found is None or found.origin is None:
        return None
    library = Path(found.origin)
    stamp = _build.native_sources.read_stamp(library)
    if stamp is None:
        raise FastbconvBuildError(f"{library} carries no build stamp")
    if stamp["torch"] != str(torch.__version__):
        raise FastbconvBuildError(
            f"{library} is built for torch {stamp['torch']}, and this is torch "
            f"{torch.__version__}: install fastbconv again"
        )
    root = _build.native_sources.find_root()
    expected = _build.native_sources.hashes(root) if root else (stamp["source_hash"],)
    if stamp["source_hash"] not in expected:
        raise FastbconvBuildError(
            f"{library} is built from other sources ({stamp['source_hash']}, expected "
            f"{expected[0]} with CUDA or {expected[1]} without)"
        )
    return library


def _import(library: Path) -> ModuleType:
    """Imports a library as ``fastbconv._C``, wherever it lies."""
    if _FULL_NAME in sys.modules:
        return sys.modules[_FULL_NAME]
    import torch  # noqa: F401  the library needs torch's symbols

    spec = importlib.util.spec_from_file_location(
        _FULL_NAME,
        library,
        loader=importlib.machinery.ExtensionFileLoader(_FULL_NAME, str(library)),
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_FULL_NAME] = module
    setattr(sys.modules[__package__], _build.MODULE_NAME, module)
    return module


def _with_or_without_cuda(spec: BuildSpec, cache: Path) -> Path:
    """The library of ``spec``, or, where its CUDA part does not compile, the one without; see
    Note [Failed CUDA builds]."""
    if not spec.cuda:
        return ensure_built(spec, cache)
    said, record = _builder.known_failure(spec, cache), _builder.failure_record(spec, cache)
    known = said is not None
    if said is None:
        try:
            return ensure_built(spec, cache)
        except _builder.CompileError as error:
            said = str(error)
    problem = (
        f"with {spec.cuda_reason}, {said}\nThe library is compiled without CUDA instead. CUDA is "
        "tried again when the sources, nvcc or the variables it reads have changed, and after\n"
        f"    rm '{record}'"
    )
    if f"jit: {problem}" not in _state.attempts:  # this may be the second look into the cache
        _state.attempts.append(f"jit: {problem}")
    library = ensure_built(_build.build_spec(spec.root, without_cuda="it does not compile"), cache)
    if not known:
        _builder.remember_failure(spec, cache, said)
    _state.cuda_problem = problem
    return library


def ensure_built(spec: BuildSpec, cache: Path) -> Path:
    """The finished library of ``spec`` in ``cache``, compiled now if it is not there.

    Safe against other processes that want the same, and against earlier ones that were killed.

    Raises:
        FastbconvBuildError: A tool is missing, the compiler failed, or the cache cannot be written.
    """
    folder = cache / spec.key
    library = folder / f"{_build.MODULE_NAME}.so"
    record = folder / _RECORD
    work = cache / spec.work_key
    try:
        private = cache == _build.temporary_cache()
        cache.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        _check_owner(cache)
        if record.exists():
            with contextlib.suppress(OSError):  # a cache that is only read serves as well
                os.utime(record)
            return library
        try:
            import filelock
        except ImportError as error:
            raise FastbconvBuildError("filelock is missing: pip install filelock") from error
        with filelock.FileLock(f"{work}.lock"):
            if not record.exists():
                _builder.compile_native(spec, work)
                if _build.native_sources.source_hash(spec.root, spec.cuda) != spec.source_hash:
                    raise FastbconvBuildError("the sources changed while compiling: start again")
                _publish(spec, work / library.name, folder)
    except OSError as error:
        raise FastbconvBuildError(
            f"cannot use the build cache {cache}: {error}. Set FASTBCONV_CACHE to another folder"
        ) from error
    return library


def _check_owner(cache: Path) -> None:
    """Refuses a cache in the temporary folder that somebody else could have filled."""
    if cache != _build.temporary_cache():
        return
    found = os.lstat(cache)
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not mine or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FastbconvBuildError(
            f"the build cache {cache} is not a folder of this user alone. Remove it, or set "
            "FASTBCONV_CACHE to another folder"
        )


def _cached(cache: Path) -> Path | None:
    """A library built earlier that fits, for want of the compiler that would name it."""
    import torch

    root = _build.native_sources.find_root()
    if root is None or not cache.is_dir():
        return None
    _check_owner(cache)
    wanted = {"torch": str(torch.__version__), "platform": _build.platform_tag()}
    hashes = _build.native_sources.hashes(root)
    for record in cache.glob(f"*/{_RECORD}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a record
            found = json.loads(record.read_text())
            if wanted.items() <= found.items() and found.get("source_hash") in hashes:
                return record.parent / f"{_build.MODULE_NAME}.so"
    return None


def _publish(spec: BuildSpec, built: Path, folder: Path) -> None:
    """Copies the library to its own folder; the record comes last and makes it count."""
    folder.mkdir(exist_ok=True)
    _builder.replace(folder / built.name, built.read_bytes())
    record = {
        "source_hash": spec.source_hash,
        "torch": spec.torch,
        "platform": _build.platform_tag(),
        "compiler": spec.compiler,
        "flags": [*spec.cxx_flags, *spec.nvcc_flags, *spec.link_flags],
        "cuda": spec.cuda_reason,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    _builder.replace(folder / _RECORD, json.dumps(record, indent=1).encode())
    with contextlib.suppress(OSError):  # others may tidy up at the same time
        _evict(folder)


def _evict(kept: Path) -> None:
    """Removes the libraries used longest ago, never ``kept``."""
    records = [path for path in kept.parent.glob(f"*/{_RECORD}") if path.parent != kept]
    records.sort(key=lambda path: path.stat().st_mtime)
    for record in records[: 1 - _KEPT_LIBRARIES]:
        # Renamed first: no other process may find half a folder.
        gone = kept.parent / f"{_EVICTED}{os.getpid()}-{record.parent.name}"
        with contextlib.suppress(OSError):
            record.parent.rename(gone)
            (gone / _RECORD).unlink()
    for folder in kept.parent.glob(f"{_EVICTED}*"):
        shutil.rmtree(folder, ignore_errors=True)
