"""Small objects with a Keras name and a configuration, and how an argument means one of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


class Named:
    """An object that is its class and its attributes: those are its configuration."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, by name, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).items()))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def resolve(
    identifier: Any, name: str, classes: Sequence[type], aliases: Mapping[str, type], form: str
) -> Any:
    """The callable that an argument means.

    Args:
        identifier: None, a name, ``{"class_name": ..., "config": {...}}``, a class or a callable.
        name: name of the argument, for messages.
        classes: what has a name: that of the class, in either spelling and any case.
        aliases: further names, in small letters.
        form: what a callable has to be, for messages.

    Raises:
        ValueError: an unknown name, a dictionary of another form, or a bad value in it.
        TypeError: none of the accepted types, or an unknown or bad argument in a dictionary.
        NotImplementedError: an argument in a dictionary that has no counterpart.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str):
        return _class_of(identifier, name, classes, aliases)()
    if isinstance(identifier, Mapping):
        kind, config = identifier.get("class_name"), identifier.get("config", {})
        if not isinstance(kind, str) or not isinstance(config, Mapping):
            raise ValueError(
                f"{name}: expected a configuration {{'class_name': name, 'config': dictionary}}, "
                f"got {identifier!r}"
            )
        found = _class_of(kind, name, classes, aliases)
        try:
            return found(**config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{name}, {found.__name__}: {error}") from error
    if isinstance(identifier, type) and callable(identifier):
        return identifier()
    if callable(identifier):
        return identifier
    raise TypeError(
        f"{name}: expected None, a name, a configuration or a callable {form}, got "
        f"{type(identifier).__name__}"
    )


def serialize(value: Any) -> dict[str, Any]:
    """The JSON-safe description that ``resolve`` reads, with the class names of Keras."""
    return {"class_name": type(value).__name__, "config": value.get_config()}


def number(name: str, value: object, least: float = -math.inf) -> float:
    """A finite number, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return float(value)


def _class_of(
    given: str, name: str, classes: Sequence[type], aliases: Mapping[str, type]
) -> type[Any]:
    known = {kind.__name__.lower(): kind for kind in classes} | dict(aliases)
    found = known.get(given.replace("_", "").lower())
    if found is None:
        snake = (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower() for kind in classes)
        names = ", ".join(repr(one) for one in sorted(snake))
        raise ValueError(f"{name}: expected one of {names}, got {given!r}")
    return found
