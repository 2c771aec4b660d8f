"""``python -m fastbconv bench``: parses, checks, starts one process per mode, writes."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import columns, machine, memory, peers, report, results, roofline, shapes
from .check import check
from .columns import Column
from .results import Run
from .settings import DIRECTIONS, Settings
from .shapes import Row
from .timer import Effort


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m fastbconv bench",
        description="Times Bayesian layers and networks against deterministic ones, by turns in "
        "one process: median and quartiles of the ratio.",
    )
    add = made.add_argument
    add("--list", action="store_true", help="show rows and columns, measure nothing")
    add(
        "--shapes",
        nargs="+",
        default=[],
        metavar="ROW",
        help="row numbers, N,H,C,K,k (new ones too), networks (lenet5, resnet18@32), or parts of a "
        "row's text; default: all",
    )
    add(
        "--columns",
        nargs="+",
        default=["default"],
        metavar="NAME",
        help="names, or default, all, peers; the deterministic ones are always there",
    )
    add("--peers", action="store_true", help="add the columns of other libraries installed here")
    add("--directions", nargs="+", choices=[*DIRECTIONS], default=[*DIRECTIONS])
    add("--modes", nargs="+", choices=[*memory.MODES], default=None, help="default: all there are")
    add("--threads", type=_positive, default=2)
    add("--budget", type=_seconds, default=1.0, help="seconds per row, direction and column")
    add("--repeats", type=_positive, default=15, help="least number of turns of a cell")
    add("--cold", action="store_true", help="evict the caches before each call")
    add(
        "--check",
        action="store_true",
        help="first compare every column with float64 on the same noise; stop if one is wrong",
    )
    add("--check-only", action="store_true", help="compare and measure nothing")
    add("--out", type=Path, default=Path("bench-results"), help="folder of the files")
    add("--name", default="bench", help="of the files: NAME.json, NAME.csv, NAME.png")
    add("--no-chart", action="store_true", help="no NAME.png")
    return made  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0; 1 where a column is wrong or a measurement failed; 2 where the request makes no sense.
    """
    command = parser()
    options = command.parse_args(argv)
    try:
        rows = shapes.select(options.shapes)
        found, missing = _peers(options)
        chosen = columns.select(options.columns, found)
    except ValueError as error:
        command.error(str(error))
    if options.list:
        _show(found, missing)
        return 0
    torch.set_num_threads(options.threads)
    environment = machine.environment(options.threads)
    if environment["native library"] == "reference":
        print(
            "native library: expected it to be loaded, got the reference, whose times mean "
            "nothing; python -m fastbconv env says why",
            file=sys.stderr,
        )
        return 2
    if (options.check or options.check_only) and not _right(rows, chosen):
        return 1
    if options.check_only:
        return 0
    run = Run(environment, _modes(options.modes), {c.name: c.text for c in chosen}, missing=missing)
    print(report.header(run), file=sys.stderr)
    failed = _measure(run, rows, options)
    if not run.cells:
        print("no cell was measured", file=sys.stderr)
        return 1
    print(f"{report.header(run)}\n\n{report.tables(run)}\n\n{report.warnings(run)}".rstrip())
    _write(run, options)
    return 1 if failed else 0


def _peers(options: argparse.Namespace) -> tuple[list[Column], list[str]]:
    """Peers are imported only where somebody asks for one."""
    own = {"default", "all", *columns.COLUMNS}
    if not (options.peers or options.list or set(options.columns) - own):
        return [], ["peers: not asked for (--peers)"]
    if options.peers:
        options.columns = [*options.columns, "peers"]
    return peers.available()


