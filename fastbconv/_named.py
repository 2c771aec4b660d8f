"""Small objects with a Keras name and a configuration, and how an argument means one of them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

# Keys of a dictionary of Keras 2 and 3; those after the second one say nothing here.
_KEYS = ("class_name", "config", "module", "registered_name", "build_config", "shared_object_id")
# Functions of torch.nn.init, without the underscore, and what to use instead.
_IN_PLACE = {
    "constant": "Constant(value)",
    "eye": "Identity()",
    "kaiming_normal": "HeNormal()",
    "kaiming_uniform": "HeUniform()",
    "normal": "RandomNormal(mean, stddev)",
    "ones": "Ones()",
    "orthogonal": "Orthogonal(gain)",
    "trunc_normal": "TruncatedNormal(mean, stddev)",
    "uniform": "RandomUniform(minval, maxval)",
    "xavier_normal": "GlorotNormal()",
    "xavier_uniform": "GlorotUniform()",
    "zeros": "Zeros()",
}


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
        _check_keys(name, identifier, _KEYS)
        return _from_config(name, found, config)
    if isinstance(identifier, type) and callable(identifier):
        return identifier()
    if callable(identifier):
        return identifier
    raise TypeError(
        f"{name}: expected None, a name, a configuration or a callable {form}, got "
        f"{type(identifier).__name__}"
    )


def refuse_in_place(name: str, function: Any) -> None:
    """Raises TypeError for a function of torch.nn.init, which fills a tensor and is given none."""
    function = getattr(function, "func", function)  # of a functools.partial
    if getattr(function, "__module__", None) != "torch.nn.init":
        return
    counterpart = _IN_PLACE.get(function.__name__.rstrip("_"))
    instead = "write a function that returns the tensor"
    if counterpart is not None:
        instead = f"take fastbconv.initializers.{counterpart}"
    raise TypeError(
        f"{name}: expected a callable f(shape, dtype) -> tensor, got "
        f"torch.nn.init.{function.__name__}, which fills a tensor in place, with the axes of "
        f"torch.nn; {instead}"
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


def _check_keys(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises TypeError for the first key of a dictionary that is not known."""
    for key in given:
        if key not in known:
            keys = ", ".join(map(repr, known)) or "none"
            raise TypeError(f"{name}: expected the keys {keys} alone, got {key!r}")


def _from_config(name: str, make: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    """What a class or function makes of a configuration; its messages begin with the argument."""
    name = f"{name}, {make.__name__}"
    _check_keys(name, config, inspect.signature(make).parameters)
    try:
        return make(**config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{name}: {error}") from error


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
