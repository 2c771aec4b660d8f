"""A Bayesian model made deterministic: torch.nn layers with the posterior means."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Final

from torch import nn

from . import activations
from ._surgery import (
    COUNTERPART,
    bayesian_by_name,
    check_model,
    plain_attributes,
    shown,
    subject,
    twin,
)
from .layers._base import BayesLayer

# What a Bayesian layer has registered beside the parameters of its counterpart.
_ADDED: Final = (
    "weight_rho",
    "bias_rho",
    "prior_loc",
    "prior_scale",
    "prior_module",
    "bias_prior_loc",
)

# Fused activation -> module, from its slope or alpha.
_MODULES: Final[dict[str, Callable[[float], nn.Module]]] = {
    "relu": lambda param: nn.ReLU(),
    "relu6": lambda param: nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": lambda param: nn.SELU(),
    "sigmoid": lambda param: nn.Sigmoid(),
    "tanh": lambda param: nn.Tanh(),
    "softplus": lambda param: nn.Softplus(),
    "softsign": lambda param: nn.Softsign(),
    "hard_sigmoid": lambda param: nn.Hardsigmoid(),
    "silu": lambda param: nn.SiLU(),
    "mish": lambda param: nn.Mish(),
    "gelu": lambda param: nn.GELU(),
    "gelu_tanh": lambda param: nn.GELU("tanh"),
}


def to_deterministic(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    r"""The inverse of ``convert``: torch.nn layers that compute with the posterior means.

    .. code-block:: text

        output = activation(conv2d(input, weight) + bias)

    Scales and priors are dropped. ``to_deterministic(convert(model))`` has the modules, outputs and
    state_dict of ``model``, bit for bit. As in ``convert``, layers stay the same objects.

    A layer with an activation becomes ``nn.Sequential(layer, activation)``, and that is the same
    object too: wherever it is referred to, in a list of your own say, the activation is applied.
    Its parameters are then called ``0.weight`` and ``0.bias``; its hooks, and attributes of your
    own, go with the layer inside, before the activation.

    Batch normalisation is folded into the result (``torch.nn.utils.fuse_conv_bn_eval``), and not
    before: of a Bayesian layer it would scale the means, and leave the noise as it was.

    Args:
        model: any module.
        inplace: change ``model``; False: a deep copy.

    Returns:
        The deterministic model: ``model`` itself with ``inplace``.

    Raises:
        TypeError: no module.
        ValueError: a layer that torch.nn cannot express: padding that is unequal, or 'same' with a
            stride; an activation that is a function of your own; a lazy layer. The model is
            unchanged then.
        NotImplementedError: a Bayesian layer without counterpart: those of the TFP face (NHWC), and
            subclasses.

    Example:
        >>> from fastbconv import BayesLinear
        >>> to_deterministic(nn.Sequential(BayesLinear(4, 2, activation="relu")))
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=4, out_features=2, bias=True)
            (1): ReLU()
          )
        )
    """
    check_model(model)
    model = subject(model, inplace)
    layers = {layer: name for name, layer in bayesian_by_name(model).items()}
    plain = {layer: _counterpart(name, layer) for layer, name in layers.items()}
    after = {layer: _activation(name, layer) for layer, name in layers.items()}
    for layer, counterpart in plain.items():
        _make_plain(layer, counterpart)
    for layer, activation in after.items():
        if activation is not None:
            _make_sequence(layer, activation)
    return model


def _counterpart(name: str, layer: nn.Module) -> nn.Module:
    """The torch.nn layer with the arguments of ``layer``, on the meta device."""
    if type(layer) not in COUNTERPART:
        raise NotImplementedError(
            f"model: expected Bayesian layers with a counterpart in torch.nn, got {shown(name)} "
            f"({type(layer).__name__}); inside fastbconv.mean_weights(model) it uses its means"
        )
    padding = getattr(layer, "padding", 0)
    if isinstance(padding, tuple) and not all(isinstance(side, int) for side in padding):
        raise ValueError(
            f"padding: expected equal sides, as torch.nn has them, got {padding} in {shown(name)}; "
            "pad by a torch.nn.ZeroPad module before the layer"
        )
    try:
        return twin(COUNTERPART[type(layer)], layer)
    except ValueError as error:
        raise ValueError(
            f"{error} (in torch.nn, for {shown(name)}); pad by a module before the layer"
        ) from error


def _activation(name: str, layer: BayesLayer) -> nn.Module | None:
    """The module of a layer's activation; None where it has none."""
    if isinstance(layer.activation, nn.Module):
        return layer.activation
    channel_dim = 1 - layer.weight.ndim  # with or without a batch
    resolved = activations.resolve(layer.activation, channel_dim=channel_dim)
    if resolved.name == "softmax":
        return nn.Softmax(channel_dim)
    if resolved.name == "log_softmax":
        return nn.LogSoftmax(channel_dim)
    fused = activations.FUSED[resolved.id].name
    if resolved.fn is None and fused == "linear":
        return None
    if resolved.fn is None and fused in _MODULES:
        return _MODULES[fused](resolved.param)
    raise ValueError(
        f"activation: expected one that torch.nn has a module for, got {layer.activation!r} in "
        f"{shown(name)}; give the layer a module, or none and apply the function after it"
    )


def _make_plain(layer: BayesLayer, counterpart: nn.Module) -> None:
    own = plain_attributes(twin(type(layer), layer)).keys()
    layer.__class__ = type(counterpart)
    for name in [*_ADDED, *(own - plain_attributes(counterpart).keys()), "activation"]:
        if hasattr(layer, name):
            delattr(layer, name)
    vars(layer).update(plain_attributes(counterpart))


def _make_sequence(layer: nn.Module, activation: nn.Module) -> None:
    """``layer`` becomes nn.Sequential(what it was, activation), and stays the object that it is.

    Only so do references that no module knows find the activation: Note [Same object]. What it was
    moves into a new module, with the very dicts of its hooks, whose handles go on removing them.
    """
    inner = type(layer).__new__(type(layer))
    inner.__dict__ = vars(layer)
    state = vars(nn.Sequential(inner, activation).train(inner.training))
    layer.__class__, layer.__dict__ = nn.Sequential, state
    if "_compiled_call_impl" in vars(inner):  # layer.compile(): it calls this object
        state["_compiled_call_impl"] = vars(inner).pop("_compiled_call_impl")
    for hook in inner._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(inner)
