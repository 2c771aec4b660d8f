"""How the native library is built: one description for setup.py and for the build at first use.

Nothing of ours is imported and only the standard library at import time, because setup.py loads
this file by path, before the package exists. torch is imported inside the functions that need it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE_NAME = "_C"
STAMP_HEADER = "fbc_build_stamp.h"
BACKENDS = ("auto", "native", "reference")
ISAS = ("baseline", "avx2", "avx512")

# Contraction stays off and no fast-math flag is ever added: every fused multiply-add is written out
# in csrc/core, and all instruction sets have to give the same bits. The two relaxations used do not
# change any value, only errno and floating-point traps.
_CXX_FLAGS = (
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
)
_NVCC_FLAGS = ("-O3", "--fmad=false", "-lineinfo", "--threads=2", "-Xcompiler=-fvisibility=hidden")


def _sibling(name: str) -> ModuleType:
    """A file beside this one, which may itself have been loaded by path."""
    location = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"fastbconv.{name}", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


cuda = _sibling("_build_cuda")
native_sources = _sibling("_build_sources")


class FastbconvBuildError(RuntimeError):
    """The native library could not be loaded or built; the message says what was tried."""


@dataclass(frozen=True)
class Settings:
    """The environment variables, read once per use by :func:`settings`."""

    backend: str  # FASTBCONV_BACKEND: auto, native, reference
    cache: Path  # FASTBCONV_CACHE: where libraries built at first use are kept
    isa: str | None  # FASTBCONV_ISA: highest instruction set the kernels may use
    ahead_of_time: bool  # FASTBCONV_AOT: whether setup.py compiles
    huge_pages: bool = True  # FASTBCONV_HUGE_PAGES: advice for large fresh memory


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads every ``FASTBCONV_*`` variable; a wrong value raises ValueError."""

    def choice(name: str, allowed: Sequence[str], default: str | None) -> str | None:
        value = environ.get(name, "").strip().lower() or default
        if value is not None and value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        return value

    backend = choice("FASTBCONV_BACKEND", BACKENDS, "auto")
    assert backend is not None
    return Settings(
        backend=backend,
        cache=_cache_folder(environ),
        isa=choice("FASTBCONV_ISA", ISAS, None),
        ahead_of_time=choice("FASTBCONV_AOT", ("0", "1"), "1") == "1",
        huge_pages=choice("FASTBCONV_HUGE_PAGES", ("0", "1"), "1") == "1",
    )


def _cache_folder(environ: Mapping[str, str]) -> Path:
    if environ.get("FASTBCONV_CACHE"):
        return Path(environ["FASTBCONV_CACHE"]).expanduser().absolute()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]).absolute() / "fastbconv"
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK):
        return home / ".cache" / "fastbconv"
    return temporary_cache()


def temporary_cache() -> Path:
    """The cache of a user without a home; guessable, so ``_native`` asks who owns it."""
    return Path(tempfile.gettempdir()).absolute() / f"fastbconv-{os.getuid()}"


def platform_tag() -> str:
    """Interpreter, system and machine that a library is for."""
    return f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides what the native library is."""

    root: Path  # the csrc folder
    sources: tuple[Path, ...]
    include_dirs: tuple[Path, ...]
    cxx_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    source_hash: str
    version: str
    torch: str
    compiler: str  # first line of its --version
    cuda: bool
    cuda_reason: str
    nvcc: str = ""  # path and release, where CUDA is built

    @property
    def environment_key(self) -> str:
        """Digest of all that is not a source: versions, compiler, flags."""
        parts = (
            self.version,
            self.torch,
            platform_tag(),
            self.compiler,
            f"{self.cuda} {self.nvcc}",
            *map(str, self.cxx_flags + self.nvcc_flags + self.link_flags),
        )
        return _digest("\0".join(parts).encode())

    @property
    def key(self) -> str:
        """Name of the cache folder of the finished library."""
        return f"{self.version}-torch{self.torch}-{self.environment_key}-{self.source_hash}"

    @property
    def work_key(self) -> str:
        """Name of the folder with the object files: one per source tree, so that an edit recompiles
        only what it touches."""
        return f"work-{self.environment_key}-{_digest(str(self.root).encode())}"

    @property
    def stamp(self) -> str:
        """Written into the library, and found there without loading it."""
        return f"{native_sources.STAMP_PREFIX}{self.source_hash}:torch={self.torch};"

    @property
    def without_cuda(self) -> str:
        """What is said when CUDA is left out though torch has it; else nothing."""
        import torch

        left_out = torch.version.cuda is not None and not self.cuda
        return f"fastbconv: CUDA is left out: {self.cuda_reason}" if left_out else ""

    def write_stamp(self, folder: Path) -> None:
        """Writes the header that only ``bindings/module.cpp`` includes.

        A header and not a ``-D`` flag: the hash changes with every edit, and a changed command
        line would recompile every file.
        """
        text = (
            "// Written by the build.\n#pragma once\n"
            f'#define FBC_SOURCE_HASH "{self.source_hash}"\n'
            f'#define FBC_BUILD_STAMP "{self.stamp}"\n'
        )
        path = folder / STAMP_HEADER
        if not path.exists() or path.read_text() != text:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def extension(self, stamp_folder: Path, relative_to: Path) -> Any:
        """The setuptools extension of an ahead-of-time build."""
        from torch.utils import cpp_extension

        self.write_stamp(stamp_folder)
        if self.without_cuda:
            print(self.without_cuda, file=sys.stderr)
        make = cpp_extension.CUDAExtension if self.cuda else cpp_extension.CppExtension
        return make(
            f"fastbconv.{MODULE_NAME}",
            # setuptools refuses absolute sources, and they would end up in the wheel's record.
            [os.path.relpath(source, relative_to) for source in self.sources],
            include_dirs=[str(folder) for folder in (*self.include_dirs, stamp_folder)],
            extra_compile_args={"cxx": list(self.cxx_flags), "nvcc": list(self.nvcc_flags)},
            extra_link_args=list(self.link_flags),
        )

    def compile(self, folder: Path) -> Path:
        """Compiles with torch's builder in ``folder`` and imports the result (a smoke test)."""
        from torch.utils import cpp_extension

        self.write_stamp(folder)
        os.environ.setdefault("MAX_JOBS", str(_usable_cpus()))
        cpp_extension.load(
            MODULE_NAME,
            [str(source) for source in self.sources],
            extra_cflags=list(self.cxx_flags),
            extra_cuda_cflags=list(self.nvcc_flags),
            extra_ldflags=list(self.link_flags),
            extra_include_paths=[str(path) for path in (*self.include_dirs, folder)],
            build_directory=str(folder),
            with_cuda=self.cuda,
        )
        return folder / f"{MODULE_NAME}.so"


