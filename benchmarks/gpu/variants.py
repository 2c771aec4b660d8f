"""The ways to compute a network that are compared: same parameters' dtype, layout and autocast.

Every variant runs under bfloat16 autocast with float32 parameters, image and weights channels_last,
and every Bayesian one makes fresh noise and the KL against N(0, 1) in each forward pass. The loss
is the same for all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb

from . import networks
from .networks import Network, Terms
from .stage import Bench, NotAvailable

KL_WEIGHT = 1.0 / 50_000
SCALE = 0.1  # of the posterior, times 1 / sqrt(fan_in)
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


# --- the layers -----------------------------------------------------------------------------------


class PlainConv(nn.Conv2d):
    """nn.Conv2d, and relu."""

    relu = False

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """No KL."""
        output = super().forward(input)
        return F.relu(output) if self.relu else output


class PlainLinear(nn.Linear):
    """nn.Linear, and relu."""

    relu = False

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """No KL."""
        output = super().forward(input)
        return F.relu(output) if self.relu else output


def _with_rho(layer: nn.Module, relu: bool) -> nn.Module:
    fan_in = math.prod(layer.weight.shape[1:])
    rho = math.log(math.expm1(SCALE / math.sqrt(fan_in)))
    layer.rho = nn.Parameter(torch.full_like(layer.weight, rho))
    layer.relu = relu
    return layer


def _drawn(loc: Tensor, rho: Tensor, terms: Terms | None) -> Tensor:
    """The lines that anybody writes: noise, scale, and the closed-form KL."""
    scale = F.softplus(rho)
    weight = loc + scale * torch.randn_like(loc)
    if terms is not None:
        terms.append((0.5 * (scale.square() + loc.square()) - scale.log() - 0.5).sum())
    return weight


class UnfusedConv(nn.Conv2d):
    """A Bayesian convolution in ten lines of PyTorch."""

    relu, with_kl = False, True

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """softplus, randn, mul, add, conv, relu, and eight operations of KL."""
        weight = _drawn(self.weight, self.rho, terms if self.with_kl else None)
        output = F.conv2d(input, weight, self.bias, self.stride, self.padding)
        return F.relu(output) if self.relu else output


class UnfusedLinear(nn.Linear):
    """The same, a linear map."""

    relu, with_kl = False, True

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """softplus, randn, mul, add, linear, relu, and eight operations of KL."""
        weight = _drawn(self.weight, self.rho, terms if self.with_kl else None)
        output = F.linear(input, weight, self.bias)
        return F.relu(output) if self.relu else output


class OurConv(fb.BayesConv2d):
    """fb.BayesConv2d; ``draws`` weight draws, ``shares``: all of them read all rows."""

    draws, shares = 1, False

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """The KL goes to fb.collect_kl."""
        return super().forward(input, num_samples=self.draws, share_input=self.shares)


class OurLinear(fb.BayesLinear):
    """fb.BayesLinear, likewise."""

    draws, shares = 1, False

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """The KL goes to fb.collect_kl."""
        return super().forward(input, num_samples=self.draws, share_input=self.shares)


class Peer(nn.Module):
    """A layer of bayesian-torch, and relu."""

    def __init__(self, layer: nn.Module, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, input: Tensor, terms: Terms) -> Tensor:
        """Its layers return (output, KL)."""
        output, kl = self.layer(input)
        terms.append(kl)
        return F.relu(output) if self.relu else output


# --- the kits -------------------------------------------------------------------------------------


class PlainKit:
    """Deterministic layers."""

    def conv(self, C: int, K: int, k: int, stride: int, padding: int, relu: bool) -> nn.Module:
        """A convolution."""
        layer = PlainConv(C, K, k, stride, padding)
        layer.relu = relu
        return layer

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map."""
        layer = PlainLinear(C, K)
        layer.relu = relu
        return layer


class UnfusedKit:
    """Layers written by hand."""

    def conv(self, C: int, K: int, k: int, stride: int, padding: int, relu: bool) -> nn.Module:
        """A convolution."""
        return _with_rho(UnfusedConv(C, K, k, stride, padding), relu)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map."""
        return _with_rho(UnfusedLinear(C, K), relu)


class OurKit:
    """Layers of fastbconv."""

    def conv(self, C: int, K: int, k: int, stride: int, padding: int, relu: bool) -> nn.Module:
        """A convolution."""
        return OurConv(C, K, k, stride, padding, activation="relu" if relu else None)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map."""
        return OurLinear(C, K, activation="relu" if relu else None)


