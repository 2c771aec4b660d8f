"""What is public: the names in ``__all__`` of the modules that the API reference has."""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import fastbconv as fb

MODULES = (
    "fastbconv",
    *(f"fastbconv.{name}" for name in fb.__all__ if isinstance(getattr(fb, name), ModuleType)),
    "fastbconv.estimators",
    "fastbconv.keras_weights",
)


def names(module: str) -> list[str]:
    """The public names of a module that are no modules themselves."""
    found = importlib.import_module(module)
    return [name for name in found.__all__ if not isinstance(getattr(found, name), ModuleType)]


def callables() -> dict[str, Any]:
    """Public functions and classes by their full name; protocols have no arguments."""
    return {
        f"{module}.{name}": value
        for module in MODULES
        for name in names(module)
        if inspect.isfunction(value := getattr(importlib.import_module(module), name))
        or (inspect.isclass(value) and not getattr(value, "_is_protocol", False))
    }


def sections(docstring: str) -> dict[str, str]:
    """Title -> text of the indented sections of a docstring; "" is what comes before them."""
    found = {"": ""}
    title = ""
    for line in inspect.cleandoc(docstring).splitlines():
        heading = re.fullmatch(r"([A-Z][a-z]+):", line)
        if heading:
            title = heading[1]
            found[title] = ""
        else:
            if line and not line[0].isspace():
                title = ""
            found[title] += f"{line}\n"
    return found
