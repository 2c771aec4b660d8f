"""Measures fastbconv on one GPU: facts, build, correctness, kernels, networks, memory, goals.

    python benchmarks/h200.py                       # everything, at most eight minutes
    python benchmarks/h200.py --only facts,build    # some stages, into the day's file
    python benchmarks/h200.py --device cpu --quick  # dry run without a GPU: tiny, no figure counts

Every item is written to benchmarks/results/<device>-<date>.json when it is done. Each stage is a
process of its own, so that one that hangs or crashes costs nothing but itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu import goals, report, stages, supervise  # noqa: E402
from gpu.record import DONE, Record  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, help="the JSON file; by default by device and date")
    found.add_argument("--only", default="", help=f"comma list of {', '.join(stages.STAGES)}")
    found.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    found.add_argument(
        "--check",
        action="store_true",
        help="exit status 1 if a goal is missed, 3 if one could not be judged",
    )
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--budget", type=float, default=480.0, help="seconds for all stages")
    found.add_argument("--commit", help="where the checkout does not know it")
    found.add_argument("--in-process", action="store_true", help="no process per stage")
    found.add_argument("--worker", help=argparse.SUPPRESS)  # a stage: run by the parent
    found.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    found.add_argument("--banned", default="", help=argparse.SUPPRESS)
    return found


def chosen(only: str) -> list[str]:
    """The stages to run, in their order.

    Raises:
        SystemExit: a name that does not exist.
    """
    wanted = [name for name in only.split(",") if name] or list(stages.STAGES)
    for name in wanted:
        if name not in stages.STAGES:
            raise SystemExit(f"--only: expected some of {', '.join(stages.STAGES)}, got {name!r}")
    return [name for name in stages.STAGES if name in wanted]


def default_path(device: str, merge: bool) -> Path:
    """benchmarks/results/<device>-<date>.json; a further whole run of the day gets a number."""
    import torch

    name = torch.cuda.get_device_name(0) if device == "cuda" else "dry-run-cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    folder = ROOT / "benchmarks" / "results"
    path = folder / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    number = 2
    while path.exists() and not merge:
        path = path.with_name(f"{name}-{time.strftime('%Y-%m-%d')}-{number}.json")
        number += 1
    return path


def command(
    options: argparse.Namespace, name: str, path: Path, left: float, banned: Sequence[str]
) -> list[str]:
    """The command line of a stage's process."""
    words = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--out", str(path)]
    words += ["--device", options.device, "--seconds", f"{max(left, 0.0):.1f}"]
    words += ["--banned", "|".join(banned)]
    return words + ["--quick"] * options.quick


def share(name: str, names: Sequence[str]) -> float:
    """A stage's part of the time that is left: what one does not need goes to those after it."""
    rest = [stages.STAGES[later].share for later in names[names.index(name) :]]
    return rest[0] / sum(rest)


def run(options: argparse.Namespace, path: Path) -> Record:
    """All chosen stages; what the whole budget has no room for is cut, and says so."""
    began = time.monotonic()
    record = Record(path)
    if options.commit:
        record.commit = {"commit": options.commit, "dirty": None}
    record.data["dry run"] = options.device == "cpu"
    record.data["arguments"] = {"quick": options.quick, "budget": options.budget}
    names = chosen(options.only)
    for name in names:
        record.begin(name)
        record.save()
        left = options.budget - (time.monotonic() - began)
        seconds = max(left, 0.0) * share(name, names)
        print(f"{name}: {stages.STAGES[name].text} (at most {seconds:.0f} s)", flush=True)
        if options.in_process:
            begin = time.monotonic()
            stages.work(path, name, options.device, seconds, options.quick, ())
            record = Record(path, record.commit)
            record.stage(name)["took"] = round(time.monotonic() - begin, 1)
            record.save()
        else:
            supervise.supervise(path, name, seconds, partial(command, options, name, path))
        record = Record(path, record.commit)
    record.data["goals"] = goals.judge(record)
    record.data["took"] = round(time.monotonic() - began, 1)
    record.save()
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, returns the exit status."""
    options = parser().parse_args(arguments)
    if options.worker:
        banned = [name for name in options.banned.split("|") if name]
        status = stages.work(
            options.out, options.worker, options.device, options.seconds, options.quick, banned
        )
        sys.stdout.flush()
        os._exit(status)  # a device that hangs would hang the interpreter's own end
    chosen(options.only)
    why = refusal(options)
    if why is not None:
        print(why, file=sys.stderr)
        return 2
    path = (options.out or default_path(options.device, bool(options.only))).absolute()
    if path.exists() and not options.only:
        path.unlink()
    record = run(options, path)
    print(report.table(record))
    print(f"written: {path}")
    return verdict(record, options.check)


def refusal(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured or written, before anything is."""
    out = options.out.absolute() if options.out else None
    if out is not None and out.is_dir():
        return f"--out: expected a file, got the folder {out}"
    if out is not None and not out.parent.is_dir() and not out.parent.parent.is_dir():
        return f"--out: the folder {out.parent} does not exist, nor the one above it"
    if out is not None and out.exists() and options.only:
        before = json.loads(out.read_text()).get("dry run")
        if before is not None and before != (options.device == "cpu"):
            return f"--out: {out} is of the other kind: dry runs and measurements do not mix"
    lacking = no_device() if options.device == "cuda" else None
    return lacking and f"no CUDA device: {lacking}; --device cpu makes a dry run"


def no_device() -> str | None:
    """Why PyTorch has no GPU; None where it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch for CUDA {torch.version.cuda} says: {str(error).splitlines()[0]}"
    return f"PyTorch for CUDA {torch.version.cuda} sees no GPU (driver, CUDA_VISIBLE_DEVICES?)"


def verdict(record: Record, check: bool) -> int:
    """The exit status: 0, 1 (failed or missed), 3 (--check could not judge every goal)."""
    built = record.items("build").get("info", {}).get("status") in DONE
    if _failed(record, "build") and not built:
        print("the native library is missing or has no CUDA kernels: nothing of ours was measured")
        return 1
    goals_ = record.data["goals"]
    missed, open_ = (
        [goal["name"] for goal in goals_ if goal["status"] == status]
        for status in ("missed", "not measured")
    )
    wrong = _failed(record, "correctness")
    if check and (missed or wrong):
        print(f"--check: missed: {', '.join(missed) or 'none'}; correctness failed: {wrong}")
        return 1
    if check and open_:
        print(f"--check: {len(open_)} of {len(goals_)} goals not measured: {', '.join(open_)}")
        return 3
    return 0


def _failed(record: Record, name: str) -> bool:
    return record.data["stages"].get(name, {}).get("status") == "failed"


if __name__ == "__main__":
    sys.exit(main())
