"""Public docstrings have arguments, shapes, results, errors, units, sources and examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from public_names import MODULES, callables, sections
from torch import nn

PACKAGE = Path(__file__).resolve().parents[1] / "fastbconv"
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]
PUBLIC = callables()
ERRORS = {"KeyError", "NotImplementedError", "TypeError", "ValueError"}
# The algorithms that come from a paper, and how the paper is named.
SOURCES = {
    "fastbconv.BayesConv2d": "arXiv:1505.05424",
    "fastbconv.BayesLinear": "arXiv:1505.05424",
    "fastbconv.Convolution2DReparameterization": "arXiv:1505.05424",
    "fastbconv.Convolution2DFlipout": "arXiv:1803.04386",
    "fastbconv.Convolution2DLocalReparameterization": "arXiv:1506.02557",
    "fastbconv.DenseLocalReparameterization": "arXiv:1506.02557",
    "fastbconv.ScaleMixture": "arXiv:1505.05424",
    "fastbconv.algorithm": "arXiv:1509.09308",
    "fastbconv.convert": "arXiv:1906.05323",
    "fastbconv.functional.bayes_conv2d": "arXiv:1505.05424",
    "fastbconv.initializers.GlorotNormal": "Glorot",
    "fastbconv.initializers.GlorotUniform": "Glorot",
    "fastbconv.initializers.HeNormal": "arXiv:1502.01852",
    "fastbconv.initializers.HeUniform": "arXiv:1502.01852",
    "fastbconv.initializers.LecunNormal": "LeCun",
    "fastbconv.initializers.LecunUniform": "LeCun",
    "fastbconv.initializers.Orthogonal": "arXiv:1312.6120",
    "fastbconv.noise.philox4x32_10": "Salmon",
    "fastbconv.noise.standard_normal": "Box",
    "fastbconv.prune": "arXiv:1505.05424",
}
# What returns a KL, beside the layers.
IN_NATS = [
    "fastbconv.ScaleMixture",
    "fastbconv.collect_kl",
    "fastbconv.functional.kl_normal",
    "fastbconv.kl_loss",
    "fastbconv.losses",
    "fastbconv.summary",
    *(name for name in PUBLIC if name.startswith("fastbconv.functional.bayes_")),
]


def by_name(names: list[str] | dict[str, Any]) -> Any:
    return pytest.mark.parametrize("name", sorted(names))


def document(value: Any) -> str:
    """The docstring without its indentation."""
    return inspect.cleandoc(value.__doc__ or "")


def is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def referred(text: str) -> Iterator[Any]:
    """The public objects that a section names: "as in ``X``", "those of ``X``"."""
    for name in re.findall(r"(?:as in|those of) `{0,2}([\w.]+)`{0,2}", text):
        short = name.rstrip(".").rpartition(".")[2]
        yield from (value for key, value in PUBLIC.items() if key.rpartition(".")[2] == short)


def argument_names(value: Any) -> set[str]:
    """The arguments that a docstring explains, itself or by naming what explains them."""
    found = sections(document(value))
    text = found.get("Args", "") + found.get("Attributes", "")
    names = {
        name.lstrip("*")
        for line in re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", text, re.MULTILINE)
        for name in line.split(", ")
    }
    return names.union(*(argument_names(other) for other in referred(text) if other is not value))


@by_name(PUBLIC)
def test_it_has_a_docstring_of_its_own(name: str) -> None:
    first = document(PUBLIC[name]).split("\n\n")[0]
    assert first, f"{name}: a docstring"
    assert first.endswith((".", ":", "``.")), f"{name}: a first sentence, got {first!r}"


@by_name({name: value for name, value in PUBLIC.items() if not is_error(value)})
def test_arguments_are_explained(name: str) -> None:
    missing = set(inspect.signature(PUBLIC[name]).parameters) - argument_names(PUBLIC[name])
    assert not missing, f"{name}: Args for {sorted(missing)}"


def _annotation(value: Any) -> str:
    return str(getattr(value, "__annotations__", {}).get("return", "None"))


@by_name({name: value for name, value in PUBLIC.items() if inspect.isfunction(value)})
def test_results_are_explained(name: str) -> None:
    returns, found = _annotation(PUBLIC[name]), sections(document(PUBLIC[name]))
    if returns.startswith("Iterator"):
        assert "Yields" in found or returns == "Iterator[None]", f"{name}: Yields"
    elif returns != "None":
        assert "Returns" in found, f"{name}: Returns"


@by_name({name: value for name, value in PUBLIC.items() if inspect.isclass(value)})
def test_layers_have_shapes(name: str) -> None:
    if issubclass(PUBLIC[name], nn.Module):
        assert "Shape" in sections(document(PUBLIC[name])), f"{name}: Shape"


@by_name([name for name in PUBLIC if name.startswith("fastbconv.functional.bayes_")])
def test_functions_of_images_have_shapes(name: str) -> None:
    assert "Shape" in sections(document(PUBLIC[name])), f"{name}: Shape"


# --- errors ---------------------------------------------------------------------------------------


def _tree(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _called(function: Any, tree: ast.AST) -> Iterator[Any]:
    """Functions of the package that a function calls by a name of its module."""
    for node in ast.walk(tree):
        target = node.func if isinstance(node, ast.Call) else None
        found: Any = None
        if isinstance(target, ast.Name):
            found = function.__globals__.get(target.id)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            found = getattr(function.__globals__.get(target.value.id), target.attr, None)
        if inspect.isfunction(found) and found.__module__.startswith("fastbconv"):
            yield inspect.unwrap(found)


def raised(function: Any, depth: int = 2) -> set[str]:
    """The errors that a function raises, and those that it calls by name, two calls deep."""
    tree = _tree(function)
    thrown = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    kinds = (error.func if isinstance(error, ast.Call) else error for error in thrown)
    names = {kind.id for kind in kinds if isinstance(kind, ast.Name)} & ERRORS
    if depth:
        names = names.union(*(raised(other, depth - 1) for other in _called(function, tree)))
    return names


@by_name({name: value for name, value in PUBLIC.items() if not is_error(value)})
def test_errors_are_listed(name: str) -> None:
    value = PUBLIC[name]
    functions = [inspect.unwrap(value)] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        own = [vars(value).get(method) for method in ("__init__", "__post_init__")]
        functions = [f for f in own if inspect.isfunction(f) and "dataclass" not in str(f)]
        functions = [f for f in functions if f.__code__.co_filename != "<string>"]
    listed = sections(document(value)).get("Raises", "")
    missing = set().union(*map(raised, functions)) - set(re.findall(r"\w+Error", listed))
    assert not missing, f"{name}: Raises for {sorted(missing)}"


# --- examples, units, sources ---------------------------------------------------------------------


@by_name({name: value for name, value in PUBLIC.items() if not is_error(value)})
def test_it_has_an_example(name: str) -> None:
    assert ">>> " in sections(document(PUBLIC[name])).get("Example", ""), f"{name}: Example"


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    """All modules, public or not: the one place where examples run."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = doctest.testmod(importlib.import_module(".".join(parts)))
    assert found.attempted > 0
    assert found.failed == 0