class PeerKit:
    """Layers of bayesian-torch."""

    def __init__(self) -> None:
        try:
            from bayesian_torch import layers
        except Exception as error:  # it may fail in any way while it is imported
            raise NotAvailable(f"bayesian-torch: {type(error).__name__}: {error}") from None
        self.layers = layers

    def conv(self, C: int, K: int, k: int, stride: int, padding: int, relu: bool) -> nn.Module:
        """A convolution."""
        layer = self.layers.Conv2dReparameterization(C, K, k, stride=stride, padding=padding)
        return Peer(layer, relu)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """A linear map."""
        return Peer(self.layers.LinearReparameterization(C, K), relu)


# --- the variants ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to compute a network.

    Attributes:
        text: what it is.
        kit: makes the layers.
        wrap: network -> forward pass.
        ours: whether it needs our kernels.
    """

    text: str
    kit: Callable[[], Any]
    wrap: Callable[[Network], Forward]
    ours: bool = False


def _plain(network: Network) -> Forward:
    return network


def _collected(network: Network) -> Forward:
    def forward(input: Tensor) -> tuple[Tensor, Tensor | None]:
        with fb.collect_kl(network) as kl:
            output, _ = network(input)
            return output, kl.sum()

    return forward


def _grouped(network: Network) -> Forward:
    grouped = getattr(fb, "grouped", None)
    if grouped is None:
        raise NotAvailable("fastbconv has no 'grouped'")
    forward = _collected(network)
    block = contextlib.ExitStack()  # one block for all steps, left when the closure is dropped
    block.enter_context(grouped(network))

    def call(input: Tensor, block: contextlib.ExitStack = block) -> tuple[Tensor, Tensor | None]:
        return forward(input)

    return call


def _direct(network: Network) -> Forward:
    forward = _collected(network)

    def call(input: Tensor) -> tuple[Tensor, Tensor | None]:
        with fb.algorithm("direct"):
            return forward(input)

    return call


def _compiled(network: Network) -> Forward:
    torch.compiler.reset()
    return torch.compile(network, dynamic=False)


VARIANTS = {
    "det": Variant("nn.Conv2d, nn.Linear", PlainKit, _plain),
    "unfused": Variant("Bayesian layers in ten lines of PyTorch", UnfusedKit, _plain),
    "fb": Variant("fastbconv, layer by layer", OurKit, _collected, True),
    "fb-grouped": Variant("fastbconv, all layers sampled together", OurKit, _grouped, True),
    "bayesian-torch": Variant("bayesian-torch's reparameterisation layers", PeerKit, _plain),
    "fb-direct": Variant("fastbconv, one-pass kernels", OurKit, _direct, True),
    "compiled": Variant("torch.compile of the ten lines", UnfusedKit, _compiled),
}


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The same for all."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


@dataclass
class Program:
    """A variant of a network with its input."""

    network: Network
    run: Forward
    input: Tensor

    def forward(self) -> object:
        """A pass without graph: output and KL."""
        with torch.no_grad(), autocast(self.input.device):
            return self.run(self.input)

    def step(self) -> object:
        """A pass, the loss, and the gradients of all parameters."""
        for parameter in self.network.parameters():
            parameter.grad = None
        with autocast(self.input.device):
            output, kl = self.run(self.input)
            loss = output.float().mean()
            if kl is not None:
                loss = loss + KL_WEIGHT * kl
        loss.backward()
        return loss.detach()

    def call(self, direction: str) -> Callable[[], object]:
        """``forward`` or ``step``."""
        return {"forward": self.forward, "step": self.step}[direction]


def build(bench: Bench, variant: str, network: str, batch: int) -> Program:
    """A network on the device, channels_last; raises what is missing."""
    chosen = VARIANTS[variant]
    if chosen.ours:
        bench.need_ours()
    torch.manual_seed(0)
    model = networks.make(network, chosen.kit(), bench.dry)
    model = model.to(bench.device, memory_format=torch.channels_last)
    input = networks.image(network, batch, bench.device, bench.dry)
    return Program(model, chosen.wrap(model), input)
