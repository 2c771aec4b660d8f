"""The last stage: what was measured, in at most forty lines, goals last."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from .goals import variants
from .record import DONE, Record

LINES, WIDTH = 40, 150
CELLS = (
    ("resnet18 128", ("graph forward", "graph step", "eager forward", "eager step")),
    ("resnet50 64", ("graph forward", "graph step")),
    ("lenet 256", ("eager forward",)),
)
SHORT = {"fb-grouped": "grouped", "bayesian-torch": "b-torch", "fb-direct": "direct"}


def _head(record: Record) -> Iterator[str]:
    facts = record.items("facts")
    machine = facts.get("machine", {})
    copy, matmul = facts.get("copy", {}), facts.get("matmul", {})
    rates = []
    if copy.get("status") == "ok":
        rates.append(f"copy {number(copy['bytes_per_second'] / 1e12)} TB/s")
    if matmul.get("status") == "ok":
        rates.append(f"bf16 matmul {number(matmul['flop_per_second'] / 1e12)} TFLOP/s")
    commits = {
        f"{stage.get('commit')}{'+' if stage.get('dirty') else ''}"
        for stage in record.data["stages"].values()
    }
    yield ", ".join([f"{machine.get('device', 'device unknown')}", *rates])
    yield f"torch {machine.get('torch')}, cuDNN {machine.get('cudnn')}, commit {' '.join(commits)}"
    if record.data.get("dry run"):
        yield "DRY RUN on a CPU: tiny tensors; nothing was measured or checked, no goal is judged."


def _stages(record: Record) -> list[str]:
    dry, words = record.data.get("dry run"), []
    for name, stage in record.data["stages"].items():
        statuses = [item["status"] for item in stage["items"].values()]
        good = sum(status in DONE for status in statuses)
        took = "" if dry else f" {stage.get('took', 0):.0f} s"
        words.append(f"{name} {good}/{len(statuses)}{took}")
    title = "items that a CPU ran: " if dry else "ok items: "
    return textwrap.wrap(title + ", ".join(words), WIDTH, subsequent_indent="  ")


def _left_out(record: Record) -> Iterator[str]:
    """What was not done, by stage and reason."""
    for name, stage in record.data["stages"].items():
        found: dict[str, list[str]] = {}
        for item, row in stage["items"].items():
            if row["status"] in ("not available", "not measured"):
                found.setdefault(f"{row['status']}: {row.get('reason')}", []).append(item)
        for why, items in found.items():
            more = f" and {len(items) - 3} more" if len(items) > 3 else ""
            yield f"  {name}: {', '.join(items[:3])}{more}: {why}".splitlines()[0]


def _failures(record: Record) -> Iterator[str]:
    """What failed, inside items too."""
    for name, stage in record.data["stages"].items():
        for broken in stage.get("broken", ()):
            yield f"  BROKE {name}: {broken['part']} in {broken['item']}: {broken['reason']}"
        if stage["status"] == "failed" and "reason" in stage:
            yield f"  FAILED {name}: {stage['reason']}"
        for item, found in stage["items"].items():
            if found["status"] == "failed":
                yield f"  FAILED {name}/{item}: {found.get('reason')}"
            for variant, row in found.get("variants", {}).items():
                if row.get("status") == "failed":
                    yield f"  FAILED {name}/{item}/{variant}: {row.get('reason')}"


def _kernels(record: Record) -> Iterator[str]:
    words = []
    for name in ("sample 11M", "sample list resnet18", "backward 11M", "backward list resnet18"):
        item = record.items("kernels").get(name, {})
        if item.get("status") == "ok":
            share = f", {item['of copy']:.0%} of copy" if "of copy" in item else ""
            flag = " MISS" if item.get("flag") else ""
            micro = item["seconds"]["median"] * 1e6
            words.append(f"{name} {micro:.0f} us{share}{flag}")
    if words:
        yield "kernels: " + "; ".join(words)


def _cells(record: Record) -> Iterator[str]:
    """Milliseconds of det, and ratios to it."""
    for network, modes in CELLS:
        for mode in modes:
            rows = variants(record, "models", f"{network} {mode}")
            if "det" not in rows:
                continue
            words = []
            for name, row in rows.items():
                equal = "=" if row["verdict"] == "equal" and name != "det" else ""
                if name != "det":
                    words.append(f"{SHORT.get(name, name)} {row['ratio']['median']:.2f}{equal}")
            milli = rows["det"]["seconds"]["median"] * 1e3
            yield f"{network} {mode}: det {milli:.3f} ms; x det: {', '.join(words)}"


def number(value: float | None) -> str:
    """Short."""
    if value is None:
        return "?"
    return f"{value:.2e}" if abs(value) >= 1e4 else f"{value:.3g}"


def _goal(goal: dict[str, Any]) -> str:
    parts = []
    for part in goal["parts"]:
        text = f"{part['text']} " if part["text"] else ""
        parts.append(f"{text}{number(part['measured'])} {part['bound']}{number(part['goal'])}")
    return f"{goal['name']:3} {goal['status']:12} {goal['text']}: {', '.join(parts)}"


def table(record: Record) -> str:
    """At most forty lines; what was left out is cut short first, then failures, goals never."""
    goals = [_goal(goal) for goal in record.data["goals"]]
    body = [*_head(record), *_stages(record), *_kernels(record), *_cells(record)]
    failures = list(_failures(record))
    room = LINES - len(body) - len(goals) - 1
    if len(failures) > room:
        hidden = len(failures) - room
        failures = [*failures[:room], f"  and {hidden} more failures in the file"]
    missing = list(_left_out(record))
    room -= len(failures)
    if len(missing) > room:
        hidden = len(missing) - max(room - 1, 0)
        missing = [*missing[: max(room - 1, 0)], f"  and {hidden} more not done, in the file"]
        missing = missing[: max(room, 0)]
    lines = [*body, *failures, *missing, *goals]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)
