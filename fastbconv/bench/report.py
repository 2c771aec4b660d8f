"""The run as text for a terminal, and as a bar chart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from . import shapes
from .results import Cell, Run
from .settings import DIRECTIONS
from .shapes import Shape


def header(run: Run) -> str:
    """What was measured, where, and how to read it."""
    lines = [f"{name:<22} {'-' if v is None else v}" for name, v in run.environment.items()]
    lines.append("")
    lines += [f"mode {name:<17} {text}" for name, text in run.modes.items()]
    lines += [f"column {name:<15} {text}" for name, text in run.columns.items()]
    lines += [f"missing               {text}" for text in run.missing]
    return "\n".join(lines)


def warnings(run: Run) -> str:
    """Why not to quote these figures, or nothing."""
    return "\n".join(f"WARNING: {text}: do not quote these figures" for text in run.warnings)


def tables(run: Run) -> str:
    """All tables, mode by mode."""
    parts = []
    for mode in run.modes:
        for direction in DIRECTIONS:
            if run.find(mode, direction):
                parts.append(_ratios(run, mode, direction))
                parts.append(
                    _figures(
                        run,
                        mode,
                        direction,
                        "fraction of the multiply-add peak",
                        lambda cell: f"{cell['peak_fraction']:.2f}",
                    )
                )
                parts.append(
                    _figures(
                        run,
                        mode,
                        direction,
                        "page faults a call",
                        lambda cell: f"{cell['faults']:.0f}",
                    )
                )
    mode = next(iter(run.modes))
    direction = next((name for name in DIRECTIONS if run.find(mode, name)), "forward")
    title = "kept for backward beyond input, parameters and output, in weights"
    parts.append(
        _figures(run, mode, direction, title, lambda cell: f"{cell['saved_weights']:.1f}", False)
    )
    absent = {f"{c['shape']} {c['column']}: {c['absent']}" for c in run.cells if "absent" in c}
    parts.append("\n".join(sorted(absent)))
    return "\n\n".join(part for part in parts if part)


def _ratios(run: Run, mode: str, direction: str) -> str:
    cells = run.find(mode, direction)
    shown = _columns(run, cells, lambda cell: cell["group"] != "deterministic")
    lines = [["row", "det ms", "layout", *shown]]
    for row in run.rows():
        first = next(cell for (name, _), cell in cells.items() if name == row)
        base = cells[row, first["base"]]
        line = [row, f"{base['seconds'] * 1e3:.3f}", base["column"].removeprefix("det-")]
        for column in shown:
            cell = cells.get((row, column))
            line.append(
                f"{cell['ratio']:.2f} ({cell['ratio_low']:.2f}-{cell['ratio_high']:.2f})"
                if cell
                else "-"
            )
        lines.append(line)
    return (
        f"{mode}, {direction}: time over the deterministic layer's, median (quartiles)\n"
        + _grid(lines)
        + "\n"
        + _mean_lines(run, mode, direction)
    )


def _mean_lines(run: Run, mode: str, direction: str) -> str:
    lines = []
    for mean in run.means():
        if (mean["mode"], mean["direction"]) != (mode, direction):
            continue
        if mean["column"].startswith("det-"):
            continue
        if mean["rows"] in ("all", "networks") or mean["column"] == "direct":
            rows = "row" if mean["count"] == 1 else "rows"
            what = "" if mean["rows"] == "all" else f" ({mean['rows']})"
            lines.append(
                f"  geometric mean  {mean['column']:<16} {mean['ratio']:.3f}  "
                f"{mean['count']} {rows}{what}"
            )
    return "\n".join(lines)


def _figures(
    run: Run,
    mode: str,
    direction: str,
    title: str,
    show: Callable[[Cell], str],
    located: bool = True,
) -> str:
    cells = run.find(mode, direction)
    shown = _columns(run, cells, lambda _: True)
    lines = [["row", *shown]]
    for row in run.rows():
        found = [cells.get((row, column)) for column in shown]
        lines.append([row, *(show(cell) if cell else "-" for cell in found)])
    where = f"{mode}, {direction}: " if located else ""
    return f"{where}{title}\n{_grid(lines)}"


def _columns(
    run: Run, cells: dict[tuple[str, str], Cell], wanted: Callable[[Cell], bool]
) -> list[str]:
    there = {column for (_, column), cell in cells.items() if wanted(cell)}
    return [column for column in run.columns if column in there]


def _grid(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        first, *rest = (value.rjust(width) for value, width in zip(line, widths, strict=True))
        text.append("  ".join([first.strip().ljust(widths[0]), *rest]))
    return "\n".join(text)


def chart(run: Run) -> bytes:
    """Bars of the median ratio with quartiles, a panel per mode and direction; a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(m, d) for m in run.modes for d in DIRECTIONS if run.find(m, d)]
    rows = run.rows()
    layers = sum(isinstance(row, Shape) for row in shapes.select(rows))  # where networks begin
    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 2.0), 3.4 * len(panels) + 0.4))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (mode, direction) in zip(axes, panels, strict=True):
        cells = run.find(mode, direction)
        shown = _columns(run, cells, lambda cell: cell["group"] != "deterministic")
        width, ceiling = 0.8 / max(len(shown), 1), _ceiling(cells)
        for index, column in enumerate(shown):
            there = [
                (i, cells[row, column]) for i, row in enumerate(rows) if (row, column) in cells
            ]
            ratio = [cell["ratio"] for _, cell in there]
            low = [cell["ratio"] - cell["ratio_low"] for _, cell in there]
            high = [cell["ratio_high"] - cell["ratio"] for _, cell in there]
            place = [i + (index - (len(shown) - 1) / 2) * width for i, _ in there]
            axis.bar(place, ratio, width, yerr=[low, high], label=column, error_kw={"lw": 0.7})
            for x, value in zip(place, ratio, strict=True):
                if value > ceiling:
                    axis.text(x, 0.97 * ceiling, f"{value:.1f}", rotation=90, ha="center", va="top")
        axis.axhline(1.0, color="black", lw=0.8)
        if 0 < layers < len(rows):
            axis.axvline(layers - 0.5, color="grey", lw=0.8, ls=":")
        axis.set_title(f"{direction}, {mode}: time over the deterministic layer's", fontsize=10)
        axis.set_ylabel("ratio, median and quartiles")
        axis.set_xticks(range(len(rows)), rows, rotation=25, ha="right", fontsize=8)
        axis.set_ylim(0.0, ceiling)
    axes[0].legend(ncols=4, fontsize=7, loc="upper left", bbox_to_anchor=(0.0, 1.35))
    figure.text(0.01, 0.002, _caption(run), fontsize=7)
    figure.tight_layout(rect=(0.0, 0.015, 1.0, 1.0))
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _ceiling(cells: dict[tuple[str, str], Cell]) -> float:
    """Where the axis ends: bars beyond 3 are cut and labelled, or all else would be unreadable."""
    return min(3.0, 1.1 * max(cell["ratio_high"] for cell in cells.values()))


def _caption(run: Run) -> str:
    names = ("processor", "threads", "torch", "instruction set", "commit", "date")
    text = ", ".join(f"{name} {run.environment.get(name)}" for name in names)
    return "NOT QUIET: " + text if run.warnings else text
