"""The machine: what it is, how fast it can be, and whether it was quiet."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastbconv as fb

BUSY = 0.05  # share of all cores that others may use before figures are called doubtful
PREEMPTED = 0.1  # share of calls that lost their core to somebody else


def environment(threads: int) -> dict[str, Any]:
    """What ran where; no names of folders or users, so that it can be published."""
    info = fb.build_info()
    return {
        "fastbconv": fb.__version__,
        "source hash": info["source_hash"],
        "commit": _commit(),
        "native library": info["built"],
        "instruction set": info["isa"],
        "compiler": info["compiler"],
        "torch": str(torch.__version__),
        "torch instruction set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "c library": " ".join(platform.libc_ver()) or "unknown",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "last-level cache": _last_level_cache(),
        "huge pages": _huge_pages(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _commit() -> str | None:
    """The commit of a checkout, marked where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", "csrc", "fastbconv"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0] + (" with changes" if answers[1] else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_level_cache() -> str | None:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [path.read_text().strip() for path in sizes]
    return max(found, key=_bytes) if found else None


def _bytes(size: str) -> int:
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 1)
    return int(size.rstrip("KMG")) * unit


def cache_bytes(default: int = 64 * 2**20) -> int:
    """Size of the last-level cache, or a guess."""
    size = _last_level_cache()
    return _bytes(size) if size else default


def _huge_pages() -> str | None:
    """The word in brackets: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0]


@dataclass(frozen=True)
class CpuTime:
    """Seconds of all cores since the machine started, and load averages."""

    busy: float
    idle: float
    stolen: float
    load: tuple[float, float, float] | None


def cpu_time() -> CpuTime:
    """Reads the system's counters; zeros where there are none."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return CpuTime(0.0, 0.0, 0.0, load)
    # user nice system idle iowait irq softirq steal
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in line.split()[1:9]]
    idle, stolen = ticks[3] + ticks[4], ticks[7]
    return CpuTime(sum(ticks) - idle - stolen, idle, stolen, load)


def share(part: str, before: CpuTime, after: CpuTime) -> float:
    """Share of "busy", "idle" or "stolen" in the time of all cores between two readings."""
    spent = {
        name: getattr(after, name) - getattr(before, name) for name in ("busy", "idle", "stolen")
    }
    total = sum(spent.values())
    return spent[part] / total if total > 0.0 else 0.0


def others(seconds: float = 0.5) -> float:
    """Share of all cores that is in use while this process sleeps."""
    before = cpu_time()
    time.sleep(seconds)
    after = cpu_time()
    return share("busy", before, after) + share("stolen", before, after)


def complaints(busy: tuple[float, float], stolen: float, preempted: float) -> list[str]:
    """Why figures taken now are doubtful.

    Args:
        busy: share of all cores that others used before and after.
        stolen: share that the host took away meanwhile.
        preempted: share of timed calls during which a thread lost its core.
    """
    found = []
    for moment, value in zip(("before", "after"), busy, strict=True):
        if value > BUSY:
            found.append(f"others used {value:.0%} of the cores {moment} the run")
    if stolen > BUSY:
        found.append(f"the host took {stolen:.0%} of the processor away")
    if preempted > PREEMPTED:
        found.append(f"{preempted:.0%} of the timed calls were preempted")
    return found
