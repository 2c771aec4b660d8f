"""What a whole-model context tells one layer.

A layer reads it from the plain attribute ``_fb_context`` (None outside any context), so that a
compiled forward pass guards on it instead of reading a thread-local. The attribute is no part of
the layer's state: deepcopy, pickle and state_dict leave it out.

Note [Frames]. Every context that is entered adds one frame to each layer, under a token of its own,
and takes that frame away again, wherever it then lies: contexts may end in any order. What a layer
reads is the frames merged from the outermost to the innermost. Adding and taking away happen under
a lock; the contexts themselves belong to the model, not to a thread. A frame with the setting
``apart`` hides the collectors of the frames outside of it: what runs inside is no training step.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .kl import NormalPrior

_LOCK = threading.Lock()
_CHECKPOINT = torch.utils.checkpoint.__name__
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__


@dataclass
class KlCollector:
    """The KL terms of the forward passes inside one ``collect_kl``: the last one of each layer.

    Attributes:
        terms: layer position -> KL of its last pass, attached to the graph.
        like: the dtype and device of a sum without terms.
        layers: how many layers of the model hand their KL over.
    """

    terms: dict[int, Tensor] = field(default_factory=dict)
    like: Tensor | None = None
    layers: int = 0

    def __repr__(self) -> str:
        total = float(self.sum().detach()) if self.terms else 0.0
        return f"KlCollector({len(self.terms)} layers, sum {total:.6g} nats)"

    def sum(self) -> Tensor:
        """The plain sum, in nats: a layer that ran twice counts once. 0-dim."""
        if not self.terms:
            if self.layers and not torch.compiler.is_compiling():
                warnings.warn(
                    f"collect_kl: expected the model to be called inside the block, but none of "
                    f"its {self.layers} Bayesian layers was: this KL is 0. Call it there, or use "
                    "fastbconv.kl_loss(model)",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if self.like is None:
                return torch.zeros(())
            if is_lazy(self.like):  # has no new_zeros, and is materialised later in place
                return torch.zeros((), dtype=self.like.dtype, device=self.like.device)
            return self.like.new_zeros(())
        values = list(self.terms.values())
        if len({(value.device, value.dtype) for value in values}) == 1:
            return torch.stack(values).sum()  # two launches for any number of layers
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


@dataclass(frozen=True)
class Entry:
    """One posterior of a layer, as a group draws it.

    Attributes:
        loc: posterior mean, shaped like the operators' weight (K, C, *taps) or (K,).
        rho: untransformed scale, like ``loc``.
        part: what the layer calls it: "weight", "kernel" or "bias".
        prior: with a closed form; None: the group has no KL of this part.
        scale_floor: added to softplus(rho).
    """

    loc: Tensor
    rho: Tensor
    part: Literal["weight", "kernel", "bias"]
    prior: NormalPrior | None
    scale_floor: float


@dataclass(frozen=True)
class Sampled:
    """The weights that a group has drawn for one call of a layer.

    Attributes:
        weight: in the compute dtype, shaped like the layer's weight as the operators see it.
        bias: a drawn bias in the parameter's dtype; None: the layer's own bias is used.
        kl: KL of ``kl_parts``, 0-dim; None where there are none.
        seed: int64 (2,), that the weights can be made again from.
        kl_parts: the parts with a closed prior, where a KL was asked for.
    """

    weight: Tensor
    bias: Tensor | None
    kl: Tensor | None
    seed: Tensor
    kl_parts: tuple[str, ...]


class Group(Protocol):
    """Draws the weights of many layers at once: see ``fastbconv.grouped``."""

    def take(
        self, layer: nn.Module, input: Tensor, seed: Tensor | None, whole: bool
    ) -> Sampled | Tensor | None:
        """What this call of the layer uses: weights drawn before, a seed, or nothing.

        Args:
            layer: a layer of the model.
            input: of the call.
            seed: given by another context, or None.
            whole: False where the call has a form that weights drawn before cannot serve.
        """


@dataclass(frozen=True)
class LayerContext:
    """The settings of one layer: its frames, merged.

    Attributes:
        mode: "mean" (no noise), "seed" (noise of ``seed``), or None (the layer's own way).
        seed: int64 (2,), this layer's own child seed, in mode "seed".
        sinks: collectors that receive the KL, each with the layer's position in its model.
        group: draws the weights of this layer together with those of others.
        num_samples: weight draws of a call; None: what the call itself says.
        share_input: every draw reads all rows of the input; with ``num_samples``.
        calls: the positions of the layers called so far, and the position of this layer.
        frames: what the contexts in force have set, (token, settings), outermost first.
    """

    mode: Literal["mean", "seed"] | None = None
    seed: Tensor | None = None
    sinks: tuple[tuple[KlCollector, int], ...] = ()
    group: Group | None = None
    num_samples: int | None = None
    share_input: bool = False
    calls: tuple[set[int], int] | None = None
    frames: tuple[tuple[object, dict[str, Any]], ...] = ()

    @property
    def only_collects(self) -> bool:
        """Whether a call draws as it would outside of any context."""
        return self.mode is None and self.group is None and self.num_samples is None

    @property
    def wants_kl(self) -> bool:
        """Whether a collector waits for the KL of this pass."""
        return len(self.sinks) > 0

    def note_call(self) -> None:
        """Notes that the layer takes part in the pass; compiled passes change nothing of theirs."""
        if not torch.compiler.is_compiling() and self.calls is not None:
            called, position = self.calls
            called.add(position)

    def record(self, kl: Tensor) -> None:
        """Hands the KL of a forward pass to every collector."""
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and in_checkpoint():
            warnings.warn(
                "collect_kl: activation checkpointing with use_reentrant=True runs layers without "
                "a graph, so this KL has no gradient; use use_reentrant=False, or "
                "fastbconv.kl_loss(model)",
                RuntimeWarning,
                stacklevel=2,
            )
        for collector, position in self.sinks:
            collector.terms[position] = kl

    def bind(self, output: Tensor) -> Tensor:
        """``output``, so that a checkpoint repeats this call under these settings or not at all."""
        self.note_call()
        if (self.mode is None and self.num_samples is None) or torch.compiler.is_compiling():
            return output
        if torch._C._are_functorch_transforms_active() or not in_checkpoint():
            return output
        seed = self.seed if self.mode == "seed" else None
        return _Bound.apply(
            output, output.new_zeros(2, dtype=torch.int64) if seed is None else seed
        )


def _merged(frames: tuple[tuple[object, dict[str, Any]], ...]) -> LayerContext | None:
    if not frames:
        return None
    merged: dict[str, Any] = {}
    sinks: tuple[tuple[KlCollector, int], ...] = ()
    for _, settings in frames:
        merged.update(settings)
        sinks = (*(() if settings.get("apart") else sinks), *settings.get("sinks", ()))
    merged.pop("apart", None)
    return LayerContext(**{**merged, "sinks": sinks, "frames": frames})


class _Token:
    """Whose a frame is."""


def _lock() -> AbstractContextManager[Any]:
    """A traced function runs once, whatever the threads, and the compiler knows no locks."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


@contextmanager
def installed(
    layers: Sequence[nn.Module],
    settings: Sequence[dict[str, Any]],
    check: Callable[[Sequence[nn.Module]], None] | None = None,
) -> Iterator[None]:
    """Adds one frame to each layer, and takes those frames away at the end, and no others.

    Args:
        layers: of one model.
        settings: of each layer.
        check: raises where the layers may not have another frame; nobody adds one meanwhile.
    """
    token = _Token()
    with _lock():
        if check is not None:
            check(layers)
        for layer, own in zip(layers, settings, strict=True):
            layer._fb_context = _merged((*_frames(layer), (token, own)))
    try:
        yield
    finally:
        with _lock():
            for layer in layers:
                frames = _frames(layer)
                layer._fb_context = _merged(tuple(f for f in frames if f[0] is not token))


def _frames(layer: nn.Module) -> tuple[tuple[object, dict[str, Any]], ...]:
    context: LayerContext | None = getattr(layer, "_fb_context", None)
    return () if context is None else context.frames


def in_checkpoint() -> bool:
    """Whether this call is part of activation checkpointing: its first run, or its repetition.

    A repetition runs inside a backward pass. The first run shows by the hooks that checkpointing
    has set on saved tensors or, in its reentrant form, by nothing but the functions being called.
    """
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None and torch.is_grad_enabled():
        return False
    if hooks is not None and getattr(hooks[0], "__module__", None) == _CHECKPOINT:
        return True
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT_FILE:
            return True
        frame = frame.f_back
    return False


class _Bound(torch.autograd.Function):
    """The identity, with the mark of a context among what is saved for backward.

    Checkpointing compares what the first run and its repetition save. A repetition after the end of
    the context would draw other weights; without the mark among its tensors it is an error.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.saved_tensors  # noqa: B018  the comparison happens here
        return grad, None
