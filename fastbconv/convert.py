"""A deterministic model made Bayesian: every torch.nn layer that has a counterpart becomes it."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import _arguments, kl
from ._surgery import (
    PAIRS,
    Selection,
    Selectors,
    ancestors,
    check_initialised,
    check_model,
    names_of,
    plain_attributes,
    shown,
    subject,
    twin,
)
from .estimators import Estimator
from .layers._base import BayesLayer, EvalMode

Moments = Mapping[str, tuple[Tensor, Tensor]] | tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
Init = Literal["keep", "moped"] | Moments
PriorFactory = Callable[[str, nn.Module], kl.PriorLike]

# Layers whose weights their parent reads, in its fast path: as modules they would not be called.
_READ_BY_PARENT: Final = {nn.TransformerEncoderLayer: ("linear1", "linear2")}


@dataclass(frozen=True)
class _Step:
    """One layer to convert.

    Attributes:
        names: of the layer; the first one is that of ``model.modules()``.
        layer: of torch.nn.
        prior: of the new posterior.
        result: what the layer becomes, on the meta device.
    """

    names: list[str]
    layer: nn.Module
    prior: kl.PriorLike
    result: BayesLayer

    @property
    def parts(self) -> list[str]:
        """The parameters that get a posterior."""
        return ["weight"] if self.result.bias_rho is None else ["weight", "bias"]

    def parameters(self) -> Iterator[tuple[str, str]]:
        """(name in the model, part) of each of them, under each name of the layer."""
        for name in self.names:
            for part in self.parts:
                yield f"{name}.{part}" if name else part, part


def convert(
    model: nn.Module,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    prior: kl.PriorLike | PriorFactory = (0.0, 1.0),
    init: Init = "keep",
    delta: float = 0.1,
    bayesian_bias: bool = False,
    estimator: Estimator = "reparameterization",
    eval_mode: EvalMode = "sample",
    inplace: bool = False,
) -> nn.Module:
    r"""Gives the weights of torch.nn layers a posterior: Conv2d becomes BayesConv2d, ...

    .. code-block:: text

        keep     loc = w,  scale = 0.1 / sqrt(fan_in),  prior as given
        moped    loc = w,  scale = delta |w|,           prior N(w, s^2), s the scale of `prior`
        moments  loc and scale as given,                prior as given

    "moped" is Krishnan, Subedar and Tickoo 2020 (arXiv:1906.05323): posterior and prior around
    trained weights; the prior's means are buffers (``prior_loc``), so a state_dict brings them back
    into a model that was converted alike. A weight of exactly 0 gets the smallest scale, 2^-23
    (2^-52 in float64), and stays there.

    Each layer stays the same object under another class: arguments, parameters, dtype, device,
    memory format, ``training``, ``requires_grad`` (the scale follows its mean's), hooks, shared
    layers, names and their order are as they were. Where layers share a weight they share its rho;
    each draws for itself and each has its term in the KL. No noise is drawn.

    An optimiser made before an in-place conversion does not know the new rho: see check_optimizer.

    Args:
        model: any module; layers that are Bayesian already stay as they are.
        include: what to convert: name patterns (``"layer4.*"``; fnmatch), module classes, functions
            of (name, module), or a sequence of them. A name or a class stands for everything inside
            it too. None: everything.
        exclude: what to leave, likewise; it wins over ``include``.
        prior: as in BayesConv2d: floats, tensors, Parameters (one Parameter is shared by all
            layers), a ScaleMixture, a module; or a function of (name, layer) that returns one of
            these for each layer.
        init: "keep", "moped", or moments from elsewhere (SWAG, Laplace, IVON): parameter name ->
            (loc, scale), or a pair of mappings, of loc and of scale, where the names of the second
            decide. Parameters without moments are as with "keep".
        delta: relative scale of "moped".
        bayesian_bias: also give biases, where there are some, a posterior.
        estimator: as in BayesConv2d.
        eval_mode: as in BayesConv2d.
        inplace: change ``model``; False: a deep copy.

    Returns:
        The converted model: ``model`` itself with ``inplace``.

    Raises:
        TypeError: an argument of another type, or a dtype that Bayesian layers do not have.
        ValueError: nothing to convert; a lazy layer, or one whose weight is computed
            (parametrizations, pruning, weight_norm); a prior or moments that do not fit. The model
            is unchanged then.

    Warns:
        UserWarning: names the selected modules that keep matrices of weights without a posterior:
            kinds without counterpart (Embedding, LSTM, MultiheadAttention, ...), subclasses of
            torch.nn layers, which may compute something else, and, with that reason, layers whose
            ``forward`` was replaced or whose weights the TransformerEncoderLayer around them reads
            by itself (``linear1`` and ``linear2``, in its fast path).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> convert(net, exclude="3")
        Sequential(
          (0): BayesConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Flatten(start_dim=1, end_dim=-1)
          (3): Linear(in_features=288, out_features=10, bias=True)
        )
    """
    check_model(model)
    chosen, left = _choose(model, Selection(model, include, exclude))
    model = subject(model, inplace)
    options = {"estimator": estimator, "eval_mode": eval_mode}
    factory = _prior_factory(prior)
    steps = [
        _step(names, model.get_submodule(names[0]), factory, bayesian_bias, options)
        for names in chosen
    ]
    moments = _moments(init, delta, steps)
    rho: dict[int, nn.Parameter] = {}  # of each mean: layers that share one share the other
    for step in steps:
        _convert_layer(step, rho)
    _set_moments(steps, moments)
    if init == "moped":
        for step in steps:
            step.layer._center_prior()
    if left:
        warnings.warn(
            f"convert: weights without a posterior remain in {_arguments.listed(left)}; name "
            "them in exclude to silence this",
            stacklevel=2,
        )
    return model


# --- what is converted ----------------------------------------------------------------------------


def _choose(model: nn.Module, selection: Selection) -> tuple[list[list[str]], list[str]]:
    """The layers to convert, each by all its names, and what is left, in words."""
    chosen, left = [], []
    modules = dict(model.named_modules(remove_duplicate=False))
    for module, names in names_of(model).items():
        around = [modules[outer] for outer in ancestors(names[0])]
        if any(getattr(outer, "is_bayesian", False) for outer in around):
            continue
        if not selection.has(names):
            continue
        if isinstance(module, tuple(PAIRS)):
            _check_parameters(names[0], module)
        parent = around[-2] if len(around) > 1 else None
        reason = _not_called(module, names[0], parent)
        if type(module) in PAIRS and not reason:
            chosen.append(names)
        elif any(not is_lazy(p) and p.ndim > 1 for p in module.parameters(recurse=False)):
            left.append(f"{shown(names[0])} ({type(module).__name__}{reason})")
    if not chosen and not any(getattr(m, "is_bayesian", False) for m in model.modules()):
        kinds = ", ".join(kind.__name__ for kind in PAIRS)
        but = f", only {_arguments.listed(left)}" if left else ""
        raise ValueError(
            f"model: expected a layer to convert ({kinds}) among the selected modules, got none"
            f"{but}; include and exclude select, and neither subclasses nor other kinds are "
            "converted"
        )
    return chosen, left


def _not_called(module: nn.Module, name: str, parent: nn.Module | None) -> str:
    """Why the layer's own forward is not what computes with its weight; empty where it is."""
    if "forward" in vars(module):
        return ", whose forward was replaced"
    for kind, children in _READ_BY_PARENT.items():
        if isinstance(parent, kind) and name.rpartition(".")[2] in children:
            return f", whose weight the {kind.__name__} around it reads by itself in its fast path"
    return ""


def _check_parameters(name: str, module: nn.Module) -> None:
    """Raises where weight or bias are no parameters with values."""
    check_initialised(name, module)
    computed = [part for part in ("weight", "bias") if part not in module._parameters]
    if computed or parametrize.is_parametrized(module):
        verb = "is" if len(computed) == 1 else "are"
        raise ValueError(
            f"model: expected parameters, got {shown(name)} ({type(module).__name__}), whose "
            f"{' and '.join(computed) or 'tensors'} {verb} computed from others; make them "
            "permanent (torch.nn.utils.parametrize.remove_parametrizations, prune.remove, "
            "remove_weight_norm, remove_spectral_norm) or name the layer in exclude"
        )


# --- one layer ------------------------------------------------------------------------------------


def _prior_factory(prior: kl.PriorLike | PriorFactory) -> PriorFactory:
    if isinstance(prior, nn.Module) or not callable(prior):
        return lambda name, layer: prior
    try:
        inspect.signature(prior).bind("", nn.Identity())
    except TypeError as error:
        raise TypeError(
            f"prior: expected a function of (name, layer) that returns a prior, got {prior!r}; one "
            "that returns a distribution goes inside: prior=lambda name, layer: function"
        ) from error
    return prior


def _step(
    names: list[str],
    layer: nn.Module,
    factory: PriorFactory,
    bayesian_bias: bool,
    options: dict[str, Any],
) -> _Step:
    prior = factory(names[0], layer)
    bayesian_bias = bayesian_bias and layer.bias is not None
    try:
        result = twin(
            PAIRS[type(layer)], layer, prior=prior, bayesian_bias=bayesian_bias, **options
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (converting {shown(names[0])})") from error
    return _Step(names, layer, prior, result)


def _convert_layer(step: _Step, rho: dict[int, nn.Parameter]) -> None:
    """See Note [Same object]: another class, the attributes it adds, and the scales."""
    layer, result = step.layer, step.result
    layer.__class__ = type(result)
    for name, value in plain_attributes(result).items():
        vars(layer).setdefault(name, value)
    layer._init_posterior(step.prior, result.bias_rho is not None)
    for part in step.parts:
        loc = getattr(layer, part)
        own = getattr(layer, f"{part}_rho").requires_grad_(loc.requires_grad)
        setattr(layer, f"{part}_rho", rho.setdefault(id(loc), own))


# --- first values ---------------------------------------------------------------------------------


def _moments(init: Init, delta: float, steps: Sequence[_Step]) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter name -> (loc, scale), checked; empty for "keep"."""
    means = {name: getattr(step.layer, part) for step in steps for name, part in step.parameters()}
    if isinstance(init, str):
        if init == "keep":
            return {}
        if init != "moped":
            raise ValueError(f"init: expected 'keep', 'moped' or moments, got {init!r}")
        _check_moped(delta, steps)
        return {name: (mean.detach(), delta * mean.detach().abs()) for name, mean in means.items()}
    moments = _named_moments(init)
    for name, (loc, scale) in moments.items():
        if name not in means:
            raise ValueError(
                "init: expected names of parameters that get a posterior "
                f"({_arguments.listed(list(means))}), got {name!r}; leave others "
                "out, and ask for biases by bayesian_bias=True"
            )
        _check_moment(f"init loc of {name!r}", loc, means[name])
        _check_moment(f"init scale of {name!r}", scale, means[name])
        if not scale.is_meta and not bool((scale > 0).all()):
            raise ValueError(
                f"init scale of {name!r}: expected positive values, got {scale.min().item()}; it "
                "is a standard deviation, not a variance or a precision"
            )
    return moments


def _named_moments(init: Moments) -> dict[str, tuple[Tensor, Tensor]]:
    if isinstance(init, Mapping):
        for name, value in init.items():
            if not isinstance(value, Sequence) or len(value) != 2:
                raise TypeError(
                    f"init: expected (loc, scale) for {name!r}, got {type(value).__name__}"
                )
        return {name: (value[0], value[1]) for name, value in init.items()}
    if not isinstance(init, Sequence) or [isinstance(m, Mapping) for m in init] != [True, True]:
        raise TypeError(
            "init: expected 'keep', 'moped', a mapping of names to (loc, scale), or two mappings "
            f"(loc, scale), got {type(init).__name__}"
        )
    locs, scales = init
    missing = [name for name in scales if name not in locs]
    if missing:
        raise ValueError(
            f"init: expected a loc for each scale, got none for {_arguments.listed(missing)}"
        )
    return {name: (locs[name], scale) for name, scale in scales.items()}


def _check_moment(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {given}")
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(value.shape)}")
    if not value.is_meta and not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got infinite or undefined ones")


def _check_moped(delta: float, steps: Sequence[_Step]) -> None:
    if not isinstance(delta, numbers.Real) or isinstance(delta, bool):
        raise TypeError(f"delta: expected a number, got {type(delta).__name__}")
    if not 0.0 < delta < math.inf:
        raise ValueError(f"delta: expected a positive finite number, got {delta}")
    for step in steps:
        prior = kl.resolve_prior(step.prior)
        centred = isinstance(prior, kl.NormalPrior) and not isinstance(prior.loc, Tensor)
        if not centred or prior.loc != 0.0:
            raise ValueError(
                f"prior: expected (0.0, scale) with init='moped', whose means are the weights, got "
                f"{step.prior!r} for {shown(step.names[0])}"
            )


def _set_moments(steps: Sequence[_Step], moments: dict[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for step in steps:
            for name, part in step.parameters():
                if name in moments:
                    loc, scale = moments[name]
                    mean, rho = getattr(step.layer, part), getattr(step.layer, f"{part}_rho")
                    floor = kl.default_scale_floor(rho.dtype)
                    mean.copy_(loc)
                    rho.copy_(kl.rho_of_scale(scale.to(rho.device), floor))
