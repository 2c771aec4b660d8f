"""The goals G1 to G16 and their judgement: met, missed or not measured. All are for an H200."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .models import best_of_ours
from .record import Record

AT_MOST, AT_LEAST = "<=", ">="
H200_COPY = 4.3e12
Value = float | None
Find = Callable[[Record], Value]


@dataclass(frozen=True)
class Part:
    """One number of a goal.

    Attributes:
        text: what it is.
        bound: "<=" or ">=".
        goal: the threshold.
        find: gets it from the record, None where it was not measured.
    """

    text: str
    bound: str
    goal: float
    find: Find

    def judge(self, value: Value) -> str:
        """met, missed or not measured."""
        if value is None:
            return "not measured"
        good = value <= self.goal if self.bound == AT_MOST else value >= self.goal
        return "met" if good else "missed"


@dataclass(frozen=True)
class Goal:
    """A goal: all its parts must be met."""

    name: str
    text: str
    parts: tuple[Part, ...]


def variants(record: Record, stage: str, item: str) -> dict[str, Any]:
    """Rows of an item that were measured."""
    rows = record.items(stage).get(item, {}).get("variants", {})
    return {name: row for name, row in rows.items() if row.get("status") == "ok"}


def _ratio_to_det(cell: str) -> Find:
    def find(record: Record) -> Value:
        rows = variants(record, "models", cell)
        mine = best_of_ours(rows)
        return rows[mine]["ratio"]["median"] if mine and "ratio" in rows[mine] else None

    return find


def _times_ours(cell: str, name: str, stage: str = "models") -> Find:
    return lambda record: variants(record, stage, cell).get(name, {}).get("times ours")


def _rate(item: str) -> Find:
    """Bytes per second of a kernel; of another card, scaled to an H200's copy."""

    def find(record: Record) -> Value:
        rate = record.items("kernels").get(item, {}).get("bytes_per_second")
        device = record.items("facts").get("machine", {}).get("device", "")
        copy = record.items("facts").get("copy", {}).get("bytes_per_second")
        if rate is None or "H200" in device or not copy:
            return rate
        return rate / copy * H200_COPY

    return find


def _direct_speed(*layers: str) -> Find:
    """The least speed-up of the one-pass kernel over the library's path among some layers."""

    def find(record: Record) -> Value:
        items = record.items("kernels")
        found = [items.get(f"conv {layer}", {}).get("direct speed") for layer in layers]
        return None if None in found else min(found)

    return find


def _direct_network(cell: str) -> Find:
    def find(record: Record) -> Value:
        rows = variants(record, "models", cell)
        mine = best_of_ours(rows)
        if mine is None or "fb-direct" not in rows:
            return None
        return rows[mine]["seconds"]["median"] / rows["fb-direct"]["seconds"]["median"]

    return find


def _item(stage: str, item: str, field: str) -> Find:
    return lambda record: record.items(stage).get(item, {}).get(field)


def _noise_memory(record: Record) -> Value:
    """Materialised over ours: bytes above the deterministic step, over a ResNet-18's layers."""
    total = {"per example": 0.0, "materialised": 0.0}
    layers = [name for name in record.items("memory") if name.startswith("per example")]
    for layer in layers:
        rows = variants(record, "memory", layer)
        for name in total:
            if "above det" not in rows.get(name, {}):
                return None
            count = record.items("memory")[layer]["layers"]
            total[name] += count * max(rows[name]["above det"], 0)
    if not layers:
        return None
    return total["materialised"] / max(total["per example"], 16.0 * len(layers))


def _same_noise(record: Record) -> Value:
    item = record.items("correctness").get("eps equals the CPU's", {})
    if item.get("status") == "failed":
        return 0.0
    values = float(item.get("values", 0))  # --quick compares fewer: that decides nothing
    return values if item.get("status") == "ok" and values >= 1e8 else None


def _network(title: str, cell: str, forward: float, step: float) -> tuple[Part, ...]:
    parts = zip(("forward", "step"), (forward, step), strict=True)
    return tuple(
        Part(f"{title}{direction}", AT_MOST, goal, _ratio_to_det(f"{cell} {direction}"))
        for direction, goal in parts
    )


def _slower(text: str, goal: float, cell: str, name: str) -> Part:
    return Part(text, AT_LEAST, goal, _times_ours(cell, name))


