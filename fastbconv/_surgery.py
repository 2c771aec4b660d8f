"""What changes a layer into its counterpart shares: the pairs, the names of modules, selectors.

Note [Same object]. A layer is changed by its class, as ``torch.nn.utils.parametrize`` and FSDP2 do
it: the module stays the object that it is, and with it hooks, parameters, flags, names, their
order, and every reference to it, registered or not. Nothing is copied, so nothing can be lost.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from .layers._base import BayesLayer
from .layers.conv import BayesConv1d, BayesConv2d, BayesConv3d
from .layers.conv_transpose import BayesConvTranspose2d
from .layers.linear import BayesLinear

# torch.nn -> counterpart with the same positional arguments and attributes.
PAIRS: Final[dict[type[nn.Module], type[BayesLayer]]] = {
    nn.Conv1d: BayesConv1d,
    nn.Conv2d: BayesConv2d,
    nn.Conv3d: BayesConv3d,
    nn.ConvTranspose2d: BayesConvTranspose2d,
    nn.Linear: BayesLinear,
}
COUNTERPART: Final[dict[type[nn.Module], type[nn.Module]]] = {b: t for t, b in PAIRS.items()}

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selectors = Selector | Sequence[Selector] | None
Module = TypeVar("Module", bound=nn.Module)


def check_model(model: Any) -> None:
    """Raises where layers cannot be changed.

    Raises:
        TypeError: no module.
        ValueError: wrapped for data parallel training, where parameters are known already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "model: expected the module inside, got DistributedDataParallel, whose gradient "
            "buckets are made; use model.module, and wrap the result"
        )


def subject(model: nn.Module, inplace: bool) -> nn.Module:
    """``model`` itself, or a copy of it.

    Raises:
        ValueError: a model that cannot be copied.
    """
    if inplace:
        return model
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # a module that holds computed tensors
        raise ValueError(
            f"model: expected one that copy.deepcopy copies; inplace=True needs no copy: {error}"
        ) from error


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module once, in the order of ``model.modules()``, with all its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def bayesian_by_name(model: nn.Module) -> dict[str, Any]:
    """Each Bayesian layer once, by its first name, in the order of ``model.modules()``.

    Raises:
        ValueError: a layer without values yet.
    """
    found = {
        names[0]: module
        for module, names in names_of(model).items()
        if getattr(module, "is_bayesian", False)
    }
    for name, layer in found.items():
        check_initialised(name, layer)
    return found


def check_initialised(name: str, module: nn.Module) -> None:
    """Raises where a parameter of the module itself has no shape yet."""
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise ValueError(
            f"model: expected initialised parameters, got {shown(name)} ({type(module).__name__}) "
            "before its first call; call fastbconv.build(model, input_shape) first"
        )


def ancestors(name: str) -> list[str]:
    """The names of the modules around a name, from the model ("") to the name itself."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]


def shown(name: str) -> str:
    """A module's name in messages."""
    return repr(name) if name else "the model itself"


def twin(kind: type[Module], like: nn.Module, **options: Any) -> Module:
    """A layer of class ``kind`` with the arguments that ``like`` has, on the meta device.

    Its constructor checks them, and its attributes are what such a layer has.
    """
    arguments = {
        name: getattr(like, name)
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY and name not in ("bias", "device", "dtype")
    }
    arguments["bias"] = like.bias is not None
    return kind(**arguments, **options, device="meta", dtype=like.weight.dtype)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are neither parameters, buffers, modules nor hooks."""
    return {name: value for name, value in vars(module).items() if name not in _BARE}


_BARE: Final = frozenset(vars(nn.Module()))


class Selection:
    """Which modules of a model ``include`` and ``exclude`` ask for.

    Args:
        model: whose modules are meant.
        include: None is all.
        exclude: None is none.

    Raises:
        TypeError: a selector of another kind.
        ValueError: a name pattern that no module has.
    """

    def __init__(self, model: nn.Module, include: Selectors, exclude: Selectors) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._include = self._checked("include", include)
        self._exclude = self._checked("exclude", exclude)

    def has(self, names: Sequence[str]) -> bool:
        """Whether a module with these names is asked for: by one of them, and excluded by none."""
        included = self._include is None or self._any(self._include, names)
        return included and not (self._exclude and self._any(self._exclude, names))

    def _any(self, selectors: Sequence[Selector], names: Sequence[str]) -> bool:
        return any(self._matches(selector, name) for selector in selectors for name in names)

    def _matches(self, selector: Selector, name: str) -> bool:
        """A pattern or a class stands for a module and for everything inside it."""
        if isinstance(selector, str):
            return any(fnmatchcase(outer, selector) for outer in ancestors(name))
        if isinstance(selector, type):
            return any(isinstance(self._modules[outer], selector) for outer in ancestors(name))
        return bool(selector(name, self._modules[name]))

    def _checked(self, argument: str, selectors: Selectors) -> Sequence[Selector] | None:
        if selectors is None:
            return None
        single = isinstance(selectors, str) or not isinstance(selectors, Sequence)
        listed: Sequence[Any] = (selectors,) if single else selectors
        for selector in listed:
            is_class = isinstance(selector, type) and issubclass(selector, nn.Module)
            is_function = callable(selector) and not isinstance(selector, type | nn.Module)
            if not (isinstance(selector, str) or is_class or is_function):
                raise TypeError(
                    f"{argument}: expected name patterns, module classes or functions of (name, "
                    f"module), got {selector!r}"
                )
            if isinstance(selector, str) and not any(
                fnmatchcase(name, selector) for name in self._modules
            ):
                raise ValueError(
                    f"{argument}: expected the name of a module or a pattern of names, got "
                    f"{selector!r}, which none has; model.named_modules() lists them"
                )
        return listed
