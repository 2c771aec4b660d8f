"""Whole models: KL, and contexts that set every Bayesian layer at once.

The contexts touch one plain attribute of each layer, and leave what others have put there, also
after an exception: they nest, and end in any order.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _arguments, noise
from ._surgery import bayesian_by_name
from .contexts import KlCollector, installed


def bayesian_layers(model: nn.Module) -> list[nn.Module]:
    """The Bayesian layers in the order of ``model.modules()``, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {model!r}; a list of modules becomes one by "
            "torch.nn.ModuleList, a class by calling it"
        )
    return [module for module in model.modules() if getattr(module, "is_bayesian", False)]


def kl_loss(model: nn.Module, n_data: float | None = None, beta: float = 1.0) -> Tensor:
    """beta * (sum of the KL of all layers) / n_data: what is added to the mean NLL of a batch.

    The KL is a sum over all weights, in nats. docs/elbo.md says what ``n_data`` is for losses of
    other forms.

    Args:
        model: any module; a layer that occurs twice counts once.
        n_data: number of training examples; None: not divided.
        beta: weight of the KL, 0 or more; only 1 gives the evidence lower bound.

    Returns:
        0-dim tensor, computed from the parameters at this call; zero without Bayesian layers.

    Raises:
        ValueError: ``n_data`` is not positive, ``beta`` is negative, or a layer has no values
            before its first call.
        TypeError: ``n_data`` or ``beta`` is no number, or ``model`` no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> kl_loss(BayesLinear(3, 2), n_data=100).ndim
        0
    """
    if n_data is not None and not isinstance(n_data, numbers.Real | Tensor):
        raise TypeError(f"n_data: expected a number of examples, got {n_data!r}")
    if n_data is not None and not n_data > 0:
        raise ValueError(f"n_data: expected a positive number of examples, got {n_data}")
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real | Tensor):
        raise TypeError(f"beta: expected a number, got {beta!r}")
    if not beta >= 0:
        raise ValueError(f"beta: expected a number of at least 0, got {beta}")
    terms = [layer.kl_loss() for layer in _initialised(model)]
    total = _sum(terms, model)
    if beta != 1.0:
        total = total * beta
    return total if n_data is None else total / n_data


def _initialised(model: nn.Module) -> list[nn.Module]:
    """The Bayesian layers, none of which waits for its first call."""
    layers = bayesian_layers(model)
    own = (parameter for layer in layers for parameter in layer._parameters.values())
    if any(_arguments.is_lazy(parameter) for parameter in own):
        bayesian_by_name(model)  # raises, and names it
    return layers


def losses(model: nn.Module) -> list[Tensor]:
    """The losses of all Bayesian layers as one flat list: KL, activity, regularisers.

    Args:
        model: any module.

    Returns:
        0-dim tensors, in the order of the layers; a KL is a sum in nats, divided by nothing.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model = nn.Sequential(BayesLinear(3, 2), BayesLinear(2, 2, prior=None))
        >>> len(losses(model))
        1
    """
    return [loss for layer in bayesian_layers(model) for loss in layer.losses]


def regularization_loss(model: nn.Module) -> Tensor:
    """Sum of the losses that are no KL (activity, variable regularisers), divided by nothing.

    Args:
        model: any module.

    Returns:
        0-dim tensor; zero where no layer has such a loss.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> regularization_loss(BayesLinear(3, 2))
        tensor(0.)
    """
    terms = [
        loss
        for layer in bayesian_layers(model)
        for loss in getattr(layer, "regularization_losses", ())
    ]
    return _sum(terms, model)


@contextmanager
def collect_kl(model: nn.Module) -> Iterator[KlCollector]:
    """Collects the KL that the fused forward passes inside compute anyway.

    Args:
        model: any module.

    Yields:
        A collector; ``sum()`` is the plain sum over layers in nats, attached to the graph. A layer
        that runs twice counts once. The terms are held by the collector, not by the modules.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model = BayesLinear(3, 2)
        >>> with collect_kl(model) as kl:
        ...     loss = model(torch.ones(1, 3)).sum()
        >>> bool(torch.isclose(kl.sum(), kl_loss(model)))
        True

    Warns:
        RuntimeWarning: a layer ran under ``checkpoint(use_reentrant=True)``, which gives the KL no
            gradient; or ``sum()`` is asked for where no layer has run, and is 0.
    """
    layers = bayesian_layers(model)
    hand_over = sum(hasattr(layer, "_fb_context") for layer in layers)
    collector = KlCollector(like=next(iter(model.parameters()), None), layers=hand_over)
    sinks = [{"sinks": ((collector, position),)} for position in range(len(layers))]
    with installed(layers, sinks):
        yield collector


