"""The examples run as they stand, and say what they promise; so does the timing of predictions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _run(folder: Path, *arguments: str) -> str:
    """What a script prints, in a process of its own, in an empty folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern + r" ([\d.]+\d)", text)
    assert found is not None, f"{pattern}: not in\n{text}"
    return float(found[1])


def test_uncertainty(tmp_path: Path) -> None:
    text = _run(tmp_path, str(ROOT / "examples" / "uncertainty.py"))
    assert _number("accuracy", text) > 95
    assert _number("AUROC", text) > 0.9
    assert _number("clean: expected calibration error", text) < 0.05
    assert _number("a third", text) > _number("all ten digits", text) + 10
    assert _number("unseen: entropy", text) > 3 * _number(" known: entropy", text)
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000


def test_uncertainty_is_a_script_of_cells() -> None:
    """Cells of text are comments, and every cell of code follows one."""
    text = (ROOT / "examples" / "uncertainty.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert cells[0] == ""
    prose = [cell for cell in cells[1:] if cell.startswith(" [markdown]\n")]
    assert len(prose) >= 6
    for cell in prose:
        assert all(line.startswith("#") for line in cell.strip().splitlines()[1:])


def test_timing_of_predictions(tmp_path: Path) -> None:
    arguments = ("--network", "lenet5", "--batch", "2", "--samples", "4", "--turns", "2")
    script = str(ROOT / "benchmarks" / "predict.py")
    text = _run(tmp_path, script, *arguments, "--samples-per-pass", "2", "--threads", "1")
    assert "lenet5, batch 2, 4 samples" in text
    assert [line.split()[0] for line in text.splitlines() if "passes / this" in line] == [
        *("passes", "predict", "predict,", "passes,")
    ]
    assert _number(r"passes .* passes / this", text) == 1.0
