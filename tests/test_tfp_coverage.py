"""``docs/tfp-coverage.md`` against the documentation's names and against the classes."""

from __future__ import annotations

import fnmatch
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tfp_layers
from tfp_cases import FOLDER
from torch import nn

import fastbconv
from fastbconv.layers import tfp, tfp_arguments

PAGE = Path(__file__).parents[1] / "docs" / "tfp-coverage.md"
DOCUMENTED: dict[str, list[str]] = json.loads((FOLDER / "documented_names.json").read_text())
STATUSES = ("as documented", "raises, as in eager mode", "different", "added")


def table(heading: str) -> dict[str, list[str]]:
    """The table under a heading: name -> the other cells."""
    section = PAGE.read_text().split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    names = [row[0].strip("`") for row in cells]
    assert len(set(names)) == len(names), "a name has two rows"
    return dict(zip(names, (row[1:] for row in cells), strict=True))


MODULE = table("Layers and functions of the module")
ARGUMENTS = table("Arguments of the constructor")
KEYWORDS = table("Keywords in `**kwargs`")
PROPERTIES = table("Properties")
METHODS = table("Methods")


def public_names(layer_class: type) -> set[str]:
    """What a class has beyond nn.Module: properties, methods, class attributes."""
    return {name for name in dir(layer_class) if name[0] != "_" and not hasattr(nn.Module, name)}


def arguments_of(name: str) -> set[str]:
    return {row for row, (layers, *_) in ARGUMENTS.items() if fnmatch.fnmatch(name, layers)}


@pytest.mark.parametrize("rows", [MODULE, ARGUMENTS, KEYWORDS, PROPERTIES, METHODS])
def test_every_row_has_a_status_and_a_line(rows: dict[str, list[str]]) -> None:
    assert rows
    for name, (*_, status, line) in rows.items():
        assert status in STATUSES, name
        assert len(line) > 3, name


def test_no_documented_name_is_missing() -> None:
    for kind, rows in (
        ("module", MODULE),
        ("arguments", ARGUMENTS),
        ("sibling_arguments", ARGUMENTS),
        ("properties", PROPERTIES),
        ("attributes", PROPERTIES),
        ("methods", METHODS),
    ):
        missing = set(DOCUMENTED[kind]) - set(rows)
        assert not missing, kind
        added = {name for name in DOCUMENTED[kind] if rows[name][-2] == "added"}
        assert not added, f"{kind}: these are documented"


def test_names_of_the_module() -> None:
    assert set(MODULE) == set(tfp.__all__)
    assert {name for name in MODULE if name.startswith(("Conv", "Dense"))} == set(tfp_layers.NAMES)
    assert set(MODULE) - {"Deterministic", "kl_divergence"} <= set(fastbconv.__all__)


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_arguments(name: str) -> None:
    signature = inspect.signature(getattr(tfp, name))
    assert set(signature.parameters) - {"kwargs"} == arguments_of(name)
    if name == "Convolution2DReparameterization":
        assert [*DOCUMENTED["arguments"], "kwargs"] == list(signature.parameters)


def test_keywords() -> None:
    assert set(KEYWORDS) == set(tfp_arguments.LAYER_OPTIONS)


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_properties_and_methods(name: str) -> None:
    layer_class = getattr(tfp, name)
    layer = tfp_layers.make(name)
    for row in PROPERTIES:
        on_class = inspect.getattr_static(layer_class, row, None)
        assert not inspect.isfunction(on_class), row
        assert on_class is not None or row in vars(layer) or hasattr(layer_class, row), row
    for row in METHODS:
        assert callable(getattr(layer_class, row)), row
    assert public_names(layer_class) <= set(PROPERTIES) | set(METHODS)
    # What an instance has besides: its arguments, and what PyTorch and building add.
    own = {key for key in vars(layer) if key[0] != "_"} - {"training", "built"}
    assert own <= arguments_of(name) | set(PROPERTIES)


def _value(layer: Any, name: str) -> str:
    try:
        value = getattr(layer, name)
        if name.startswith("get_") and name.endswith("_at"):
            value(0)
    except (AttributeError, RuntimeError) as error:
        return type(error).__name__
    return "a value"


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_what_raises_is_marked(name: str) -> None:
    layer, x = tfp_layers.built(name)
    layer(x)
    for row, (status, _) in {**PROPERTIES, **METHODS}.items():
        raised = _value(layer, row) in ("ConnectivityError", "RuntimeError")
        assert raised is (status == "raises, as in eager mode"), row
        assert _value(layer, row) != "AttributeError", row


def test_the_page_says_what_a_local_convolution_is() -> None:
    for rank in (1, 2, 3):
        name = f"Convolution{rank}DLocalReparameterization"
        docstring = " ".join(inspect.getdoc(getattr(tfp, name)).split())
        for text in (MODULE[name][-1], docstring):
            assert "another objective, not an estimator of the same ELBO" in text
            assert "covariances between" in text.lower()
