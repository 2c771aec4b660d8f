"""Configurations of the TFP face: JSON-safe descriptions of layers, functions included.

A function is written as a name: of a built-in (with its arguments), of a registered function, or
``module:qualified_name``. A lambda has no name and is refused with the way out, or kept by
reference. ``from_config`` looks modules up among those already imported: a configuration cannot
import code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from fastbconv import activations, constraints, initializers, regularizers

from . import tfp_arguments as arguments
from . import tfp_distributions as distributions
from .tfp_distributions import LocScaleFn, MeanFieldNormalFn

FUNCTION_NAMES: Final = tuple(
    f"{part}_{kind}"
    for part in ("kernel", "bias")
    for kind in ("posterior_fn", "posterior_tensor_fn", "prior_fn", "divergence_fn")
)
_BUILT_IN: Final[dict[str, Callable[..., Any]]] = {
    function.__name__: function
    for function in (
        distributions.default_multivariate_normal_fn,
        distributions.posterior_sample,
        distributions.posterior_mean,
        distributions.kl_divergence,
    )
}
_FACTORIES: Final[dict[type, Callable[..., Any]]] = {
    MeanFieldNormalFn: distributions.default_mean_field_normal_fn,
    LocScaleFn: distributions.default_loc_scale_fn,
}
_TORCH_MODULES: Final = ("torch", "torch.nn.functional", "torch.special")
_REGISTERED: Final[dict[str, Callable[..., Any]]] = {}


class NamedActivation:
    """An activation given by name, with Keras's constants; callable like any other."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, z: Tensor) -> Tensor:
        resolved = activations.resolve(self.name, face="keras")
        return (
            activations.apply(resolved.id, z, resolved.param)
            if resolved.fn is None
            else (resolved.fn(z))
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedActivation) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return repr(self.name)


