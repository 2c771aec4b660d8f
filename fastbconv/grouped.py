"""``grouped``: the weights of a whole model drawn together, a few launches instead of one a layer.

Note [Groups]. A group is drawn when one of its layers is called: that layer, and those after it in
the order of ``model.modules()``, up to ``max_weights``. One autograd node makes its weights and its
KL; it keeps the parameters and 16 bytes of seed for each. Its backward is one pass too, which runs
when the gradients of all weights of the group are there. Backward comes to the layers in
reverse order, so that the group called last is finished first, while the others are still at work:
with DDP, whose buckets fill in that order, communication goes on beside the computation as long as
there are several groups.

Note [Rounds]. Layer l draws from derive(seed, l), whichever group it falls into. A seed that
``fixed_sample`` or ``grouped(seed=)`` gives stays for the whole block. Otherwise the first call
draws one, and the next pass over the model another: a round ends when the layer that began it is
called again, others having run in between. Weights that a round has drawn for layers it did not
reach (a model that leaves out layers, an exception) are dropped with it. They are dropped as well
when backward has been at their node, which keeps nothing afterwards, and when their parameters have
changed. A layer that runs twice in one round draws for itself the second time. So does every layer
under torch.compile, torch.func, activation checkpointing (which would find the weights used up when
it repeats a call) and FSDP2 (whose parameters are there only while their layer runs), and one that
runs on another CUDA stream than the round: nobody has made that stream wait for the draw, and a
captured graph must not read what was drawn before it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _arguments, _call, noise
from .contexts import Entry, LayerContext, Sampled, in_checkpoint, installed
from .layers._base import _rank_seed
from .models import bayesian_layers, seeds_of_layers


@contextmanager
def grouped(
    model: nn.Module, *, seed: int | Tensor | None = None, max_weights: int = 8_000_000
) -> Iterator[None]:
    """Draws the weights of all Bayesian layers together, in groups, and their gradients likewise.

    The results are those of ``fixed_sample``: of the layers called one by one with
    ``seed=noise.derive(seed, l)`` and one draw of the weights for all rows. What
    changes is the number of launches: on a GPU two for each group, forward and backward together,
    instead of two for each layer. A CPU has nothing to gain from it.

    A block holds one training step, or any number of them: each pass over the model draws anew,
    unless a seed is given here or by ``fixed_sample``. Nests with ``collect_kl`` (the KL then comes
    from the same launch), ``fixed_sample`` and ``mean_weights``, in any order. A layer draws for
    itself where the group cannot serve it: several draws in one call
    (``num_samples``), Flipout and local reparameterisation (without a seed, a weight or noise for
    every row as ever), a prior without a closed form, distributions of one's own, bfloat16 or
    float16 parameters, another compute dtype than the group's. A call with ``seed=`` or
    ``generator=`` is left alone.

    Args:
        model: any module.
        seed: int or int64 tensor (2,): as in ``fixed_sample``; None draws one for each pass.
        max_weights: weights in one group. Gradients of a group appear together, and its weights are
            held, in the compute dtype, until they are used.

    Raises:
        ValueError: ``max_weights`` is not positive.
        TypeError: ``model`` is no module, or an argument of another type.

    Example:
        >>> from fastbconv import BayesLinear, collect_kl
        >>> model = torch.nn.Sequential(BayesLinear(3, 4), BayesLinear(4, 2))
        >>> with grouped(model), collect_kl(model) as kl:
        ...     loss = model(torch.ones(1, 3)).sum() + kl.sum()
        >>> loss.backward()
    """
    _arguments.integer("max_weights", max_weights, 1)
    layers = bayesian_layers(model)
    group = _Group(layers, max_weights)
    given = [{}] * len(layers) if seed is None else seeds_of_layers(layers, seed)
    try:
        with installed(layers, [{**own, "group": group} for own in given]):
            yield
    finally:
        group.forget()


@dataclass(frozen=True)
class _Held:
    """Weights that wait for the call of their layer, and what they were made of."""

    sampled: Sampled
    given: Tensor | None
    sources: tuple[Tensor | None, ...]
    versions: tuple[tuple[int, bool], ...]
    with_graph: bool

    def fit(self, layer: nn.Module, input: Tensor, given: Tensor | None) -> bool:
        """Whether this call would have drawn the very same."""
        weight = self.sampled.weight
        if weight.dtype != _arguments.compute_dtype(input) or weight.device != input.device:
            return False
        if weight.is_inference() and torch.is_grad_enabled():
            return False
        if self.given is not given or not _identical(self.sources, _sources(layer)):
            return False
        if self.versions != _versions(self.sources):
            return False
        trained = any(source is not None and source.requires_grad for source in self.sources)
        return self.with_graph or not trained or not torch.is_grad_enabled()


@dataclass
class _Round:
    """One pass over the model: its seed, the layers called so far, the weights not yet used."""

    opener: int
    called: set[int] = field(default_factory=set)
    held: dict[int, _Held] = field(default_factory=dict)
    seed: Tensor | None = None
    children: dict[torch.device, Sequence[Tensor]] = field(default_factory=dict)
    streams: dict[torch.device, object] = field(default_factory=dict)

    def ends(self, position: int) -> bool:
        """Whether a call of this layer begins another pass."""
        return position == self.opener and (not self.held or len(self.called) > 1)


class _Group:
    """The groups of one ``grouped`` block."""

    def __init__(self, layers: list[nn.Module], max_weights: int) -> None:
        self.layers = layers
        self.positions = {layer: position for position, layer in enumerate(layers)}
        self.max_weights = max_weights
        self.forget()

    def forget(self) -> None:
        """Drops the weights that nobody used."""
        self.rounds = threading.local()  # threads pass through the model each by itself

    def take(
        self, layer: nn.Module, input: Tensor, seed: Tensor | None, whole: bool
    ) -> Sampled | Tensor | None:
        """What this call of the layer uses; see ``contexts.Group``."""
        position = self.positions.get(layer)
        if position is None:  # a replica of a layer
            return seed
        if torch._C._are_functorch_transforms_active() or in_checkpoint():
            return seed
        current: _Round | None = getattr(self.rounds, "current", None)
        if current is None or current.ends(position):
            current = self.rounds.current = _Round(position)
        stream = _stream(input.device)
        if current.streams.setdefault(input.device, stream) != stream:
            return seed
        if position in current.called:
            return seed
        if whole and position not in current.held:
            self._draw(current, position, input)
        current.called.add(position)
        held = current.held.pop(position, None)
        if held is None or not whole or not held.fit(layer, input, seed):
            return seed
        return held.sampled

    def _child(self, current: _Round, position: int, device: torch.device) -> Tensor:
        """The seed of one layer, of the round's own."""
        if device not in current.children:
            with torch.inference_mode(False):  # a later group of this round may record a graph
                if current.seed is None:
                    current.seed = _rank_seed(None, device)
                children = noise.derive_range(current.seed.to(device), 0, len(self.layers))
                current.children[device] = children.unbind()
        return current.children[device][position]

    def _draw(self, current: _Round, position: int, input: Tensor) -> None:
        """Fills ``current.held`` with the group that begins with one layer."""
        members: list[_Member] = []
        total = 0
        for other in range(position, len(self.layers)):
            if other in current.called or other in current.held:
                continue
            member = self._member(current, other, input)
            if member is None or (members and member.kind != members[0].kind):
                if other == position:
                    return
                continue
            total += sum(entry.loc.numel() for entry in member.entries)
            if members and total > self.max_weights:
                break
            members.append(member)
        drawn, node = _drawn(members, _arguments.compute_dtype(input))
        current.held.update(drawn)
        if node is not None:
            _drop_after_backward(node, current)

    def _member(self, current: _Round, position: int, input: Tensor) -> _Member | None:
        """What the group draws for a layer; None where the layer draws for itself."""
        layer = self.layers[position]
        context: LayerContext | None = layer._fb_context
        if context is None or context.group is not self or context.mode == "mean":
            return None
        sources = _sources(layer)
        # A hook or a parametrisation may put other values there just before the call.
        if layer._forward_pre_hooks or "parametrizations" in layer._modules:
            return None
        if any(s is not None and type(s) not in (Tensor, nn.Parameter) for s in sources):
            return None  # lazy or sharded
        entries = layer._group_entries(context.wants_kl)
        if not entries:
            return None
        loc = entries[0].loc
        wide = loc.dtype == torch.float64
        fits = loc.dtype in (torch.float32, torch.float64) and loc.device == input.device
        if not fits or wide != (_arguments.compute_dtype(input) == torch.float64):
            return None
        kind = (loc.device, loc.dtype, entries[0].scale_floor)
        if any((e.loc.device, e.loc.dtype, e.scale_floor) != kind for e in entries):
            return None
        given = context.seed if context.mode == "seed" else None
        seed = self._child(current, position, loc.device) if given is None else given
        return _Member(position, entries, seed, given, sources, kind)


