"""The pages of docs/: their examples run, their links lead somewhere, their table is up to date."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from pages import dead_links, run_examples

import fastbconv as fb

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def write_keras_file(folder: Path) -> None:
    """``model.h5``: the layers of the page's example, as ``model.save_weights`` writes them."""
    rng = np.random.default_rng(0)
    layers = {
        "conv2d_reparameterization": ((5, 5, 3, 64), (64,)),
        "dense_reparameterization": ((16 * 16 * 64, 10), (10,)),
    }
    names = ("kernel_posterior_loc:0", "kernel_posterior_untransformed_scale:0")
    with h5py.File(folder / "model.h5", "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for layer, (kernel, bias) in layers.items():
            group = file.create_group(layer)
            variables = [f"{layer}/{name}" for name in (*names, "bias_posterior_loc:0")]
            group.attrs["weight_names"] = [name.encode() for name in variables]
            for name, shape in zip(variables, (kernel, kernel, bias), strict=True):
                group[name] = rng.standard_normal(shape, dtype=np.float32)


FILES: dict[str, Callable[[Path], None]] = {"migrating-from-tfp.md": write_keras_file}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page in one namespace, in order, in a folder with the files they name."""
    monkeypatch.chdir(tmp_path)
    if page.name in FILES:
        FILES[page.name](tmp_path)
    count = run_examples(page)
    capsys.readouterr()
    assert count or page.name not in FILES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_are_there(page: Path) -> None:
    """A claim that names its test: `test_name`, or `test_name[check]` for a part of one."""
    tests = "".join(path.read_text() for path in (DOCS.parent / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests, f"{page.name}: {name}"
    for name in re.findall(r"`(?:test_\w+)?\[(\w+)\]`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_the_table_of_layers_is_up_to_date() -> None:
    text = (DOCS / "migrating-from-tfp.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `fb\.(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 15
    for name, status in rows:
        expected = "yes" if hasattr(fb, name) else "not yet"
        assert status == expected, f"docs/migrating-from-tfp.md: fb.{name} is there: {expected}"
