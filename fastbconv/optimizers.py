"""What an optimiser does to posteriors: groups of parameters for one, and a check of one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import _arguments
from .models import bayesian_layers


def param_groups(
    model: nn.Module, lr: float, rho_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: posterior parameters are never decayed.

    Decay is a second prior beside the one in the KL, and draws every rho to 0, a scale of 0.69:
    ``check_optimizer`` finds it. Nor is a prior that is trained decayed. Everything else is decayed
    as asked: deterministic layers, normalisation, the biases of Bayesian layers that have no scale
    (``bayesian_bias=False``) and so no KL, and parameters of their activations.

    Args:
        model: any module.
        lr: learning rate.
        rho_lr: learning rate of the untransformed scales; None: ``lr``.
        weight_decay: decay of the other parameters.

    Returns:
        Up to three groups, each with a ``name``: "posterior" (means, and trained priors), "rho",
        "other".

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from fastbconv import BayesLinear
        >>> [group["name"] for group in param_groups(BayesLinear(2, 2), lr=1e-3)]
        ['posterior', 'rho', 'other']
    """
    posterior: list[nn.Parameter] = []
    rho: list[nn.Parameter] = []
    seen: set[int] = set()
    for name, parameter in _posteriors(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            scale = name.endswith(("rho", "untransformed_scale"))
            (rho if scale else posterior).append(parameter)
    other = [parameter for parameter in model.parameters() if id(parameter) not in seen]
    groups = [
        {"name": "posterior", "params": posterior, "lr": lr, "weight_decay": 0.0},
        {"name": "rho", "params": rho, "lr": lr if rho_lr is None else rho_lr, "weight_decay": 0.0},
        {"name": "other", "params": other, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Warns of posterior parameters that an optimiser decays or does not hold.

    Decay draws rho to 0, so every scale to softplus(0) = 0.69, whatever the data say; that of a
    mean is a second prior. AdamW decays by default. An optimiser made before ``convert`` holds no
    rho at all. What is a posterior parameter, ``param_groups`` says. Nothing calls this by itself:
    call it once, before training.

    Args:
        optimizer: any.
        model: whose posterior parameters are looked for.

    Returns:
        The names of the parameters that are wrong in the optimiser, as in
        ``model.named_parameters()``.

    Raises:
        TypeError: not an optimiser, or no module.

    Warns:
        UserWarning: names them, and what to do.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model = BayesLinear(2, 2)
        >>> check_optimizer(torch.optim.AdamW(param_groups(model, 1e-3, weight_decay=0.1)), model)
        []
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    posterior = {id(parameter) for _, parameter in _posteriors(model)}
    decay = {
        id(parameter): group.get("weight_decay", 0.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    own = {n: p for n, p in model.named_parameters() if id(p) in posterior and p.requires_grad}
    decayed = [name for name, p in own.items() if decay.get(id(p), 0.0) != 0.0]
    missing = [name for name, p in own.items() if id(p) not in decay]
    advice = "make it from fastbconv.param_groups(model, lr, weight_decay=...)"
    kind = type(optimizer).__name__
    if decayed:
        warnings.warn(
            f"weight_decay: {kind} decays parameters of posteriors, of which a rho tends to 0, a "
            f"scale of 0.69: {_arguments.listed(decayed)}; {advice}",
            stacklevel=2,
        )
    if missing:
        warnings.warn(
            f"params: {kind} does not hold parameters of posteriors, which keep their values: "
            f"{_arguments.listed(missing)}; {advice}, after any conversion",
            stacklevel=2,
        )
    return [name for name in own if name in (*decayed, *missing)]


def _posteriors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name in its layer, and parameter, of what has a term in the KL. Of a layer of the user's own,
    which has only the mark of a Bayesian layer, that is all."""
    for layer in bayesian_layers(model):
        is_ordinary = getattr(layer, "_is_ordinary", lambda name: False)
        for name, parameter in layer.named_parameters():
            plain = _plain(name)
            if not is_ordinary(plain):
                yield plain, parameter


def _plain(name: str) -> str:
    """The name of a parameter before parametrizations and pruning gave it another."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "parametrizations" else name.removesuffix("_orig")
