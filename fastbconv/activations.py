"""The one Python list of activations: name, native number, PyTorch function.

The numbers are those of ``csrc/core/activation.h``. What is in the list runs in the kernel's
epilogue; any other callable runs after the operator. Names have the constants of
``torch.nn.functional`` on the torch face and those of Keras on the TFP face, where two names
differ: ``leaky_relu`` (slope 0.01 and 0.2) and ``hard_sigmoid`` (z/6 + 1/2 and 0.2 z + 1/2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ActivationLike", "Face", "Resolved", "names", "resolve"]

Face = Literal["torch", "keras"]
"""Whose constants a name has: those of torch.nn.functional or those of Keras."""


@dataclass(frozen=True)
class Activation:
    """One fused activation: ``function(z, param)`` is its definition.

    ``param`` is the slope of leaky_relu and the alpha of elu, and unused otherwise.
    """

    id: int
    name: str
    function: Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Resolved:
    """What the operators and layers need of an activation: a fused number, or a callable.

    Attributes:
        id: the native number; 0 (linear) where ``fn`` is to run after the operator.
        param: slope or alpha.
        fn: None where the activation is fused.
        name: how a user would write it; None for a callable of the user's own.

    Example:
        >>> Resolved(id=1, param=0.0, fn=None, name="relu") == resolve("relu")
        True
    """

    id: int
    param: float
    fn: Callable[[Tensor], Tensor] | None
    name: str | None


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)) without overflow and without F.softplus's switch to z above 20."""
    return torch.logaddexp(z, torch.zeros_like(z))


FUSED: Final[tuple[Activation, ...]] = (
    Activation(0, "linear", lambda z, param: z),
    Activation(1, "relu", lambda z, param: F.relu(z)),
    Activation(2, "relu6", lambda z, param: F.relu6(z)),
    Activation(3, "leaky_relu", lambda z, param: F.leaky_relu(z, param)),
    Activation(4, "elu", lambda z, param: F.elu(z, param)),
    Activation(5, "selu", lambda z, param: F.selu(z)),
    Activation(6, "sigmoid", lambda z, param: torch.sigmoid(z)),
    Activation(7, "tanh", lambda z, param: torch.tanh(z)),
    Activation(8, "softplus", lambda z, param: softplus(z)),
    Activation(9, "softsign", lambda z, param: F.softsign(z)),
    Activation(10, "exponential", lambda z, param: torch.exp(z)),
    Activation(11, "hard_sigmoid_keras", lambda z, param: F.hardtanh(0.2 * z + 0.5, 0.0, 1.0)),
    Activation(12, "hard_sigmoid", lambda z, param: F.hardsigmoid(z)),
    Activation(13, "silu", lambda z, param: F.silu(z)),
    Activation(14, "mish", lambda z, param: F.mish(z)),
    Activation(15, "gelu", lambda z, param: F.gelu(z)),
    Activation(16, "gelu_tanh", lambda z, param: F.gelu(z, approximate="tanh")),
)
_ID: Final[dict[str, int]] = {entry.name: entry.id for entry in FUSED}
_FIRST_FROM_PRE_ACTIVATION: Final = _ID["silu"]

_ALIASES: Final = {"swish": "silu", "hardsigmoid": "hard_sigmoid", "exp": "exponential"}
_DEFAULT_PARAM: Final[dict[Face, dict[str, float]]] = {
    "torch": {"leaky_relu": 0.01, "elu": 1.0},
    "keras": {"leaky_relu": 0.2, "elu": 1.0},
}
_NOT_FUSED: Final[dict[str, Callable[..., Tensor]]] = {
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
}

_FUNCTIONS: Final[dict[Callable[..., Tensor], str]] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.selu: "selu",
    torch.selu: "selu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.softplus: "softplus",
    F.softsign: "softsign",
    torch.exp: "exponential",
    F.hardsigmoid: "hard_sigmoid",
    F.silu: "silu",
    F.mish: "mish",
    F.gelu: "gelu",
}


