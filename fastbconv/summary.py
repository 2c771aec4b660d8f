"""What the posteriors of a model look like, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import noise
from ._surgery import bayesian_by_name
from .layers._base import BayesLayer
from .layers.tfp_base import VariationalLayer
from .layers.tfp_sampling import seeded_generator
from .models import placement

QUANTILES: Final = (0.05, 0.5, 0.95)
# Half a unit in the last place of a weight is about |loc| over this: 2^8 and 2^11.
_HALF_ULP: Final = {"bfloat16": 256.0, "float16": 2048.0}
_HEADER: Final = (
    "layer",
    "type",
    "weights",
    "KL [nats]",
    "scale 5 %",
    "50 %",
    "95 %",
    "|loc|/scale 5 %",
    "50 %",
    "95 %",
    "lost bf16",
    "lost fp16",
)


@dataclass(frozen=True)
class LayerSummary:
    """The posterior of one layer, weight and (where it is Bayesian) bias together.

    Attributes:
        name: of the layer in the model.
        kind: its class.
        weights: number of weights with a scale.
        kl: KL(posterior || prior), nats.
        scale: quantiles (5, 50, 95 %) of the posterior standard deviations.
        snr: those of the signal-to-noise ratio |loc| / scale.
        lost_bf16: share of weights whose scale is below |loc| / 256, half a unit in the last place
            of a bfloat16 weight: rounding hides most of their noise.
        lost_fp16: likewise for float16, |loc| / 2048.
    """

    name: str
    kind: str
    weights: int
    kl: float
    scale: tuple[float, ...]
    snr: tuple[float, ...]
    lost_bf16: float
    lost_fp16: float

    def _cells(self) -> list[str]:
        numbers = [f"{value:.3g}" for value in (*self.scale, *self.snr)]
        shares = [f"{share:.1%}" for share in (self.lost_bf16, self.lost_fp16)]
        return [self.name, self.kind, f"{self.weights:,}", f"{self.kl:.6g}", *numbers, *shares]


@dataclass(frozen=True)
class Summary:
    """The posteriors of a model; ``print(summary)`` is a table.

    Attributes:
        rows: one for each Bayesian layer, in the order of ``model.modules()``.
        deterministic: number of parameters that belong to no Bayesian layer.
    """

    rows: tuple[LayerSummary, ...]
    deterministic: int

    @property
    def weights(self) -> int:
        """Number of weights with a scale."""
        return sum(row.weights for row in self.rows)

    @property
    def kl(self) -> float:
        """KL of all layers, nats."""
        return sum(row.kl for row in self.rows)

    @property
    def lost_bf16(self) -> float:
        """Share of all weights whose scale is below |loc| / 256; 0 without weights."""
        return self._share([row.lost_bf16 for row in self.rows])

    @property
    def lost_fp16(self) -> float:
        """Share of all weights whose scale is below |loc| / 2048; 0 without weights."""
        return self._share([row.lost_fp16 for row in self.rows])

    def _share(self, shares: Sequence[float]) -> float:
        lost = sum(share * row.weights for share, row in zip(shares, self.rows, strict=True))
        return lost / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        none = [""] * (2 * len(QUANTILES))
        shares = [f"{share:.1%}" for share in (self.lost_bf16, self.lost_fp16)]
        total = ["total", "", f"{self.weights:,}", f"{self.kl:.6g}", *none, *shares]
        lines = [list(_HEADER), *(row._cells() for row in self.rows), total]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return f"{text}\nother parameters: {self.deterministic:,}"


def summary(model: nn.Module) -> Summary:
    """Per layer: number of weights, KL, quantiles of scale and of |loc| / scale, shares of scales
    that a 16-bit weight rounds away.

    A quantile is the value of that rank, not interpolated. The KL, in nats, is that of
    ``kl_loss()``: with a prior without a closed form, of the weights of the last call, or, before
    the first one, of weights drawn from PyTorch's generator under the seed 0. That generator is
    afterwards as it was.

    Args:
        model: any module; a layer that occurs twice has one row.

    Returns:
        A Summary: its ``rows`` are for programs, ``str()`` of it is a table.

    Raises:
        TypeError: no module.
        ValueError: a layer before its first call.

    Example:
        >>> from fastbconv import BayesLinear
        >>> found = summary(nn.Sequential(BayesLinear(16, 4)))
        >>> found.rows[0].weights, round(found.rows[0].scale[1], 4)
        (64, 0.025)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = bayesian_by_name(model)
    with torch.no_grad():
        rows = tuple(_row(name, layer) for name, layer in layers.items())
    bayesian = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    others = (p for p in model.parameters() if id(p) not in bayesian)
    return Summary(rows, sum(parameter.numel() for parameter in others))


def _row(name: str, layer: Any) -> LayerSummary:
    device, _ = placement(layer)
    with seeded_generator(noise.seed_tensor(0, device)):  # reading a table draws nothing
        kl = float(layer.kl_loss())
    posteriors = list(_posteriors(layer))
    loc = torch.cat([loc.flatten() for loc, _ in posteriors] or [torch.empty(0)]).abs()
    scale = torch.cat([scale.flatten() for _, scale in posteriors] or [torch.empty(0)])
    lost = [
        float((scale < loc / factor).double().mean()) if loc.numel() else 0.0
        for factor in _HALF_ULP.values()
    ]
    return LayerSummary(
        name,
        type(layer).__name__,
        loc.numel(),
        kl,
        _quantiles(scale),
        _quantiles(loc / scale),
        *lost,
    )


def _posteriors(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(loc, scale) of each part that is not a point mass, at least float32."""
    pairs: list[Any] = []  # of a layer of the user's own, which has only the mark of a Bayesian one
    if isinstance(layer, BayesLayer):
        pairs = [(layer.weight, layer.weight_scale), (layer.bias, layer.bias_scale)]
    elif isinstance(layer, VariationalLayer):
        distributions = (layer.kernel_posterior, layer.bias_posterior)
        pairs = [(None, None) if d is None else (d.mean, d.stddev) for d in distributions]
    for loc, scale in pairs:
        if scale is not None and bool((scale > 0).any()):
            wide = torch.promote_types(loc.dtype, torch.float32)
            yield loc.to(wide), scale.to(wide).expand_as(loc)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    if not values.numel():
        return (float("nan"),) * len(QUANTILES)
    ranks = (1 + round(q * (values.numel() - 1)) for q in QUANTILES)
    return tuple(float(values.kthvalue(rank).values) for rank in ranks)
