"""The last stage: what was measured, in at most forty lines, goals last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .goals import variants
from .record import Record

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
    rates = [f"copy {copy['bytes_per_second'] / 1e12:.2f} TB/s"] if "seconds" in copy else []
    if "seconds" in matmul:
        rates.append(f"bf16 matmul {matmul['flop_per_second'] / 1e12:.0f} TFLOP/s")
    commits = {
        f"{stage.get('commit')}{'+' if stage.get('dirty') else ''}"
        for stage in record.data["stages"].values()
    }
    yield ", ".join([f"{machine.get('device', 'device unknown')}", *rates])
    yield f"torch {machine.get('torch')}, cuDNN {machine.get('cudnn')}, commit {' '.join(commits)}"
    if record.data.get("dry run"):
        yield "DRY RUN on a CPU: no time below means anything, and no goal is judged."


def _stages(record: Record) -> str:
    words = []
    for name, stage in record.data["stages"].items():
        statuses = [item["status"] for item in stage["items"].values()]
        good = statuses.count("ok")
        words.append(f"{name} {good}/{len(statuses)} {stage.get('took', 0):.0f} s")
    return "ok items: " + ", ".join(words)


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
    """At most forty lines; failures are cut short first, goals never."""
    goals = [_goal(goal) for goal in record.data["goals"]]
    body = [*_head(record), _stages(record), *_kernels(record), *_cells(record)]
    failures = list(_failures(record))
    room = LINES - len(body) - len(goals) - 1
    if len(failures) > room:
        hidden = len(failures) - room
        failures = [*failures[:room], f"  and {hidden} more failures in the file"]
    lines = [*body, *failures, *goals]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)
