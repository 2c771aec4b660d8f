"""The stages in their order, and one of them run to its end in this process."""

from __future__ import annotations

import contextlib
import importlib
import time
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .clock import Clock
from .record import DeviceLost, Record
from .stage import BROKEN, Bench, run_items


@dataclass(frozen=True)
class Stage:
    """A stage: the module with its ``items``, its share of the time, and what it is."""

    module: str
    share: float
    text: str


STAGES = {
    "facts": Stage("facts", 15, "device, versions, clocks, ceilings"),
    "build": Stage("built", 90, "the native library, its CUDA kernels, native programs"),
    "correctness": Stage(
        "correctness", 120, "native programs, float64, bits, graphs, stress, tests, sanitizer"
    ),
    "kernels": Stage("kernels", 45, "sampling, gradients, epilogue, convolutions alone"),
    "models": Stage("models", 145, "networks x eager, graph x forward, step"),
    "samples": Stage("samples", 25, "many draws, a draw per example"),
    "memory": Stage("memory", 25, "peaks"),
    "profile": Stage("breakdown", 15, "kernel by kernel"),
}


@contextlib.contextmanager
def _flags(benchmark: bool, dry: bool) -> Iterator[None]:
    """cuDNN tries its algorithms, float32 is left to TF32; the former settings come back.

    A dry run has one thread: its tensors are tiny, and threads that wait disturb others.
    """
    matmul, threads = torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()
    if dry:
        torch.set_num_threads(1)
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=True
    ):
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul
            torch.set_num_threads(threads)


def work(
    path: Path, name: str, device: str, seconds: float, quick: bool, banned: Collection[str]
) -> int:
    """Runs what is not recorded yet of a stage. Returns the exit status of its process."""
    record = Record(path)
    deadline = time.monotonic() + seconds
    section = record.stage(name)
    try:
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        bench = Bench(Clock(where), quick, deadline, record, name, banned)
        module = importlib.import_module(f".{STAGES[name].module}", __package__)
        with _flags(name not in ("correctness", "memory"), bench.dry):
            run_items(bench, module.items(bench))
    except DeviceLost as error:
        section["lost"] = str(error)[:500]
        record.save()
        return BROKEN
    except Exception as error:  # the stage cannot begin: the next one may
        section.update(status="failed", reason=f"{type(error).__name__}: {error}"[:500])
        section["traceback"] = traceback.format_exc()[-4000:]
        record.save()
    return 0
