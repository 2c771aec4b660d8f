"""One stage, in its own process: a list of items, each recorded as soon as it is done."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .clock import Clock
from .record import DONE, DeviceLost, Record

BROKEN = 3  # exit status of a worker whose device no longer answers


class NotAvailable(Exception):
    """Something optional is not installed or not written yet; says what."""


class NotMeasured(Exception):
    """An item is left out on purpose; says why."""


@dataclass
class Bench:
    """What the items of a stage get.

    Attributes:
        clock: of the device.
        quick: fewer shapes and repeats.
        deadline: ``time.monotonic()`` after which no item begins.
        record: the file.
        stage: the stage's name.
        banned: parts that broke or hung a process before this one.
    """

    clock: Clock
    quick: bool
    deadline: float
    record: Record
    stage: str
    banned: Collection[str] = ()
    item: str = ""
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where things are measured."""
        return self.clock.device

    @property
    def dry(self) -> bool:
        """A dry run on a CPU: tiny shapes, and times that mean nothing."""
        return not self.clock.cuda

    @property
    def good(self) -> str:
        """The status of what came to its end: a dry run calls nothing "ok"."""
        return "dry run" if self.dry else "ok"

    def instead(self, text: str) -> dict[str, str]:
        """What a dry run did in place of what the item is called; nothing on a GPU."""
        return {"instead": text} if self.dry else {}

    def left(self) -> float:
        """Seconds until the stage's deadline."""
        return self.deadline - time.monotonic()

    @contextlib.contextmanager
    def part(self, name: str, limit: float = 30.0) -> Iterator[None]:
        """One variant of an item: if it breaks the process, only it is left out the next time."""
        if name in self.banned:
            raise NotAvailable(f"{name} broke or hung the process before")
        with self.record.running(self.stage, self.item, limit, name):
            try:
                yield
            except Exception as error:
                if not self.clock.alive():
                    raise DeviceLost(f"{name}: {error}") from error
                raise

    def need_ours(self) -> None:
        """Raises where our kernels for this device are not there."""
        from fastbconv import build_info

        if self.record.items("build").get("build", {}).get("status") == "failed":
            raise NotAvailable("the native library could not be built")  # not once more for each
        if "ours" not in self.kept:
            info = build_info()
            there = info["built"] != "reference" and (self.dry or info["cuda"])
            self.kept["ours"] = None if there else f"no kernels: {info['cuda_reason']}"
        if self.kept["ours"] is not None:
            raise NotAvailable(self.kept["ours"])


@dataclass(frozen=True)
class Item:
    """Something to measure.

    Attributes:
        name: in the file.
        call: returns what is recorded.
        limit: seconds after which it counts as hung.
        least: seconds that must be left for it to begin.
    """

    name: str
    call: Callable[[Bench], dict[str, Any]]
    limit: float = 45.0
    least: float = 0.5


def outcome(bench: Bench, call: Callable[[], Any]) -> dict[str, Any]:
    """Runs ``call`` and puts what happened into words; a lost device is passed on."""
    try:
        return _all_told({"status": bench.good, **(call() or {})})
    except NotAvailable as reason:
        return {"status": "not available", "reason": str(reason)}
    except NotMeasured as reason:
        return {"status": "not measured", "reason": str(reason)}
    except DeviceLost:
        raise
    except Exception as error:
        if not bench.clock.alive():
            raise DeviceLost(str(error)) from error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return {"status": "not measured", "reason": f"out of memory: {error}"[:300]}
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"status": "failed", "reason": reason, "traceback": traceback.format_exc()[-4000:]}


def _all_told(found: dict[str, Any]) -> dict[str, Any]:
    """An item of variants of which not one was measured has their status and reason."""
    rows = list(found.get("variants", {}).values())
    if rows and found["status"] in DONE and not any(row["status"] in DONE for row in rows):
        statuses = {row["status"] for row in rows}
        worst = next(s for s in ("failed", "not measured", "not available") if s in statuses)
        reason = next(row.get("reason") for row in rows if row["status"] == worst)
        found.update(status=worst, reason=f"no variant: {reason}")
    return found


def run_items(bench: Bench, items: Sequence[Item]) -> None:
    """Runs what is not recorded yet. What does not fit is recorded too, as not measured."""
    section = bench.record.stage(bench.stage)
    for item in items:
        if item.name in section["items"]:
            continue
        bench.item = item.name
        if bench.left() < item.least:
            reason = f"{max(bench.left(), 0.0):.0f} s left in the stage, {item.least:.1f} needed"
            section["items"][item.name] = {"status": "not measured", "reason": reason}
            bench.record.save()
            continue
        begin = time.monotonic()
        with bench.record.running(bench.stage, item.name, item.limit):
            result = outcome(bench, lambda item=item: item.call(bench))
            if not bench.clock.alive():
                raise DeviceLost(item.name)
        result["took"] = round(time.monotonic() - begin, 3)
        section["items"][item.name] = result
        bench.record.save()
    statuses = [item["status"] for item in section["items"].values()]
    section["status"] = "failed" if "failed" in statuses else bench.good
    bench.record.save()
