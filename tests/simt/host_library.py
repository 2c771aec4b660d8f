"""Builds the library of the CUDA path on the interpreter, for machines without a GPU.

The CUDA operators of csrc/bindings are compiled with FBC_SIMT_HOST, which registers them under
the CPU key, and the kernels of csrc/cuda by the C++ compiler against this folder. The result is a
module ``fastbconv._C`` like any other, and every Python test that uses it runs the CUDA path.

As a program: ``python host_library.py FOLDER`` compiles in FOLDER and prints where the library is.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import filelock

from fastbconv import _build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
LIBRARY_VARIABLE = "FASTBCONV_TEST_LIBRARY"  # tests/conftest.py loads what it names

# Bindings of the CPU's kernels, whose place the CUDA operators take; and the CPU files that
# module.cpp asks what the processor can do.
_LEFT_OUT = ("cpu_", "provider_", "epilogue")
_CPU_FILES = ("capability.cpp", "huge_pages.cpp", "select.cpp")
_FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-w", "-pthread")


def sources(folder: Path) -> list[Path]:
    """All that is compiled; a .cu file through a .cpp file in ``folder`` that includes it."""
    bindings = sorted((CSRC / "bindings").glob("*.cpp"))
    found = [path for path in bindings if not path.name.startswith(_LEFT_OUT)]
    found += [CSRC / "cpu" / name for name in _CPU_FILES]
    found += sorted((CSRC / "cuda").glob("*.cpp"))
    for kernel in sorted((CSRC / "cuda").glob("*.cu")):
        wrapper = folder / f"kernel_{kernel.stem}.cpp"
        text = f'#include "cuda/{kernel.name}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        found.append(wrapper)
    return found


def build() -> Path:
    """The library, compiled in the cache of the libraries where it is not up to date."""
    import torch

    key = "\0".join([str(torch.__version__), _build.compiler_version(), str(HERE), *_FLAGS])
    name = f"interpreter-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = _build.settings().cache / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(folder) + ".lock"):
        run = subprocess.run(
            [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False
        )
    if run.returncode != 0:
        raise RuntimeError(f"{name}: {run.stdout[-8000:]}{run.stderr[-4000:]}")
    return Path(run.stdout.splitlines()[-1])


def _main(folder: Path) -> None:
    from torch.utils import cpp_extension

    spec = _build.build_spec(CSRC)
    spec.write_stamp(folder)
    (folder / "lock").unlink(missing_ok=True)  # torch's, of a build that was killed; ours is held
    files = sources(folder)
    for stale in set(folder.glob("kernel_*.cpp")) - set(files):
        stale.unlink()
    openmp = [flag for flag in spec.cxx_flags if flag == "-fopenmp"]
    cpp_extension.load(
        _build.MODULE_NAME,
        [str(path) for path in files],
        extra_cflags=[*_FLAGS, *openmp, "-DFBC_SIMT_HOST"],
        extra_ldflags=[*spec.link_flags, "-pthread"],
        extra_include_paths=[str(path) for path in (*spec.include_dirs, HERE, folder)],
        build_directory=str(folder),
    )
    print(folder / f"{_build.MODULE_NAME}.so")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
