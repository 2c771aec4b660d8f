"""``weight_samples``: many functions of one model in one pass.

Note [Where rows are repeated]. The pass has n groups of rows, one for each draw, so that somewhere
the N rows of the input become n * N. What lies before that place runs once. By default it is the
input of the model, which is right for every model that treats rows alike. Inside ``nn.Sequential``
the order of calls is known, and the place moves on to the first child that holds a Bayesian layer:
a deterministic part before it runs once on N rows, and a Bayesian layer there reads its input once,
with ``share_input``. It does not move to a module that the model holds twice. In a ``forward`` of
one's own nobody can tell whether a tensor has been repeated already (a skip connection may bring
the N rows of the input to the n * N of a layer), so that the place stays in front of it.

Note [A copy belongs to no block]. Hooks do what a block asks for, and deepcopy copies the hooks of
a module with it: the layers of a copy know no block, and neither may its hooks, which repeat one
row once, that is do nothing. So copied and pickled hooks forget n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _arguments
from .contexts import LayerContext, installed
from .models import bayesian_layers


@contextmanager
def weight_samples(model: nn.Module, n: int) -> Iterator[None]:
    """Every call of a Bayesian layer inside uses n weight draws: (N, ...) becomes (n * N, ...).

    .. code-block:: text

        output[s * N + i] = f_s(input[i])      s < n: function s, from draw s of every layer

    The output is sample-major: ``output.unflatten(0, (n, -1))`` has one row of functions. The model
    is called with its N rows as ever. They are repeated before it or, inside of ``nn.Sequential``,
    before the first child that holds a Bayesian layer: a call of that module by itself, inside the
    block, repeats its rows too. Any other module of the model that is called by itself, a child of
    that module as well, takes its rows as n equal consecutive groups. All draws are shared weight
    draws, whatever the estimator of a layer; means (``mean_weights``, ``eval_mode='mean'``) stay
    means. Each call draws n functions anew, unless a seed is given, which is that of a
    ``fixed_sample``: in ``fixed_sample(model, seed)`` draw s is that of
    ``fixed_sample(model, seed, sample=s)``.

    A model that mixes rows (rows on another axis, as in ``nn.LSTM`` without ``batch_first``; halves
    of a batch), or gives a layer something else than its rows, mixes the draws, which nothing here
    finds out; ``predict`` does. Nests with ``fixed_sample``, ``collect_kl`` and ``mean_weights``,
    in any order. A compiled model is called inside the block as any other, and is compiled again
    for every other n; the block stays outside of compiled functions.
    With activation checkpointing ``backward()`` belongs into the block, as with ``fixed_sample``.

    Args:
        model: any module that treats the rows (the first dimension) of its input alike.
        n: number of weight draws.

    Raises:
        TypeError: ``model`` is no module, or ``n`` no integer.
        ValueError: ``n`` is not positive; a block inside another one of the same layers; and, when
            the model is called, normalisation by statistics of the batch (batch norm in training
            mode, or without running statistics), which would mix the functions.

    Example:
        >>> from fastbconv import BayesLinear
        >>> model = nn.Sequential(BayesLinear(3, 4), nn.ReLU(), BayesLinear(4, 2))
        >>> with weight_samples(model, 8):
        ...     y = model(torch.ones(5, 3))
        >>> tuple(y.unflatten(0, (8, 5)).shape)
        (8, 5, 2)
    """
    n = _arguments.integer("n", n, 1)
    layers = bayesian_layers(model)
    entry = _entry(model)
    settings = [{"num_samples": n, "share_input": layer is entry} for layer in layers]
    with ExitStack() as stack, installed(layers, settings, outside_any_other):
        if n > 1:
            stack.enter_context(model.register_forward_pre_hook(_RefuseBatchStatistics(n)))
        if n > 1 and not any(layer is entry for layer in layers):
            repeat = _Repeat(n)
            stack.enter_context(entry.register_forward_pre_hook(repeat, with_kwargs=True))
        yield


def _num_samples(layer: nn.Module) -> int | None:
    context: LayerContext | None = getattr(layer, "_fb_context", None)
    return None if context is None else context.num_samples


def outside_any_other(layers: Sequence[nn.Module]) -> None:
    """Refuses layers that are inside a block already."""
    if any(_num_samples(layer) is not None for layer in layers):
        raise ValueError(
            "model: expected layers outside any other weight_samples block, got some inside one; "
            "multiply the numbers of draws in one block instead"
        )


def _entry(model: nn.Module) -> nn.Module:
    """The module before which the rows are repeated; see Note [Where rows are repeated]."""
    every = [module for _, module in model.named_modules(remove_duplicate=False)]
    entry = model
    while type(entry) is nn.Sequential:
        first = next((child for child in entry if bayesian_layers(child)), None)
        if first is None or sum(module is first for module in every) > 1:
            break
        entry = first
    return entry


@dataclass(frozen=True)
class _Hook:
    """What a block does before a call; see Note [A copy belongs to no block]."""

    n: int

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (1,)


class _Repeat(_Hook):
    """Hands a module n copies of its rows, one after the other."""

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeats every tensor that has the rows of the first one."""
        if self.n == 1:
            return None
        given = (arguments, keywords)
        tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
        batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim), None)
        return tree_map_only(Tensor, lambda value: self._repeated(value, batch), given)

    def _repeated(self, value: Tensor, batch: int | None) -> Tensor:
        if not value.ndim or value.shape[0] != batch:
            return value
        return torch.cat([value] * self.n)  # keeps the memory format, which repeat() does not


class _RefuseBatchStatistics(_Hook):
    """Raises where the statistics of a batch would mix the functions."""

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Looks for batch norm that reads them."""
        if self.n == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                kind = "in training mode" if module.training else "without running statistics"
                raise ValueError(
                    f"model: expected batch norm with running statistics, got {name!r} {kind}: "
                    "the statistics of a batch would mix the functions; call model.eval(), or the "
                    "model once for each draw"
                )