def register_function(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function under a name that configurations use; a decorator.

    Args:
        name: by which ``get_config`` writes the function and ``from_config`` finds it.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        ValueError: the name is taken by another function.

    Example:
        >>> import torch
        >>> @register_function("my_package.unit_laplace_prior")
        ... def unit_laplace_prior(dtype, shape, name, trainable, add_variable_fn):
        ...     return torch.distributions.Laplace(torch.zeros(shape, dtype=dtype), 1.0)
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if _REGISTERED.get(name, function) is not function:
            raise ValueError(f"name: expected a name not yet registered, got {name!r}")
        _REGISTERED[name] = function
        return function

    return register


# --- functions ------------------------------------------------------------------------------------


def serialize_function(argument: str, function: Any, by_reference: bool) -> tuple[Any, str | None]:
    """(value, type) of a function in a configuration."""
    if function is None:
        return None, None
    if type(function) in _FACTORIES:
        factory = _FACTORIES[type(function)].__name__
        config = _serialize_fields(argument, function, by_reference)
        return {"name": factory, "arguments": config}, "builtin"
    for name, built_in in _BUILT_IN.items():
        if function is built_in:
            return name, "builtin"
    for name, registered in _REGISTERED.items():
        if function is registered:
            return name, "registered"
    path = importable_name(function)
    if path is not None:
        return path, "module"
    if by_reference:
        return function, "reference"
    raise ValueError(
        f"{argument}: expected a function that a configuration can name, got {function!r}; define "
        "it with def at the top of a module, register it with "
        "fastbconv.layers.tfp.register_function('name'), or, within one process, clone with "
        "copy.deepcopy(layer) or get_config(by_reference=True)"
    )


def deserialize_function(argument: str, value: Any, kind: Any) -> Any:
    """The function that (value, type) of a configuration means."""
    if value is None or callable(value):
        return value
    if kind == "builtin":
        if isinstance(value, str) and value in _BUILT_IN:
            return _BUILT_IN[value]
        for factory in _FACTORIES.values():
            if isinstance(value, dict) and value.get("name") == factory.__name__:
                return factory(**_deserialize_fields(value.get("arguments", {})))
        raise ValueError(f"{argument}: expected the name of a built-in function, got {value!r}")
    if kind == "registered":
        if value not in _REGISTERED:
            raise ValueError(
                f"{argument}: expected a registered function, got {value!r}; import the module "
                "that registers it first"
            )
        return _REGISTERED[value]
    if kind == "module":
        return import_by_name(argument, value)
    raise TypeError(
        f"{argument}_type: expected 'builtin', 'registered', 'module' or 'reference', got {kind!r}"
    )


def _serialize_fields(argument: str, function: LocScaleFn, by_reference: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"is_singular": function.is_singular}
    for suffix in ("loc", "untransformed_scale"):
        for field in ("initializer", "regularizer", "constraint"):
            name = f"{suffix}_{field}"
            value = getattr(function, name)
            config[name] = _serialize_object(value)
            if config[name] is None and value is not None:
                named, kind = serialize_function(f"{argument}, {name}", value, by_reference)
                config[name] = {"function": named, "function_type": kind}
    return config


def _serialize_object(value: Any) -> dict[str, Any] | None:
    """The configuration of a built-in initialiser, regulariser or constraint, else None."""
    for kinds in (initializers, constraints):
        if type(value) in kinds.CLASSES:
            return kinds.serialize(value)
    return regularizers.serialize(value) if isinstance(value, regularizers.L1L2) else None


def _deserialize_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The functions among the arguments of a factory; it takes configurations as they are."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and "function" in value:
            value = deserialize_function(name, value["function"], value["function_type"])
        fields[name] = value
    return fields


def importable_name(function: Any) -> str | None:
    """``module:qualified_name`` where that leads back to this very object, else None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    paths = [f"{module}:{name}"]
    # PyTorch's built-in functions do not know their module.
    paths += [f"{place}:{getattr(function, '__name__', '')}" for place in _TORCH_MODULES]
    for path in paths:
        try:
            if import_by_name("function", path) is function:
                return path
        except ValueError:
            continue
    return None


def import_by_name(argument: str, path: Any) -> Any:
    """The object of ``module:qualified_name``, in a module that is imported already."""
    module_name, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    found: Any = sys.modules.get(module_name)
    for part in name.split(".") if name else ():
        found = getattr(found, part, None)
    if not name or not callable(found):
        raise ValueError(
            f"{argument}: expected 'module:name' of a function in an imported module, got "
            f"{path!r}; import {module_name or 'its module'} first"
        )
    return found


def serialize_activation(activation: Any, by_reference: bool) -> Any:
    """An activation's Keras name where it has one, else its importable name."""
    if isinstance(activation, NamedActivation):
        return activation.name
    resolved = activations.resolve(activation, face="keras")
    name = resolved.name
    if name is not None and resolved.fn is None:
        named = activations.resolve(name, face="keras")
        if (named.id, named.param) == (resolved.id, resolved.param):
            return name
    value, _ = serialize_function("activation", activation, by_reference)
    return value


def serialize_regularizer(regularizer: Any, by_reference: bool) -> Any:
    """A dictionary for a built-in regulariser, an importable name for a function."""
    if regularizer is None or isinstance(regularizer, regularizers.L1L2):
        return _serialize_object(regularizer)
    value, _ = serialize_function("activity_regularizer", regularizer, by_reference)
    return value


def _named_callable(argument: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value in _REGISTERED:
        return _REGISTERED[value]
    return import_by_name(argument, value) if ":" in value else value


class Configurable(nn.Module):
    """``get_config`` and ``from_config``."""

    _config_arguments: tuple[str, ...] = ()

    def get_config(self, *, by_reference: bool = False) -> dict[str, Any]:
        """The arguments of the constructor as a JSON-serialisable dictionary, without weights.

        Args:
            by_reference: keep functions without a name (lambdas) as they are, for cloning within
                one process; the result is then not JSON.

        Raises:
            ValueError: a function has no name that another process could find.
        """
        config: dict[str, Any] = {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": arguments.dtype_name(self.dtype),
        }
        if self._batch_input_shape is not None:
            config["batch_input_shape"] = self._batch_input_shape
        config.update({key: getattr(self, key) for key in self._config_arguments})
        config["activation"] = serialize_activation(self.activation, by_reference)
        config["activity_regularizer"] = serialize_regularizer(
            self.activity_regularizer, by_reference
        )
        for key in FUNCTION_NAMES:
            value, kind = serialize_function(key, getattr(self, key), by_reference)
            config[key], config[f"{key}_type"] = value, kind
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The layer that ``get_config`` described, without its weights. ``config`` is not changed.

        Raises:
            KeyError: a function is missing from the configuration.
            TypeError: a function's type, or an argument, is unknown.
            ValueError: a function cannot be found.
        """
        options = dict(config)
        for key in FUNCTION_NAMES:
            kind = options.pop(f"{key}_type")
            options[key] = deserialize_function(key, options[key], kind)
        for key in ("activation", "activity_regularizer"):
            options[key] = _named_callable(key, options.get(key))
        return cls(**options)
