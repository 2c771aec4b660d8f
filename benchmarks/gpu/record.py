"""The JSON file of a run. One process writes at a time: the worker of a stage, else its parent."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
# Of an item, of a variant of it, of a stage. "dry run": a CPU ran the code on tiny tensors, which
# proves and measures nothing. What is not done says why in "reason" or "traceback".
STATUS = ("ok", "dry run", "failed", "not available", "not measured")
DONE = STATUS[:2]


class DeviceLost(Exception):
    """The device answers no more: this process cannot go on."""


class Record:
    """A run's file: ``stages`` -> name -> ``items`` -> name -> figures and ``status``."""

    def __init__(self, path: Path, commit: dict[str, Any] | None = None) -> None:
        self.path = path
        self.commit = commit
        self.data: dict[str, Any] = {"format": FORMAT, "stages": {}, "goals": []}
        if path.exists():
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        """Writes by rename: the file is the old one or whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(_finite(self.data), indent=1, allow_nan=False) + "\n")
        os.replace(scratch, self.path)

    def stage(self, name: str) -> dict[str, Any]:
        """The section of a stage, made where there is none."""
        return self.data["stages"].setdefault(name, {"status": "not measured", "items": {}})

    def items(self, stage: str) -> dict[str, Any]:
        """The items of a stage that may not have run."""
        return self.data["stages"].get(stage, {}).get("items", {})

    def begin(self, name: str) -> dict[str, Any]:
        """A fresh section, with the commit that it is measured at."""
        section = {"status": "not measured", "items": {}, **(self.commit or commit_of_checkout())}
        section["started"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.data["stages"][name] = section
        return section

    @contextlib.contextmanager
    def running(
        self, stage: str, item: str, limit: float, part: str | None = None
    ) -> Iterator[None]:
        """Leaves a note of what runs, for the parent to read should this process hang or die."""
        section = self.stage(stage)
        before = section.get("running")
        section["running"] = {"item": item, "part": part, "since": time.time(), "limit": limit}
        self.save()
        try:
            yield
        except DeviceLost:
            raise  # the process ends, and the note says at what
        except BaseException:
            self._resume(section, before)
            raise
        self._resume(section, before)

    def _resume(self, section: dict[str, Any], note: dict[str, Any] | None) -> None:
        section.pop("running")
        if note is not None:
            section["running"] = {**note, "since": time.time()}
        self.save()


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become text."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@functools.lru_cache
def commit_of_checkout() -> dict[str, Any]:
    """Commit of the checkout, and whether files that count differ from it."""
    answers = []
    for arguments in (
        ("rev-parse", "--short=12", "HEAD"),
        ("status", "--porcelain", "--", "csrc", "fastbconv", "benchmarks/gpu"),
    ):
        try:
            run = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return {"commit": None, "dirty": None}
        answers.append(run.stdout.strip())
    return {"commit": answers[0], "dirty": bool(answers[1])}
