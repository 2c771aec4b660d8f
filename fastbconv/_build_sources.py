"""The native sources of a build: where they are, which are compiled, their digest, their stamp.

Like ``_build``, which loads it by path, this file needs the standard library alone.

Note [Source hash]. A library's hash is the digest of the sources it can depend on: without CUDA
these are all but ``cuda/`` and ``bindings/cuda_*``, so that an edit of a GPU kernel leaves a CPU
library as it is. A library found ready made may be of either kind, and its hash tells which: it
fits where its hash is one of :func:`hashes`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

STAMP_PREFIX = "fastbconv-stamp:"
SUFFIXES = {".h", ".inc", ".cpp", ".cu", ".cuh"}

_COMPILED = ("cpu/*.cpp", "bindings/*.cpp")
_COMPILED_FOR_CUDA = ("cuda/*.cpp", "cuda/*.cu")
_CUDA_BINDING = "bindings/cuda_"  # how the names of the bindings begin that only CUDA needs


def find_root() -> Path | None:
    """The csrc folder: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_csrc", here.parent / "csrc"):
        if (folder / "bindings").is_dir():
            return folder
    return None


def compiled(root: Path, with_cuda: bool) -> tuple[Path, ...]:
    """The files that are given to the compilers."""
    patterns = _COMPILED + (_COMPILED_FOR_CUDA if with_cuda else ())
    found = (path for pattern in patterns for path in sorted(root.glob(pattern)))
    return tuple(path for path in found if with_cuda or not _for_cuda(path, root))


def source_hash(root: Path, with_cuda: bool) -> str:
    """Digest of the names and contents of the sources; see Note [Source hash]."""
    digest = hashlib.sha256()
    files = (path for path in root.rglob("*") if path.suffix in SUFFIXES)
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        if with_cuda or not _for_cuda(path, root):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def hashes(root: Path) -> tuple[str, str]:
    """The hash of a library of these sources: with CUDA, and without."""
    return source_hash(root, True), source_hash(root, False)


def read_stamp(library: Path) -> dict[str, str] | None:
    """Source hash and torch version inside a library, read without loading it.

    Loading registers the operators, so a library must be known to fit before it is loaded.
    """
    pattern = re.compile(STAMP_PREFIX.encode() + rb"([0-9a-f]+):torch=([^;]+);")
    found = pattern.search(library.read_bytes())
    return None if found is None else {"source_hash": found[1].decode(), "torch": found[2].decode()}


def _for_cuda(path: Path, root: Path) -> bool:
    return path.relative_to(root).as_posix().startswith(("cuda/", _CUDA_BINDING))
