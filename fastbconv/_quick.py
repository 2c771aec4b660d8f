"""The short way of a layer's call: one C++ function for what Python checks and passes on otherwise.

For a small layer the arguments cost more than the convolution. The short way serves the common call
(one draw, float parameters, a seed tensor or none, a KL against a normal prior of two numbers) and
computes what the long way does, bit for bit; ``csrc/bindings/layer_call.cpp`` checks that a call is
one. Everything else goes the long way: contexts that set means, seeds, draws or groups, estimators,
tracing, transforms, parametrized parameters, and what does not fit, whose errors are raised there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _arguments, _native, activations, kl, noise, ops, selection

_ONES, _ZEROS = (1, 1), (0, 0, 0, 0)  # of the axes that an image has more
_NO_PRIORS = (0.0, 1.0, 0.0, 1.0)
_NAMES = frozenset(("weight", "weight_rho", "bias", "bias_rho"))


@dataclass(frozen=True)
class Prepared:
    """The constant arguments of a layer, parsed.

    Attributes:
        key: what they were made from.
        call: the C++ function; None: this layer always goes the long way.
        has_kl: whether the function knows the KL.
    """

    key: tuple[Any, ...]
    call: Any
    has_kl: bool

    # A copy of a layer makes its own, whoever copies it: a parametrized layer's class has another
    # __getstate__ than ours.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def quick_call(
    layer: nn.Module, input: Tensor, seed: int | Tensor | None, geometry: tuple[Any, ...] | None
) -> Tensor | None:
    """The output of one pass, or None: this call goes the long way.

    Args:
        layer: a BayesLayer.
        input: of the call.
        seed: of the call.
        geometry: (stride, padding, dilation, groups) of a convolution of one or two dimensions
            with zeros around the image; None: a linear layer.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    context, parameters = layer._fb_context, layer._parameters
    if context is not None and not context.only_collects:
        return None
    if layer._means_by_itself or layer._samples_prior or isinstance(seed, int):
        return None
    if not parameters.keys() >= _NAMES or selection.CHOICE.name == "reference":
        return None  # a parametrized or pruned tensor is no parameter
    weight, bias = parameters["weight"], parameters["bias"]
    rho, bias_rho = parameters["weight_rho"], parameters["bias_rho"]
    activation = layer.activation
    if isinstance(activation, nn.Module):  # it may have changed: a slope, a hook
        activation = activations.resolve(activation)
    own = (activation, layer.estimator, layer._prior, weight.dtype, weight.shape)
    prepared, key = layer._prepared, own if geometry is None else geometry + own
    if prepared is None or prepared.key != key:
        prepared = layer._prepared = _prepare(layer, key, geometry, activation)
    with_kl = context is not None
    if prepared.call is None or (with_kl and not prepared.has_kl):
        return None
    output = prepared.call(
        input,
        weight,
        rho,
        bias,
        bias_rho,
        seed,
        with_kl,
        0 if seed is not None else noise.rank_offset(),
        selection.ALGORITHM_ID[selection.CHOICE.name],
        selection.CHOICE.keep_weight,
    )
    if output is None or not with_kl:
        return output
    context.record(output[1])
    return output[0]


def _prepare(
    layer: nn.Module,
    key: tuple[Any, ...],
    geometry: tuple[Any, ...] | None,
    activation: activations.ActivationLike,
) -> Prepared:
    """Parses the constant arguments of a layer."""
    resolved = activations.resolve(activation)
    plain = layer.estimator == "reparameterization" and resolved.fn is None
    prior = layer._prior
    numbers = isinstance(prior, kl.NormalPrior) and all(
        isinstance(part, float) for part in (prior.loc, prior.scale)
    )
    priors = (prior.loc, prior.scale) * 2 if numbers else _NO_PRIORS
    call = _native_call(layer.weight, geometry, resolved, priors) if plain else None
    return Prepared(key, call, numbers)


def quick_map(
    layer: nn.Module,
    input: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    resolved: activations.Resolved,
    priors: tuple[Any, Any] | None,
    geometry: tuple[Any, ...] | None,
    seed: Tensor,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The same for a layer of the TFP face, which has its arguments ready; None: the long way.

    Args:
        layer: where the function is kept.
        input: as the operators take it.
        weights: loc and rho of the weight and of the bias, likewise.
        resolved: the activation.
        priors: (loc, scale) of the weight and of the bias; None: no KL is wanted.
        geometry: as in ``quick_call``.
        seed: of the call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    weight, rho, bias, bias_rho = weights
    if rho is None or selection.CHOICE.name == "reference":
        return None
    numbers = _NO_PRIORS if priors is None else _numbers(priors, bias_rho is not None)
    key = (geometry, resolved.id, resolved.param, weight.dtype, weight.shape, numbers)
    prepared = layer._prepared
    if prepared is None or prepared.key != key:
        call = None if numbers is None else _native_call(weight, geometry, resolved, numbers)
        prepared = layer._prepared = Prepared(key, call, True)
    if prepared.call is None:
        return None
    algorithm = selection.ALGORITHM_ID[selection.CHOICE.name]
    choice = (algorithm, selection.CHOICE.keep_weight)
    return prepared.call(input, weight, rho, bias, bias_rho, seed, priors is not None, 0, *choice)


def _numbers(priors: tuple[Any, Any], has_bias: bool) -> tuple[float, ...] | None:
    """loc and scale of weight and bias, where these are numbers."""
    weight, bias = priors if has_bias else (priors[0], priors[0])
    found = None if weight is None or bias is None else (*weight, *bias)
    return found if found and all(isinstance(part, float) for part in found) else None


def _native_call(
    weight: Tensor,
    geometry: tuple[Any, ...] | None,
    resolved: activations.Resolved,
    priors: tuple[float, ...],
) -> Any:
    """The C++ function; None where there is none for this."""
    stride, padding, dilation, groups = geometry or ((), (), (), 1)
    rank = len(stride)
    pads = _fixed_padding(padding, tuple(weight.shape[2:]), stride, dilation) if geometry else ()
    if pads is None or not ops.available():
        return None
    return _native.load().LayerCall(
        prior=priors,
        scale_floor=kl.default_scale_floor(weight.dtype),
        stride=(*_ONES[rank:], *stride),
        padding=(*_ZEROS[2 * rank :], *pads),
        dilation=(*_ONES[rank:], *dilation),
        groups=groups,
        activation=resolved.id,
        activation_param=resolved.param,
        rank=rank,
        cuda=ops.cuda(),
    )


def _fixed_padding(
    padding: Any, filter: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Before and after each axis; None where they depend on the image ('same' with a stride)."""
    form = _arguments.padding_form(padding, len(stride))
    if form == "same" and any(step != 1 for step in stride):
        return None
    return _arguments.resolve_padding(form, filter, filter, stride, dilation)
