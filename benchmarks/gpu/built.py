"""Stage 2: the native library, prebuilt or built here, and that it has the CUDA kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from .record import ROOT
from .stage import Bench, Item

BUILD = "import fastbconv; fastbconv.build_info()"


def build(bench: Bench) -> dict[str, Any]:
    """Loads the library in a process of its own, which may be ended when it takes too long."""
    begin = time.monotonic()
    folder = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", BUILD],
        env={**os.environ, **folder},
        capture_output=True,
        text=True,
        timeout=max(bench.left(), 5.0),
        check=False,
    )
    if run.returncode != 0:
        raise RuntimeError(f"{BUILD}: {(run.stderr or run.stdout)[-3000:]}")
    return {"seconds": time.monotonic() - begin, "said": run.stderr[-2000:]}


def info(bench: Bench) -> dict[str, Any]:
    """fastbconv.build_info(), without folders; fails where the CUDA kernels are missing."""
    import fastbconv as fb

    begin = time.monotonic()
    found = {
        name: value for name, value in fb.build_info().items() if name not in ("library", "cache")
    }
    found["load seconds"] = time.monotonic() - begin
    found["grouped"] = hasattr(fb, "grouped")
    if found["built"] == "reference" or not (bench.dry or found["cuda"]):
        why = "; ".join([str(found["cuda_reason"]), *map(str, found["attempts"])])
        raise RuntimeError(f"the native library has no kernels for this device: {why}")
    return found


def items(bench: Bench) -> list[Item]:
    """Stage 2."""
    return [
        Item("build", build, limit=max(bench.left(), 5.0) + 5.0, least=0.0),
        Item("info", info, limit=60.0, least=0.0),
    ]
