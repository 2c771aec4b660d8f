"""Measures one mode in a process of its own: ``python -m fastbconv.bench.worker SETTINGS FILE``.

SETTINGS is JSON; every finished cell is one line of JSON at the end of FILE, so that a run that is
interrupted leaves what it has measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import columns, machine, memory, peers, statistics, timer
from .columns import Column
from .network_columns import NetworkProgram, problem_of
from .problem import Program
from .settings import Settings
from .shapes import Row
from .timer import Samples

Cell = dict[str, Any]
_POOL_TENSORS = 12  # results and temporaries of the hungriest column that live at once
_MOST_EVICTED = 2**28  # a virtual machine reports its host's cache, of which it has a share


def main(argv: Sequence[str]) -> int:
    """Measures and writes."""
    settings, target = Settings.parse(argv[0]), Path(argv[1])
    if settings.mode == "recycled":
        memory.recycle_pages()
    torch.set_num_threads(settings.threads)
    known = columns.COLUMNS
    if not known.keys() >= set(settings.columns):
        known = {**known, **{peer.name: peer for peer in peers.available()[0]}}
    chosen = [known[name] for name in settings.columns]
    evicted = min(2 * machine.cache_bytes(), _MOST_EVICTED)
    between = memory.cache_evictor(evicted) if settings.cold else None
    with open(target, "a") as file:
        for number, shape in enumerate(settings.shapes, start=1):
            for cells in measure_row(shape, chosen, settings, between):
                for cell in cells:
                    file.write(json.dumps(cell) + "\n")
                file.flush()
                print(f"{number}/{len(settings.shapes)} {_progress(cells)}", file=sys.stderr)
    return 0


def measure_row(shape: Row, chosen: Sequence[Column], settings: Settings, between: Callable | None):
    """Yields the cells of one row, direction by direction."""
    if settings.mode == "recycled":
        memory.grow_pool(_POOL_TENSORS * 4 * shape.largest)
    problem = problem_of(shape)
    programs: dict[str, Program | NetworkProgram] = {}
    absent: dict[str, str] = {}
    for column in chosen:
        try:
            programs[column.name] = _started(problem.build(column))
        except NotImplementedError as error:
            absent[column.name] = str(error)
    saved = {name: _saved(program) for name, program in programs.items()}
    for direction in settings.directions:
        calls = {name: getattr(program, direction) for name, program in programs.items()}
        with torch.set_grad_enabled(direction == "step"):
            samples = timer.interleave(calls, settings.effort, between=between)
        cells = summarise(samples, chosen)
        for cell in cells:
            cell["saved_bytes"] = saved[cell["column"]]
        where = {"mode": settings.mode, "shape": str(shape), "direction": direction}
        cells += [{"column": name, "absent": reason} for name, reason in absent.items()]
        yield [{**where, **cell} for cell in cells]


def _started(program: Program | NetworkProgram) -> Program | NetworkProgram:
    """The program after one step: what it cannot do shows here, and lazy set-up is done."""
    program.step()
    return program


def _saved(program: Program | NetworkProgram) -> int:
    def make() -> tuple[object, ...]:
        result = program.graph()
        return result.output, result.kl

    return memory.saved_bytes(make, list(program.leaves.values()))


def summarise(samples: Mapping[str, Samples], chosen: Sequence[Column]) -> list[Cell]:
    """Times and ratios of one row and direction.

    The denominator is the deterministic column with the smaller median over the whole cell: one
    column, not the faster of two at each turn, which would be a rival that nobody can run.
    """
    groups = {column.name: column.group for column in chosen}
    medians = {name: statistics.quartiles(s.seconds).median for name, s in samples.items()}
    base = min((name for name in samples if groups[name] == "deterministic"), key=medians.get)
    cells = []
    for name, sample in samples.items():
        low, median, high = statistics.quartiles(sample.seconds)
        ratio = statistics.ratios(sample.seconds, samples[base].seconds)
        turns = len(sample.seconds)
        cells.append(
            {
                "column": name,
                "group": groups[name],
                "base": base,
                "turns": turns,
                "seconds": median,
                "seconds_low": low,
                "seconds_high": high,
                "seconds_min": min(sample.seconds),
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "faults": statistics.quartiles(sample.faults).median,
                "preempted": sum(sample.preempted) / turns,
            }
        )
    return cells


def _progress(cells: Sequence[Cell]) -> str:
    timed = [cell for cell in cells if "ratio" in cell]
    base = next(cell for cell in timed if cell["column"] == cell["base"])
    text = "  ".join(
        f"{cell['column']} {cell['ratio']:.2f}"
        for cell in timed
        if cell["group"] != "deterministic"
    )
    first = cells[0]
    return (
        f"{first['mode']:<8} {first['shape']:<15} {first['direction']:<7} "
        f"{base['column']} {base['seconds'] * 1e3:.2f} ms ({base['turns']} turns)  {text}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
