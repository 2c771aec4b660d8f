"""Stage 2: the native library, prebuilt or built here, its CUDA kernels; native programs."""

from __future__ import annotations

import time
from typing import Any

from . import process, programs
from .stage import Bench, Item, NotMeasured

BUILD = "import fastbconv; fastbconv.build_info()"


def build(bench: Bench) -> dict[str, Any]:
    """Loads the library in a process of its own, which may be ended when it takes too long."""
    programs.begin(bench)  # in the background
    begin = time.monotonic()
    limit = max(bench.left(), 5.0)
    ended = process.run(process.python("-W", "always", "-c", BUILD), limit)
    if ended.status is None:
        raise RuntimeError(
            f"the build did not end within {limit:.0f} s: run --only build --budget 900 first"
        )
    if ended.status != 0:
        raise RuntimeError(f"{BUILD}: {ended.text[-3000:]}")
    found = {"seconds": time.monotonic() - begin, "said": ended.text[-2000:]}
    return found | bench.instead("the library of the CPU: no CUDA kernel is asked for")


def info(bench: Bench) -> dict[str, Any]:
    """fastbconv.build_info(), without folders; fails where the CUDA kernels are missing."""
    import fastbconv as fb

    if bench.record.items("build").get("build", {}).get("status") == "failed":
        raise NotMeasured("the build failed")
    begin = time.monotonic()
    found = {
        name: value for name, value in fb.build_info().items() if name not in ("library", "cache")
    }
    found["load seconds"] = time.monotonic() - begin
    found["grouped"] = hasattr(fb, "grouped")
    if found["built"] == "reference" or not (bench.dry or found["cuda"]):
        why = "; ".join([str(found["cuda_reason"]), *map(str, found["attempts"])])
        raise RuntimeError(f"the native library has no kernels for this device: {why}")
    return found | bench.instead(f"CUDA kernels: {bool(found['cuda'])}, and none is asked for")


def items(bench: Bench) -> list[Item]:
    """Stage 2."""
    return [
        Item("build", build, limit=max(bench.left(), 5.0) + 15.0, least=0.0),
        Item("info", info, limit=60.0, least=0.0),
        Item("native programs", programs.build, limit=programs.BUILD_LIMIT + 15.0, least=0.0),
    ]
