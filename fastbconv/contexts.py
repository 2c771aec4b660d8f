"""What a whole-model context tells one layer.

A layer reads it from the plain attribute ``_fb_context`` (None outside any context), so that a
compiled forward pass guards on it instead of reading a thread-local. The attribute is no part of
the layer's state: deepcopy, pickle and state_dict leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass
class KlCollector:
    """The KL terms of the forward passes inside one ``collect_kl``: the last one of each layer.

    Attributes:
        terms: layer position -> KL of its last pass, attached to the graph.
        like: the dtype and device of a sum without terms.
    """

    terms: dict[int, Tensor] = field(default_factory=dict)
    like: Tensor | None = None

    def sum(self) -> Tensor:
        """The plain sum, in nats: a layer that ran twice counts once. 0-dim."""
        if not self.terms:
            return torch.zeros(()) if self.like is None else self.like.new_zeros(())
        values = list(self.terms.values())
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


@dataclass(frozen=True)
class LayerContext:
    """The settings of one layer; contexts that nest are merged by ``dataclasses.replace``.

    Attributes:
        mode: "mean" (no noise), "seed" (noise of ``seed``), or None (the layer's own way).
        seed: int64 (2,), this layer's own child seed, in mode "seed".
        sinks: collectors that receive the KL, each with the layer's position in its model.
    """

    mode: Literal["mean", "seed"] | None = None
    seed: Tensor | None = None
    sinks: tuple[tuple[KlCollector, int], ...] = ()

    @property
    def wants_kl(self) -> bool:
        """Whether a collector waits for the KL of this pass."""
        return len(self.sinks) > 0

    def record(self, kl: Tensor) -> None:
        """Hands the KL of a forward pass to every collector."""
        for collector, position in self.sinks:
            collector.terms[position] = kl