def build_spec(
    root: Path | None = None, ahead_of_time: bool = False, *, without_cuda: str = ""
) -> BuildSpec:
    """Describes the build for the interpreter, torch and compiler at hand.

    Args:
        root: The csrc folder; by default the one that belongs to this file.
        ahead_of_time: Whether the library is for other machines too, with other GPUs.
        without_cuda: Why CUDA is left out whatever there is; empty: it is not.

    Raises:
        FastbconvBuildError: The sources or a C++ compiler are missing.
    """
    import torch

    root = root or native_sources.find_root()
    if root is None:
        raise FastbconvBuildError("the native sources (csrc) are not beside the package")
    if sys.platform not in ("linux", "darwin"):
        raise FastbconvBuildError(
            f"the native library is built on Linux and macOS, not on {sys.platform}"
        )
    compiler = compiler_version()
    openmp_compile, openmp_link = _openmp_flags(compiler)
    toolkit, cuda_reason = None, without_cuda
    if not without_cuda:
        toolkit, cuda_reason = cuda.support(root, ahead_of_time)
    has_cuda = toolkit is not None
    return BuildSpec(
        root=root,
        sources=native_sources.compiled(root, has_cuda),
        include_dirs=(root, *_pybind11_folders()),
        cxx_flags=_CXX_FLAGS + openmp_compile + (("-DFBC_WITH_CUDA",) if has_cuda else ()),
        nvcc_flags=(*_NVCC_FLAGS, *toolkit.gencode, "-DFBC_WITH_CUDA") if toolkit else (),
        link_flags=openmp_link,
        source_hash=native_sources.source_hash(root, has_cuda),
        version=_package_version(),
        torch=str(torch.__version__),
        compiler=compiler,
        cuda=has_cuda,
        cuda_reason=cuda_reason,
        nvcc=f"{toolkit.nvcc} {toolkit.release}" if toolkit else "",
    )


def compiler_command() -> str:
    """The C++ compiler torch's builder will call."""
    return os.environ.get("CXX", "c++")


@functools.lru_cache
def _version_line(command: str) -> str:
    # CXX may carry arguments or a launcher ("ccache g++").
    words = command.split()
    if not words or shutil.which(words[0]) is None:
        raise FastbconvBuildError(
            f"no C++ compiler: {command!r} is not on PATH. Install one (g++ 11 or later, or clang) "
            "or set CXX to its path"
        )
    run = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    lines = (run.stdout or run.stderr).strip().splitlines()
    if run.returncode != 0 or not lines:
        raise FastbconvBuildError(f"the C++ compiler {command!r} fails at --version: {run.stderr}")
    return lines[0]


def compiler_version() -> str:
    """First line of the compiler's ``--version``.

    Raises:
        FastbconvBuildError: There is none.
    """
    return _version_line(compiler_command())


def _openmp_flags(compiler: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags to compile and to link with; empty where there is no OpenMP (the library is serial)."""
    if sys.platform == "darwin" or ("clang" in compiler and not _accepts_openmp(compiler)):
        return (), ()
    import torch

    # Two OpenMP runtimes in one process would be two thread pools, and torch.set_num_threads would
    # reach only one. A wheel of torch may bundle libgomp under a name of its own: link that one.
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp-*.so*"))
    if bundled and "clang" not in compiler:
        return ("-fopenmp",), (f"-L{bundled[0].parent}", f"-l:{bundled[0].name}")
    return ("-fopenmp",), ("-fopenmp",)


@functools.lru_cache
def _accepts_openmp(compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler_command().split(), "-fopenmp", str(source), "-o", f"{folder}/probe"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _pybind11_folders() -> tuple[Path, ...]:
    import torch

    if (Path(torch.__file__).parent / "include" / "pybind11").is_dir():
        return ()  # torch's own headers, already on its include path
    import pybind11

    return (Path(pybind11.get_include()),)


def _package_version() -> str:
    scope: dict[str, str] = {}
    exec((Path(__file__).parent / "_version.py").read_text(), scope)
    return scope["__version__"]


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _main(root: str, folder: str, without_cuda: str = "") -> None:
    """The builder process: compile and exit. Started by ``_builder``, under lock and cache."""
    import signal
    import threading

    def die_with_parent() -> None:
        # The parent holds the other end of our standard input. When it is gone, so is the lock it
        # held, and the next builder must not meet our ninja in the same folder. TERM, so that ninja
        # ends its compilers, which it has put into groups of their own.
        os.read(0, 1)
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=die_with_parent, daemon=True).start()
    status = 1
    try:
        build_spec(Path(root), without_cuda=without_cuda).compile(Path(folder))
        status = 0
    except (RuntimeError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # Not the interpreter's own end: it would tear down standard input under the waiting thread.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _main(*sys.argv[1:])
