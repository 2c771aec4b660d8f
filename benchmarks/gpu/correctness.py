"""Stage 3: native programs, checks of our own, the GPU's tests, and compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import checks, process, programs
from .record import ROOT
from .stage import Bench, Item, NotAvailable, NotMeasured

TESTS = ROOT / "tests" / "cuda"
SANITIZER = 25.0  # seconds kept for each tool
TOOLKIT = "/usr/local/cuda/bin"


def run_pytest(target: Path, limit: float) -> dict[str, Any]:
    """Counts and failures of a folder of tests; a run that is cut short counts what it finished."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = process.python("-m", "pytest", str(target), "-q", "--maxfail=30")
        command.append(f"--ignore={TESTS / 'test_native_programs.py'}")  # run before, one by one
        ended = process.run([*command, "-p", "no:cacheprovider", f"--junitxml={report}"], limit)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {ended.text[-3000:]}")
        counts = junit_counts(report)
    lines = ended.text.strip().splitlines() or [""]
    if ended.status is None:
        return {**counts, "status": "failed", "reason": f"cut short after {limit:.0f} s"}
    if counts["failed"] or ended.status != 0:
        return {**counts, "status": "failed", "reason": lines[-1][:300]}
    return counts


def junit_counts(report: Path) -> dict[str, Any]:
    """What a JUnit file says: counts, names and messages of failures, the slowest tests."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    times = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        times[name] = float(case.get("time") or 0.0)
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            found["failed"] += 1
            message = (bad[0].get("message") or bad[0].text or "").strip()
            found["failures"].append({"test": name, "message": message[:500]})
        elif any(child.tag == "skipped" for child in case):
            found["skipped"] += 1
        else:
            found["passed"] += 1
    found["failures"] = found["failures"][:30]
    slowest = sorted(times.items(), key=lambda pair: -pair[1])[:5]
    return {**found, "slowest": dict(slowest)}


def tests(bench: Bench) -> dict[str, Any]:
    """tests/cuda, in a process of its own."""
    if not TESTS.is_dir():
        raise NotAvailable("there is no tests/cuda")
    if bench.dry:
        raise NotMeasured("dry run: they need a GPU")
    bench.need_ours()
    return run_pytest(TESTS, max(5.0, min(60.0, bench.left() - 2 * SANITIZER)))


def sanitizer(bench: Bench, tool: str) -> dict[str, Any]:
    """compute-sanitizer on the tiny program. Dry runs run the program alone."""
    bench.need_ours()
    if bench.dry and tool != "memcheck":
        raise NotMeasured("dry run: the program ran once")
    target = str(Path(__file__).with_name("sanitize_target.py"))
    program = process.python(target, "--device", bench.device.type)
    command = program
    if not bench.dry:
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
        if found is None:
            raise NotAvailable("compute-sanitizer is not installed")
        command = [found, "--tool", tool, "--error-exitcode", "9", *program]
    limit = max(5.0, min(45.0, bench.left()))
    ended = process.run(command, limit)
    if ended.status is None:
        raise NotMeasured(f"{tool} did not end within {limit:.0f} s: {ended.text[-300:]}")
    text = ended.text
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    if re.search(r"not supported|Failed to initialize|Unable to", text) and "done" not in text:
        raise NotAvailable(f"compute-sanitizer: {text.strip()[-500:]}")
    if ended.status != 0 or "done" not in text:
        raise RuntimeError(f"{tool}: status {ended.status}: {text[:1500]} ... {text[-1500:]}")
    alone = bench.instead("the program ran alone, on the CPU and unwatched")
    return {"summary": summary, "watched": not bench.dry, **alone}


def items(bench: Bench) -> list[Item]:
    """Stage 3; what may break the device comes last."""
    listed = [
        Item(f"native {name}", partial(programs.run_one, name=name), programs.RUN_LIMIT + 15.0)
        for name in programs.names()
    ]
    listed.append(Item("eps equals the CPU's", checks.noise_bits))
    for algorithm, dtype in (
        ("auto", torch.float32), ("auto", torch.bfloat16), ("auto", torch.float16),
        ("direct", torch.bfloat16), ("direct", torch.float16),
    ):  # fmt: skip
        name = f"float64 {algorithm} {str(dtype).removeprefix('torch.')}"
        call = partial(checks.against_float64, algorithm=algorithm, dtype=dtype)
        listed.append(Item(name, call))
    for algorithm in ("auto", "direct"):
        same = partial(checks.twice_the_same, algorithm=algorithm)
        graph = partial(checks.replay, algorithm=algorithm)
        listed += [Item(f"two runs {algorithm}", same), Item(f"graph {algorithm}", graph)]
    listed.append(Item("stress of direct", checks.stress))
    listed.append(Item("pytest", tests, limit=80.0, least=1.0))
    for tool in ("memcheck", "racecheck"):
        call = partial(sanitizer, tool=tool)
        listed.append(Item(tool, call, limit=60.0, least=5.0 if not bench.dry else 0.5))
    return listed