@by_name(IN_NATS)
def test_a_kl_has_a_unit(name: str) -> None:
    assert re.search(r"\bnats\b", document(PUBLIC[name])), f"{name}: in nats"


@by_name({name: value for name, value in PUBLIC.items() if inspect.isclass(value)})
def test_the_kl_of_a_layer_has_a_unit(name: str) -> None:
    method = getattr(PUBLIC[name], "kl_loss", None)
    assert method is None or re.search(r"\bnats\b", method.__doc__), f"{name}.kl_loss: in nats"


@by_name(SOURCES)
def test_algorithms_name_their_source(name: str) -> None:
    assert SOURCES[name] in document(PUBLIC[name]), f"{name}: the paper, {SOURCES[name]}"


@by_name({name: value for name, value in PUBLIC.items() if inspect.isclass(value)})
def test_methods_and_properties_are_documented(name: str) -> None:
    for kind in PUBLIC[name].__mro__:
        if not kind.__module__.startswith("fastbconv"):
            continue
        for member, value in vars(kind).items():
            plain = inspect.isfunction(value) or isinstance(value, (property, classmethod))
            if plain and not member.startswith("_"):
                doc = inspect.getdoc(getattr(kind, member))
                assert doc, f"{kind.__qualname__}.{member}: a docstring"


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_a_docstring(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_a_gap_is_seen() -> None:
    def function(first: int, second: int) -> int:
        """Something.

        Args:
            first: as in ``kl_loss``.
        """
        if first < 0:
            raise ValueError
        if second < 0:
            raise TypeError(f"second: {second}")
        return first

    assert argument_names(function) == {"first", "model", "n_data", "beta"}
    assert set(sections(document(function))) == {"", "Args"}
    assert raised(function) == {"TypeError", "ValueError"}
    assert raised(PUBLIC["fastbconv.losses"]) == {"TypeError"}  # of a function that it calls