def _module_entry(module: nn.Module) -> tuple[str, float] | None:
    """(name, param) of a torch.nn activation module that has a fused form, else None.

    The exact type counts, since a subclass may compute something else; so do hooks, which would
    not run.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    kind = type(module)
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)
    if kind is nn.ELU:
        return "elu", float(module.alpha)
    if kind is nn.GELU:
        return ("gelu" if module.approximate == "none" else "gelu_tanh"), 0.0
    if kind is nn.Softplus:
        return ("softplus", 0.0) if (module.beta, module.threshold) == (1, 20) else None
    name = _MODULES.get(kind)
    return None if name is None else (name, 0.0)


_MODULES: Final[dict[type[nn.Module], str]] = {
    nn.Identity: "linear",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SELU: "selu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.SiLU: "silu",
    nn.Mish: "mish",
}


def names(face: Face = "torch") -> tuple[str, ...]:
    """The names that ``resolve`` knows on a face.

    Args:
        face: "torch" or "keras".

    Returns:
        The names, sorted.

    Example:
        >>> "relu" in names()
        True
    """
    fused = [entry.name for entry in FUSED if entry.name != "hard_sigmoid_keras"]
    return tuple(sorted([*fused, *_ALIASES, *_NOT_FUSED]))


ActivationLike = str | Callable[[Tensor], Tensor] | Resolved | None
"""What ``activation=`` takes: a name, a function or a module, or None for the linear one."""


def resolve(
    activation: str | Callable[[Tensor], Tensor] | Resolved | None,
    face: Face = "torch",
    *,
    channel_dim: int = -1,
) -> Resolved:
    """Fused number, or callable to run after the operator.

    Args:
        activation: None (linear), a name, a function, a module, or the result of a former call.
        face: whose constants a name has.
        channel_dim: the dimension of "softmax" and "log_softmax".

    Returns:
        The resolved activation. ``F.relu``, ``torch.tanh``, ``nn.GELU()`` and their like are fused;
        a negative slope or alpha is not, since its derivative cannot be had from the output.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable, or the class of a module instead of one.

    Example:
        >>> resolve("relu").id
        1
    """
    if isinstance(activation, Resolved):
        return activation
    if activation is None:
        return _fused("linear", 0.0)
    if isinstance(activation, str):
        return _resolve_name(activation, face, channel_dim)
    if not callable(activation):
        raise TypeError(
            "activation: expected None, a name or a callable, got "
            f"{type(activation).__name__}: {activation!r}"
        )
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        raise TypeError(
            f"activation: expected a module, got the class {activation.__name__}, which makes one "
            f"of its argument; give an instance: {activation.__name__}()"
        )
    if isinstance(activation, nn.Module):
        entry = _module_entry(activation)
        if entry is not None and entry[1] >= 0.0:
            return _fused(*entry)
        return Resolved(0, 0.0, activation, None)
    name = _FUNCTIONS.get(activation) if _is_hashable(activation) else None
    if name is not None:
        return _fused(name, _DEFAULT_PARAM["torch"].get(name, 0.0))
    return Resolved(0, 0.0, activation, None)


def _resolve_name(text: str, face: Face, channel_dim: int) -> Resolved:
    name = _ALIASES.get(text, text)
    if name in _NOT_FUSED:
        function = _NOT_FUSED[name]
        return Resolved(0, 0.0, lambda output: function(output, dim=channel_dim), name)
    if face == "keras" and name == "hard_sigmoid":
        return Resolved(_ID["hard_sigmoid_keras"], 0.0, None, name)
    if name not in _ID or name == "hard_sigmoid_keras":
        raise ValueError(f"activation: expected one of {', '.join(names(face))}, got {text!r}")
    return _fused(name, _DEFAULT_PARAM[face].get(name, 0.0))


def _fused(name: str, param: float) -> Resolved:
    return Resolved(_ID[name], param, None, name)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def needs_pre_activation(activation_id: int) -> bool:
    """Whether backward needs the pre-activation; else the output is enough."""
    return activation_id >= _FIRST_FROM_PRE_ACTIVATION


def apply(activation_id: int, z: Tensor, param: float) -> Tensor:
    """The definition of a fused activation, in the dtype of ``z``."""
    return FUSED[activation_id].function(z, param)