R18 = "resnet18 128"
GOALS = (
    Goal("G1", "R18 b128 graph, x det", _network("", f"{R18} graph", 1.10, 1.08)),
    Goal(
        "G2", "R18 b512, R50 b256 graph, x det",
        _network("R18 ", "resnet18 512 graph", 1.03, 1.03)
        + _network("R50 ", "resnet50 256 graph", 1.03, 1.03),
    ),
    Goal("G3", "R50 b64 graph, x det", _network("", "resnet50 64 graph", 1.06, 1.05)),
    Goal("G4", "R18 b128 eager, x det", _network("", f"{R18} eager", 1.15, 1.15)),
    Goal(
        "G5", "faster than unfused, R18 b128",
        (
            _slower("eager forward", 4.0, f"{R18} eager forward", "unfused"),
            _slower("eager step", 3.0, f"{R18} eager step", "unfused"),
            _slower("graph forward", 2.0, f"{R18} graph forward", "unfused"),
            _slower("graph step", 1.8, f"{R18} graph step", "unfused"),
        ),
    ),
    Goal(
        "G6", "faster than bayesian-torch, R18 b128",
        (
            _slower("eager forward", 8.0, f"{R18} eager forward", "bayesian-torch"),
            _slower("eager step", 6.0, f"{R18} eager step", "bayesian-torch"),
            _slower("graph forward", 4.0, f"{R18} graph forward", "bayesian-torch"),
        ),
    ),
    Goal(
        "G7", "faster than compiled unfused, R18 b128 graph",
        (_slower("step", 1.2, "compiled", "compiled"),),
    ),
    Goal(
        "G8", "LeNet b256 eager forward",
        (
            _slower("faster than unfused", 8.0, "lenet 256 eager forward", "unfused"),
            Part("x det", AT_MOST, 1.2, _ratio_to_det("lenet 256 eager forward")),
        ),
    ),
    Goal("G9", "sampling, 11 M, B/s", (Part("", AT_LEAST, 3.2e12, _rate("sample 11M")),)),
    Goal("G10", "gradients, 11 M, B/s", (Part("", AT_LEAST, 3.6e12, _rate("backward 11M")),)),
    Goal(
        "G11", "one pass over library path, M >= 32 k, C, K >= 128",
        (Part("speed", AT_LEAST, 0.6, _direct_speed("R18 128 128>128 @16")),),
    ),
    Goal(
        "G12", "one pass over library path, M <= 1 k and LeNet",
        (
            Part("512>512 @4 b8", AT_LEAST, 1.3, _direct_speed("R18 8 512>512 @4")),
            Part("LeNet graph", AT_LEAST, 1.3, _direct_network("lenet 256 graph forward")),
        ),
    ),
    Goal(
        "G13", "32 draws, batch 8, R18 graph: faster than passes",
        (
            Part("unfused", AT_LEAST, 10.0, _times_ours("32 draws", "unfused", "samples")),
            Part("det", AT_LEAST, 2.5, _times_ours("32 draws", "det", "samples")),
        ),
    ),
    Goal(
        "G14", "a draw per example, x shared weight",
        tuple(
            Part(name, AT_MOST, goal, _item("samples", f"per example {name}", "ratio"))
            for name, goal in (("64>64 @32", 1.6), ("128>128 @16", 3.0), ("256>256 @8", 12.0))
        ),
    ),
    Goal("G15", "less memory than materialised", (Part("", AT_LEAST, 20.0, _noise_memory),)),
    Goal("G16", "eps equals the CPU's, values", (Part("", AT_LEAST, 1e8, _same_noise),)),
)  # fmt: skip


def judge(record: Record) -> list[dict[str, Any]]:
    """Every goal with its parts; "missed" if one part is, "not measured" if one was not.

    A dry run measures nothing that counts.
    """
    found = []
    dry = record.data.get("dry run", False)
    for goal in GOALS:
        parts = []
        for part in goal.parts:
            value = None if dry else part.find(record)
            row = {"text": part.text, "bound": part.bound, "goal": part.goal, "measured": value}
            parts.append({**row, "status": part.judge(value)})
        statuses = {part["status"] for part in parts}
        status = next(s for s in ("missed", "not measured", "met") if s in statuses)
        found.append({"name": goal.name, "text": goal.text, "status": status, "parts": parts})
    return found
