"""The parent of a stage's process: it ends what hangs, and goes on after what broke.

A kernel that waits for a flag for ever, or writes where it must not, takes its process with it. So
every stage is a process; it leaves a note of what it runs in the file. When it dies or the note is
too old, the item is recorded as failed (or its part is left out: one variant of several), and a new
process does the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .record import Record

OVER = "the stage's time was over"
GRACE = 10.0  # seconds after the deadline in which the running item may end
RESTARTS = 4
Command = Callable[[float, Sequence[str]], list[str]]


def supervise(path: Path, stage: str, budget: float, command: Command, poll: float = 0.2) -> None:
    """Runs a stage to its end or to the end of its budget.

    Args:
        path: the file, which the worker writes.
        stage: the section; must exist in the file.
        budget: seconds.
        command: (seconds left, banned parts) -> the worker's command line.
        poll: seconds between two looks.
    """
    began = time.monotonic()
    banned: list[str] = []
    for _ in range(RESTARTS + 1):
        left = budget - (time.monotonic() - began)
        why, tail = _run_once(path, stage, command(left, banned), left, poll)
        if why is None:
            break
        stop = _blame(path, stage, why, tail, banned)
        if stop or left <= 0:
            break
    _finish(path, stage, time.monotonic() - began, banned)


def _run_once(
    path: Path, stage: str, command: Sequence[str], left: float, poll: float
) -> tuple[str | None, str]:
    """One process. Returns why it did not end well, and the end of what it printed."""
    log = path.with_name(f".{path.name}.{stage}.log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + max(left, 0.0) + GRACE
    why = None
    try:
        while process.poll() is None and why is None:
            time.sleep(poll)
            why = _overdue(path, stage, deadline)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if why is None and process.returncode != 0:
        why = f"its process ended with status {process.returncode}"
    tail = log.read_text(errors="replace")[-3000:]
    log.unlink()
    return why, tail


def _overdue(path: Path, stage: str, deadline: float) -> str | None:
    if time.monotonic() > deadline:
        return OVER
    note = Record(path).data["stages"].get(stage, {}).get("running")
    if note is not None and time.time() - note["since"] > note["limit"]:
        return f"it did not end within {note['limit']:.0f} s"
    return None


def _blame(path: Path, stage: str, why: str, tail: str, banned: list[str]) -> bool:
    """Records what broke; returns whether the stage has to stop."""
    record = Record(path)
    section = record.stage(stage)
    note = section.pop("running", None)
    entry: dict[str, Any] = {"status": "failed", "reason": why, "output": tail}
    if note is None:
        section.update(entry)
        record.save()
        return True
    if why == OVER:
        section["items"][note["item"]] = {"status": "not measured", "reason": why}
    elif note["part"] is not None and note["part"] not in banned:
        banned.append(note["part"])
        section.setdefault("broken", []).append({**note, **entry})
    else:
        section["items"][note["item"]] = entry
    record.save()
    return False


def _finish(path: Path, stage: str, seconds: float, banned: Sequence[str]) -> None:
    record = Record(path)
    section = record.stage(stage)
    section.pop("running", None)
    section["took"] = round(seconds, 1)
    statuses = [item["status"] for item in section["items"].values()]
    if "failed" in statuses or banned:
        section["status"] = "failed"
    record.save()
