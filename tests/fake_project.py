"""A project with our build files and tiny native sources: a whole build takes seconds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_SOURCES = {
    "core/answer.h": "#pragma once\ninline int answer() { return 42; }\n",
    "cpu/kernel.cpp": '#include "core/answer.h"\nint kernel() { return answer(); }\n',
    "cpu/other.cpp": "int other() { return 1; }\n",
    "bindings/module.cpp": """
#include <Python.h>
#include "fbc_build_stamp.h"
int kernel();
static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:i}", "source_hash", FBC_SOURCE_HASH, "stamp",
                       FBC_BUILD_STAMP, "isa", "baseline", "answer", kernel());
}
static PyObject* limit_isa(PyObject*, PyObject* name) {
  PySys_WriteStdout("limited to %s\\n", PyUnicode_AsUTF8(name));
  Py_RETURN_NONE;
}
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""},
                                {"limit_isa", limit_isa, METH_O, ""},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
""",
}
_OURS = (
    "_build.py", "_build_cuda.py", "_build_sources.py", "_builder.py", "_native.py",
    "_version.py", "__main__.py", "py.typed",
)  # fmt: skip

REPORT = """
import json, sys
from fastbconv import _native
info = _native.build_info()
print(json.dumps({key: info.get(key) for key in ("built", "answer", "library", "attempts")}))
"""


class FakeProject:
    """Sources, package, cache and a ``c++`` that can be told to hang, in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.csrc = self.folder / "csrc"
        self.cache = folder / "cache"
        self.tools = folder / "tools"
        self.hang = folder / "hang"
        self.hung = folder / "hung"
        for name, text in _SOURCES.items():
            self.write(f"csrc/{name}", text)
        for name in _OURS:
            self.write(f"fastbconv/{name}", (ROOT / "fastbconv" / name).read_text())
        self.write("fastbconv/__init__.py", "")
        for name in ("setup.py", "pyproject.toml", "LICENSE"):
            self.write(name, (ROOT / name).read_text())
        self.write("README.md", "fake\n")
        self._write_compiler()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _write_compiler(self) -> None:
        self.tools.mkdir()
        compiler = self.tools / "c++"
        compiler.write_text(
            f'#!/bin/sh\ncase "$*" in *kernel.cpp*)\n'
            f'  if [ -e "{self.hang}" ]; then echo $$ > "{self.hung}"; exec sleep 60; fi;;\nesac\n'
            f'exec "{shutil.which("c++")}" "$@"\n'
        )
        compiler.chmod(0o755)

    def environment(self, **extra: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTBCONV_")}
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        return {**inherited, "PATH": path, "FASTBCONV_CACHE": str(self.cache), **extra}

    def start(self, code: str = REPORT, **extra: str) -> subprocess.Popen[str]:
        """A fresh interpreter whose ``fastbconv`` is the one of this project."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores SIGINT, and so would everything it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, code: str = REPORT, **extra: str) -> tuple[int, str, str]:
        process = self.start(code, **extra)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
