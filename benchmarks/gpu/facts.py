"""Stage 1: what the machine is, and its ceilings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from . import clock as clocks
from .expected import PREDICTED, compare
from .stage import Bench, Item, NotAvailable

SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu",
    "power.draw", "utilization.gpu", "memory.used",
)  # fmt: skip


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; raises where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise NotAvailable("nvidia-smi is not on PATH")
    query = [program, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if run.returncode != 0:
        raise NotAvailable(f"nvidia-smi: {(run.stderr or run.stdout).strip()[:200]}")
    values = [value.strip() for value in run.stdout.splitlines()[0].split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def machine(bench: Bench) -> dict[str, Any]:
    """Names and versions."""
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "torch cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
    }
    if bench.dry:
        return {"device": "cpu", **facts}
    properties = torch.cuda.get_device_properties(bench.device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory bytes": properties.total_memory,
        "l2 bytes": getattr(properties, "L2_cache_size", None),
        "driver's cuda": torch._C._cuda_getDriverVersion(),
        **facts,
    }


def _first_line(command: list[str], word: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return next((line for line in run.stdout.splitlines() if word in line), None)


def copy_ceiling(bench: Bench) -> dict[str, Any]:
    """A device-to-device copy; bytes read and written are counted."""
    size = 1 << 20
    if not bench.dry:
        free, _ = torch.cuda.mem_get_info(bench.device)
        size = min(4 << 30, free // 4) // 4
    source = torch.empty(size, device=bench.device).normal_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    for _ in range(3):
        target.copy_(source)
    times = clocks.quartiles(bench.clock.each(lambda: target.copy_(source), 5 if bench.dry else 20))
    rate = moved / times["median"]
    found = {"bytes": moved, "seconds": times, "bytes_per_second": rate}
    found |= bench.instead("a CPU copied 4 MiB")
    return found if bench.dry else found | compare(PREDICTED["facts/copy"], rate)


def matmul_ceiling(bench: Bench) -> dict[str, Any]:
    """A square bf16 matrix product of random numbers: zeros would run faster than real data."""
    size = 64 if bench.dry else 8192
    left, right = (
        torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    for _ in range(3):
        torch.mm(left, right, out=out)
    count = 5 if bench.dry else 30
    times = clocks.quartiles(bench.clock.each(lambda: torch.mm(left, right, out=out), count))
    rate = 2 * size**3 / times["median"]
    found = {"size": size, "seconds": times, "flop_per_second": rate}
    found |= bench.instead("a product of 64 x 64 on a CPU")
    return found if bench.dry else found | compare(PREDICTED["facts/matmul"], rate)


def launch_gap(bench: Bench) -> dict[str, Any]:
    """What one more tiny kernel costs: in a CUDA graph, and launched by PyTorch."""
    tiny = torch.zeros(32, device=bench.device)
    count = 10 if bench.dry else 200

    def many() -> None:
        for _ in range(count):
            tiny.add_(1.0)

    replay = bench.clock.capture(many)
    found = {
        name: clocks.quartiles([t / count for t in bench.clock.each(call, 10)])
        for name, call in (("graph_seconds", replay), ("eager_seconds", many))
    }
    return found | bench.instead("calls of a CPU: no launch, no graph")


def items(bench: Bench) -> list[Item]:
    """Stage 1."""
    return [
        Item("machine", machine),
        Item("clocks before", lambda _: smi()),
        Item("copy", copy_ceiling),
        Item("matmul", matmul_ceiling),
        Item("launch", launch_gap),
        Item("clocks after", lambda _: smi()),
    ]


def ceilings(bench: Bench) -> dict[str, float | None]:
    """Bytes and flop per second as stage 1 measured them; None where it did not."""
    found = bench.record.items("facts")
    return {
        "bytes": found.get("copy", {}).get("bytes_per_second"),
        "flop": found.get("matmul", {}).get("flop_per_second"),
    }
