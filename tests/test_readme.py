"""The README: its examples run from top to bottom, its links lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import BLOCK, dead_links, run_examples

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks in one namespace, in order; the one that needs a GPU where there is one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    kinds = ["python", "python cuda"] if torch.cuda.is_available() else ["python"]
    count = run_examples(README, kinds)
    assert "KL [nats]" in capsys.readouterr().out  # the table of fb.summary
    marks = [block[1].strip() for block in BLOCK.finditer(README.read_text(encoding="utf-8"))]
    assert count == sum(mark in kinds for mark in marks)
    assert set(marks) == {"python", "python cuda"}


def test_links_lead_somewhere() -> None:
    assert dead_links(README) == []