def _show(found: Sequence[Column], missing: Sequence[str]) -> None:
    print("rows (layers: N,H,C,K,k; stride 1, padding k // 2; networks: name@batch)")
    for number, row in enumerate(shapes.ROWS, start=1):
        print(f"  {number:>2}  {row!s:<16} {row.flops * 1e-9:6.2f} GFLOP  {row.weights} weights")
    print("columns (* measured by default)")
    for column in [*columns.COLUMNS.values(), *found]:
        print(f"  {'*' if column.default else ' '} {column.name:<18} {column.text}")
    for text in missing:
        print(f"  missing: {text}")


def _modes(wanted: Sequence[str] | None) -> dict[str, str]:
    """The modes to measure; a default one that this machine lacks is left out aloud."""
    names = list(wanted or memory.MODES)
    if wanted is None and not memory.can_recycle():
        names.remove("recycled")
        print("mode recycled: left out, it needs glibc's allocator", file=sys.stderr)
    return {name: memory.MODES[name] for name in dict.fromkeys(names)}


def _right(rows: Sequence[Row], chosen: Sequence[Column]) -> bool:
    compared, wrong = check(rows, chosen, lambda text: print(text, file=sys.stderr, flush=True))
    total = len(rows) * len(chosen)
    print(
        f"checked: {compared - len(wrong)} of {total} cells agree with float64, {len(wrong)} are "
        f"wrong, {total - compared} cannot be had"
    )
    return not wrong


def _measure(run: Run, rows: Sequence[Row], options: argparse.Namespace) -> bool:
    """Fills the run, mode by mode; True if a process failed."""
    peak = roofline.measure_peak(0.5)
    run.environment["multiply-add peak"] = f"{peak.gflops:.1f} GFLOP/s, measured with {peak.source}"
    before, failed = machine.cpu_time(), False
    others = [machine.others()]
    effort = Effort(options.budget, options.repeats)
    for mode in run.modes:
        settings = Settings(
            mode, tuple(rows), tuple(run.columns), tuple(options.directions), options.threads,
            effort, options.cold,
        )  # fmt: skip
        cells, status = _work(settings)
        run.add(cells, peak.gflops)
        failed = failed or status != 0
        if status != 0:
            run.warnings.append(f"mode {mode} ended with status {status} before its last row")
    after = machine.cpu_time()
    others.append(machine.others())
    timed = [cell["preempted"] for cell in run.cells if "preempted" in cell]
    stolen = machine.share("stolen", before, after)
    preempted = sum(timed) / max(len(timed), 1)
    run.environment |= {
        "measured": f"budget {effort.budget:g} s, at least {effort.turns} turns, "
        + ("caches evicted before each call" if options.cold else "caches as the last call left"),
        "load average before": before.load,
        "load average after": after.load,
        "cores used by others": f"{others[0]:.1%} before, {others[1]:.1%} after",
        "stolen by the host": f"{stolen:.1%}",
        "calls preempted": f"{preempted:.1%}",
    }
    run.warnings += machine.complaints((others[0], others[1]), stolen, preempted)
    return failed


def _work(settings: Settings) -> tuple[list[dict[str, Any]], int]:
    """Measures one mode in a fresh process; what it wrote, and its status."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cells.jsonl"
        command = [sys.executable, "-m", "fastbconv.bench.worker", settings.dump(), str(target)]
        try:
            status = subprocess.run(command, env=environment, check=False).returncode
        except KeyboardInterrupt:  # the process got it too: keep what it has measured
            status = 130
        return results.read_lines(target), status


def _write(run: Run, options: argparse.Namespace) -> None:
    base = options.out / options.name
    results.write(base.with_name(f"{base.name}.json"), run.as_json())
    results.write(base.with_name(f"{base.name}.csv"), run.as_csv())
    written = [f"{base}.json", f"{base}.csv"]
    if not options.no_chart:
        try:
            results.write(base.with_name(f"{base.name}.png"), report.chart(run))
            written.append(f"{base}.png")
        except ModuleNotFoundError as error:
            print(f"no chart: {error.name} is not installed (pip install 'fastbconv[bench]')")
    print(f"\nwritten: {', '.join(written)}")
