"""A run as data: cells with derived figures, means, files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import shapes, statistics
from .settings import DIRECTIONS
from .shapes import Shape

Cell = dict[str, Any]
FIELDS = (
    "mode", "shape", "direction", "column", "group", "base", "turns", "seconds", "seconds_low",
    "seconds_high", "seconds_min", "ratio", "ratio_low", "ratio_high", "gflops", "peak_fraction",
    "saved_bytes", "saved_weights", "faults", "preempted", "absent",
)  # fmt: skip


@dataclass
class Run:
    """Everything that one invocation found out.

    Attributes:
        environment: name -> value.
        modes: name -> what it does.
        columns: name -> what is timed.
        cells: one per mode, row, direction and column.
        warnings: why the figures are doubtful.
        missing: peers that could not be had, with the reason.
    """

    environment: dict[str, Any]
    modes: dict[str, str]
    columns: dict[str, str]
    cells: list[Cell] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, cells: Iterable[Cell], peak: float) -> None:
        """Takes measured cells and derives the rest.

        Args:
            cells: as a worker wrote them.
            peak: measured float32 GFLOP/s; see roofline.
        """
        for cell in cells:
            (row,) = shapes.select([cell["shape"]])
            if "seconds" in cell:
                flops = row.step_flops if cell["direction"] == "step" else row.flops
                cell["gflops"] = flops * 1e-9 / cell["seconds"]
                cell["peak_fraction"] = cell["gflops"] / peak
                cell["saved_weights"] = cell["saved_bytes"] / (4 * row.weights)
            self.cells.append(cell)

    def rows(self) -> list[str]:
        """The rows as text: layers, then networks, each in the order they were measured."""
        rows = shapes.select([cell["shape"] for cell in self.cells]) if self.cells else ()
        return [str(row) for row in sorted(rows, key=lambda row: not isinstance(row, Shape))]

    def find(self, mode: str, direction: str) -> dict[tuple[str, str], Cell]:
        """(row, column) -> cell, of those that were timed."""
        return {
            (cell["shape"], cell["column"]): cell
            for cell in self.cells
            if cell["mode"] == mode and cell["direction"] == direction and "ratio" in cell
        }

    def means(self) -> list[Cell]:
        """Geometric means of the median ratios: over all single layers, over those of ``direct``,
        and over the networks.

        "unfused" stands for the better of its two columns in each row.
        """
        found = []
        for mode in self.modes:
            for direction in DIRECTIONS:
                cells = self.find(mode, direction)
                by_column: dict[str, dict[str, float]] = {}
                for (row, column), cell in cells.items():
                    by_column.setdefault(column, {})[row] = cell["ratio"]
                    if cell["group"] == "unfused":
                        best = by_column.setdefault("unfused", {})
                        best[row] = min(cell["ratio"], best.get(row, cell["ratio"]))
                for column, ratio in by_column.items():
                    where = {"mode": mode, "direction": direction, "column": column}
                    found += [{**where, **mean} for mean in _means_of(ratio)]
        return found

    def as_json(self) -> str:
        """The run, with means."""
        content = {
            "environment": self.environment,
            "warnings": self.warnings,
            "modes": self.modes,
            "columns": self.columns,
            "missing": self.missing,
            "means": self.means(),
            "cells": self.cells,
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def as_csv(self) -> str:
        """The cells; the environment in lines that start with #."""
        text = io.StringIO()
        for name, value in self.environment.items():
            text.write(f"# {name}: {value}\n")
        for warning in self.warnings:
            text.write(f"# warning: {warning}\n")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.cells)
        return text.getvalue()


def _means_of(ratio: dict[str, float]) -> list[Cell]:
    listed = shapes.select(list(ratio))
    layers = [row for row in listed if isinstance(row, Shape)]
    groups = {
        "all": layers,
        "3x3, N >= 16, C >= 64": [shape for shape in layers if shape.for_direct],
        "networks": [row for row in listed if not isinstance(row, Shape)],
    }
    found = []
    for rows, members in groups.items():
        if members:
            mean = statistics.geometric_mean([ratio[str(row)] for row in members])
            found.append({"rows": rows, "count": len(members), "ratio": mean})
    return found


def write(path: Path, content: str | bytes) -> None:
    """A file that is either the old one or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    if isinstance(content, str):
        scratch.write_text(content)
    else:
        scratch.write_bytes(content)
    os.replace(scratch, path)


def read_lines(path: Path) -> list[Cell]:
    """The cells of a worker's file; a last line cut short by an interruption is left out."""
    if not path.exists():
        return []
    lines: Sequence[str] = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