@contextmanager
def fixed_sample(model: nn.Module, seed: int | Tensor, *, sample: int = 0) -> Iterator[None]:
    """Every call inside uses one function: layer l draws from ``noise.derive(seed, l)``.

    l is the position among the distinct Bayesian modules of ``model.modules()``. A layer that runs
    twice uses the same weights. Seeds given to a layer directly come first.

    Activation checkpointing runs layers again: ``backward()`` belongs into the block. Outside of it
    ``use_reentrant=False`` raises, and ``use_reentrant=True`` silently uses other weights.

    Args:
        model: any module.
        seed: int or int64 tensor (2,).
        sample: number of the draw, added to the offset of every layer's seed: function ``sample``
            of ``predict(model, x, seed=seed)`` and of ``weight_samples``.

    Raises:
        TypeError: ``model`` is no module, or ``seed`` neither an int nor an int64 tensor.
        ValueError: a seed of another shape, or of more than 64 bits; ``sample`` is negative.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model, x = BayesLinear(3, 2), torch.ones(1, 3)
        >>> with fixed_sample(model, seed=1):
        ...     torch.equal(model(x), model(x))
        True
    """
    layers = bayesian_layers(model)
    with installed(layers, seeds_of_layers(layers, seed, sample)):
        yield


def seeds_of_layers(
    layers: Sequence[nn.Module], seed: int | Tensor, sample: int = 0
) -> list[dict[str, Any]]:
    """Layer l's own seed as a context sets it: on the layer's device, so that no call moves it."""
    sample = _arguments.integer("sample", sample, 0)
    parents: dict[torch.device, Sequence[Tensor]] = {}
    settings: list[dict[str, Any]] = []
    for position, layer in enumerate(layers):
        device, _ = placement(layer)
        if device not in parents:
            parent = noise.seed_tensor(seed, device)
            children = noise.derive_range(parent, 0, len(layers))
            if sample:
                children[:, 1] += sample  # a number: nothing is copied from the host
            parents[device] = children.unbind()
        settings.append({"mode": "seed", "seed": parents[device][position]})
    return settings


@contextmanager
def mean_weights(model: nn.Module) -> Iterator[None]:
    """Every call inside uses the posterior means: no noise is drawn.

    With activation checkpointing ``backward()`` belongs into the block, as with ``fixed_sample``.

    Args:
        model: any module.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model, x = BayesLinear(3, 2), torch.ones(1, 3)
        >>> with mean_weights(model):
        ...     y = model(x)
        >>> bool(torch.isclose(y, x @ model.weight.T + model.bias).all())
        True
    """
    layers = bayesian_layers(model)
    with installed(layers, [{"mode": "mean", "seed": None}] * len(layers)):
        yield


def build(model: nn.Module, input_shape: Sequence[int | None]) -> nn.Module:
    """Materialises lazy layers by one pass over zeros, and returns the model.

    The pass leaves no trace: no noise is drawn, no gradient recorded, ``training`` flags and
    buffers of normalisation layers stay as they are. Only the first values of what is materialised
    come from PyTorch's generator: two models built one after the other start apart.

    Args:
        model: any module.
        input_shape: of the model's input, with the batch; None stands for 1.

    Returns:
        The model.

    Raises:
        ValueError: an entry that is negative.
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import DenseReparameterization
        >>> model = build(DenseReparameterization(2), (None, 3))
        >>> model.count_params()
        14
    """
    if any(size is not None and size < 0 for size in input_shape):
        raise ValueError(
            f"input_shape: expected non-negative sizes or None, got {tuple(input_shape)}"
        )
    own_build = getattr(model, "build", None)
    if getattr(model, "is_bayesian", False) and callable(own_build):
        own_build(tuple(input_shape))
        return model
    device, dtype = placement(model)
    image = torch.zeros([1 if size is None else size for size in input_shape], dtype=dtype)
    try:
        with eval_mode(model), torch.no_grad(), mean_weights(model):
            model(image.to(device))
    finally:
        for module in model.modules():
            if hasattr(module, "_forget_last_call"):
                module._forget_last_call()
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for the block; every module's own flag is put back after it."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter, lazy ones included."""
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _sum(terms: list[Tensor], model: nn.Module) -> Tensor:
    if not terms:
        device, _ = placement(model)
        return torch.zeros((), device=device)
    total = terms[0]
    for term in terms[1:]:
        total = total + (term if term.device == total.device else term.to(total.device))
    return total