@dataclass(frozen=True)
class _Member:
    """One layer of a group."""

    position: int
    entries: list[Entry]
    seed: Tensor
    given: Tensor | None
    sources: tuple[Tensor | None, ...]
    kind: tuple[Any, ...]


def _drop_after_backward(node: torch.autograd.graph.Node, current: _Round) -> None:
    """What the node has made and nobody used cannot be used any more once it has run."""
    weak = weakref.ref(current)  # the round holds tensors, they the node, and the node the hook

    def drop(*gradients: object) -> None:
        alive = weak()
        if alive is not None:
            alive.held.clear()

    node.register_hook(drop)


def _stream(device: torch.device) -> object:
    """What the work of this moment is queued on."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _sources(layer: nn.Module) -> tuple[Tensor | None, ...]:
    return (*layer._parameters.values(), *layer._buffers.values())


def _versions(sources: Sequence[Tensor | None]) -> tuple[tuple[int, bool], ...]:
    """How often each was changed in place (fused optimisers do not count), and whether it is
    trained."""
    given = (source for source in sources if source is not None)
    return tuple((0 if s.is_inference() else s._version, s.requires_grad) for s in given)


def _identical(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(lambda a, b: a is b, left, right))


def _drawn(
    members: list[_Member], dtype: torch.dtype
) -> tuple[dict[int, _Held], torch.autograd.graph.Node | None]:
    """Draws one group: layer position -> weights, and the node that made them."""
    entries = [entry for member in members for entry in member.entries]
    seeds = torch.stack([member.seed for member in members for _ in member.entries])
    priors = [_call.split_prior(e.prior, e.loc, f"{e.part} prior") for e in entries]
    samples, kl = _call.backend(seeds).sample_posterior_list(
        [entry.loc for entry in entries],
        [entry.rho for entry in entries],
        seeds,
        [loc for _, (loc, _) in priors],
        [scale for _, (_, scale) in priors],
        prior=[number for numbers, _ in priors for number in numbers],
        with_kl=[entry.prior is not None for entry in entries],
        scale_floor=entries[0].scale_floor,
        stream=[noise.STREAMS["bias" if e.part == "bias" else "weight"] for e in entries],
        offset_add=0,
        element_offset=[0] * len(entries),
        cast=[entry.part != "bias" for entry in entries],
        dtype=dtype,
    )
    node = samples[0].grad_fn or kl.grad_fn
    # A frozen layer's convolution then forms no gradient by its weight.
    samples = [
        sample if entry.loc.requires_grad or entry.rho.requires_grad else sample.detach()
        for sample, entry in zip(samples, entries, strict=True)
    ]
    terms = kl.unbind() if any(entry.prior is not None for entry in entries) else ()
    held, first = {}, 0
    for member in members:
        rows = range(first, first + len(member.entries))
        first += len(member.entries)
        closed = [row for row in rows if entries[row].prior is not None]
        total = terms[closed[0]] if closed else None
        for row in closed[1:]:
            total = total + terms[row]
        sampled = Sampled(
            samples[rows[0]],
            samples[rows[1]] if len(rows) > 1 else None,
            total,
            member.seed,
            tuple(entries[row].part for row in closed),
        )
        held[member.position] = _Held(
            sampled,
            member.given,
            member.sources,
            _versions(member.sources),
            torch.is_grad_enabled(),
        )
    return held, node
