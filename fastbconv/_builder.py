"""The builder process, and what is remembered of one that failed at CUDA.

Note [Failed CUDA builds]. Where CUDA does not compile, the library is compiled without it, and
``<key>.failed.json`` is left in the cache beside where the library would lie. While it is there and
says what it would say now (sources, tools and flags are in the key, the variables that nvcc and
torch read are in the record), CUDA is not tried again: each start would take minutes to fail. It is
written only once the library without CUDA is there, so that a full disk is not taken for CUDA.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from . import _build
from ._build import BuildSpec, FastbconvBuildError

# What can change how CUDA compiles and is not in the key of a build.
_VARIABLES = (
    "CUDA_HOME", "CUDA_PATH", "PYTORCH_NVCC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS", "CXX", "CC", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH",
)  # fmt: skip
_COMMAND = re.compile(r" -MMD | --generate-dependencies-with-compile ")
_COMPLAINT = re.compile(r"error|nvcc fatal|not found", re.IGNORECASE)


class CompileError(FastbconvBuildError):
    """The sources did not compile or link, as distinct from a tool that is missing."""


def compile_native(spec: BuildSpec, work: Path) -> None:
    """Runs the builder in a process group of its own, inside ``work``.

    Raises:
        CompileError: A compiler or torch's builder failed.
        FastbconvBuildError: A tool is missing.
    """
    work.mkdir(exist_ok=True)
    (work / "lock").unlink(missing_ok=True)  # of a killed builder: torch would wait for it for ever
    environment = dict(os.environ)
    # ninja is a dependency of ours: its program lies beside the interpreter, on PATH or not.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    )
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if shutil.which("ninja", path=environment["PATH"]) is None:
        raise FastbconvBuildError("ninja is not on PATH: pip install ninja")
    effort = "with CUDA: several minutes, once" if spec.cuda else "about a minute, once"
    for line in (spec.without_cuda, f"fastbconv: compiling the native library ({effort})"):
        if line:
            print(line, file=sys.stderr)
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    arguments = [_build.__file__, str(spec.root), str(work)]
    if not spec.cuda:
        arguments.append(spec.cuda_reason)  # the builder need not find out again
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,  # never written: its end tells the builder that we are gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=work,
        env=environment,
        start_new_session=True,
    ) as builder:
        assert builder.stdout is not None
        try:
            output = builder.stdout.read()  # until the builder has ended
        finally:
            # Whatever ended the wait, nothing may go on writing here once the lock is released.
            # TERM, not KILL: ninja gives compilers process groups and ends them only when asked.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(builder.pid, signal.SIGTERM)
            status = builder.wait()
    if status != 0:
        log = work / "build.log"
        log.write_text(output)
        raise CompileError(f"compiling failed ({log}):\n{_essence(output)}")


def _essence(output: str) -> str:
    """The compiler's complaints without its command lines; the end of the output if it has none."""
    lines = [line for line in output.splitlines() if line.strip() and not _COMMAND.search(line)]
    complaints = [
        line for line in lines if _COMPLAINT.search(line) and "Error building" not in line
    ]
    return "\n".join(f"    {line}" for line in (complaints[:10] or lines[-10:]))


def failure_record(spec: BuildSpec, cache: Path) -> Path:
    """Where a failed CUDA build of ``spec`` is remembered."""
    return cache / f"{spec.key}.failed.json"


def known_failure(spec: BuildSpec, cache: Path) -> str | None:
    """What the compilers said when CUDA failed under the same conditions."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no record
        record = json.loads(failure_record(spec, cache).read_text())
        if record["variables"] == _variables():
            return str(record["said"])
    return None


def remember_failure(spec: BuildSpec, cache: Path, said: str) -> None:
    """Leaves the record; a cache that cannot be written does without."""
    record = {"said": said, "variables": _variables()}
    with contextlib.suppress(OSError):
        replace(failure_record(spec, cache), json.dumps(record, indent=1).encode())


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}


def replace(path: Path, content: bytes) -> None:
    """Writes a file that is either absent or whole, even after a power cut."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
