"""The native programs of tests/simt: built beside the library (stage 2), run first in stage 3.

They need no PyTorch, so they are the cheapest word on the kernels. Binaries are kept in build/, by
architecture and by a digest of all that they are made of: a later run finds them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import process
from .record import ROOT
from .stage import Bench, NotAvailable, NotMeasured

BUILD_LIMIT = 90.0  # seconds for all
RUN_LIMIT = 15.0  # for one program
RUN_TOTAL = 45.0  # for all of them
STUCK = 2  # after so many that do not end, the others are left out


def listed() -> ModuleType:
    """tests/simt_gpu.py, which knows the programs, their order and their flags."""
    tests = ROOT / "tests"
    if not (tests / "simt_gpu.py").exists():
        raise NotAvailable("there is no tests/simt_gpu.py")
    if str(tests) not in sys.path:
        sys.path.append(str(tests))
    return importlib.import_module("simt_gpu")


def names() -> tuple[str, ...]:
    """The programs in their order; none where the tests are not there."""
    try:
        return listed().PROGRAMS
    except NotAvailable:
        return ()


def folder_of(architecture: str, nvcc: str) -> Path:
    """Where the binaries of these sources are."""
    digest = hashlib.sha256(f"{architecture} {nvcc} {listed().FLAGS}".encode())
    for source in sorted([*(ROOT / "csrc").rglob("*"), *(ROOT / "tests" / "simt").glob("*")]):
        if source.is_file():
            digest.update(str(source.relative_to(ROOT)).encode() + source.read_bytes())
    return ROOT / "build" / f"programs-{architecture}-{digest.hexdigest()[:16]}"


def compile_one(nvcc: str, name: str, folder: Path, code: str, deadline: float) -> dict[str, Any]:
    """One program; a binary is there whole or not at all."""
    target = folder / name
    if target.exists():
        return {"status": "ok", "seconds": 0.0, "found": True}
    begin = time.monotonic()
    scratch = folder / f".{name}.{os.getpid()}"
    source = str(listed().source_of(name))
    command = [nvcc, *listed().FLAGS, code, "-o", str(scratch), source]
    ended = process.run(command, max(deadline - begin, 1.0))
    row: dict[str, Any] = {"status": "ok", "seconds": time.monotonic() - begin}
    if ended.status is None:
        row |= {"status": "failed", "reason": f"nvcc did not end in {row['seconds']:.0f} s"}
    elif ended.status != 0:
        text = ended.text[-3000:]
        row |= {"status": "failed", "reason": f"nvcc: status {ended.status}", "output": text}
    else:
        os.replace(scratch, target)
    scratch.unlink(missing_ok=True)
    return row


def compile_all(nvcc: str, architecture: str, limit: float) -> dict[str, Any]:
    """All programs at once, as many as there are cores (or MAX_JOBS)."""
    folder = folder_of(architecture, nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    code = f"-gencode=arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        futures = {
            name: pool.submit(compile_one, nvcc, name, folder, code, begin + limit)
            for name in listed().PROGRAMS
        }
        rows = {name: future.result() for name, future in futures.items()}
    found = {"seconds": time.monotonic() - begin, "architecture": architecture, "programs": rows}
    broken = {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"}
    if broken:
        reason = "; ".join(f"{name}: {why}" for name, why in broken.items())
        found |= {"status": "failed", "reason": reason}
    return found | {"folder": str(folder.relative_to(ROOT))}


def begin(bench: Bench) -> Future[dict[str, Any]]:
    """Starts the compilation in the background, beside that of the library; once."""
    if "programs" not in bench.kept:
        pool = ThreadPoolExecutor(1)
        limit = min(BUILD_LIMIT, max(bench.left(), 5.0))
        bench.kept["programs"] = pool.submit(_compile, bench, limit)
        pool.shutdown(wait=False)
    return bench.kept["programs"]


def _compile(bench: Bench, limit: float) -> dict[str, Any]:
    if bench.dry:
        raise NotMeasured("dry run: they need a GPU")
    listed()  # brings tests/ into sys.path
    nvcc = importlib.import_module("cuda_resources").find_nvcc()
    if nvcc is None:
        raise NotAvailable("there is no nvcc")
    major, minor = torch.cuda.get_device_capability(bench.device)
    return compile_all(nvcc, f"{major}{minor}", limit)


def build(bench: Bench) -> dict[str, Any]:
    """The item of stage 2: what became of each program."""
    return begin(bench).result()


def run_one(bench: Bench, name: str) -> dict[str, Any]:
    """The item of stage 3: a program with schedule 0, in a process of its own."""
    built = bench.record.items("build").get("native programs", {})
    if bench.dry:
        raise NotMeasured("dry run: they need a GPU")
    row = built.get("programs", {}).get(name)
    if row is None:
        raise NotMeasured(f"not built: {built.get('reason') or 'run the stage build first'}")
    if row["status"] != "ok":
        raise NotMeasured(f"not built: {row['reason']}")
    if bench.kept.get("stuck", 0) >= STUCK:
        raise NotMeasured(f"{STUCK} programs before it did not end")
    left = min(RUN_TOTAL - bench.kept.get("programs ran", 0.0), bench.left())
    if left < 1.0:
        raise NotMeasured(f"the programs had {RUN_TOTAL:.0f} s together")
    limit = min(RUN_LIMIT, left)
    start = time.monotonic()
    ended = process.run([str(ROOT / built["folder"] / name), "0"], limit)
    spent = time.monotonic() - start
    bench.kept["programs ran"] = bench.kept.get("programs ran", 0.0) + spent
    found = {"seconds": spent, "exit status": ended.status, "output": ended.text[-3000:]}
    if ended.status is None:
        bench.kept["stuck"] = bench.kept.get("stuck", 0) + 1
        return {**found, "status": "failed", "reason": f"it did not end within {limit:.0f} s"}
    if ended.status != 0:
        last = (ended.text.strip().splitlines() or ["no output"])[-1]
        reason = f"status {ended.status}: {last[:200]}"
        return {**found, "status": "failed", "reason": reason}
    return found
