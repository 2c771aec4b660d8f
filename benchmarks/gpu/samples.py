"""Stage 6: many weight draws of a small batch, and a draw per example."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb

from . import clock as clocks
from .expected import PREDICTED, compare
from .models import effort
from .record import DONE
from .stage import Bench, Item, NotAvailable, outcome
from .variants import KL_WEIGHT, UnfusedConv, UnfusedLinear, build

DRAWS, BATCH = 32, 8
LAYERS = ((64, 32), (128, 16), (256, 8))  # channels, height and width; 3 x 3, batch 128
EXAMPLES = 128


def set_draws(network: nn.Module, draws: int) -> None:
    """Every layer makes that many draws; the first one's all read the whole batch."""
    layers = [layer for layer in network.modules() if getattr(layer, "is_bayesian", False)]
    for layer in layers:
        layer.draws, layer.shares = draws, layer is layers[0]


def _many(bench: Bench, name: str, draws: int) -> Callable[[], object]:
    """``draws`` outputs of the batch, (draws * batch, classes), without KL."""
    direct, base = name == "fb-direct", "fb" if name.startswith("fb") else name
    program = build(bench, base, "resnet18", 2 if bench.dry else BATCH)
    network, device = program.network, bench.device
    if base == "fb":
        set_draws(network, draws)
    for layer in network.modules():
        if isinstance(layer, UnfusedConv | UnfusedLinear):
            layer.with_kl = False

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            if base == "fb":
                with fb.algorithm("direct" if direct else "auto"):
                    return network(program.input)[0]
            return torch.cat([network(program.input)[0] for _ in range(draws)])

    return call


def many_draws(bench: Bench) -> dict[str, Any]:
    """G13: ResNet-18, batch 8, 32 draws of the weights, as one graph each."""
    draws = 3 if bench.dry else DRAWS
    calls, rows = {}, {}
    for name in ("det", "unfused", "fb", "fb-direct"):

        def prepare(name: str = name) -> dict[str, Any]:
            with bench.part(name, 60.0):
                call = _many(bench, name, draws)
                call()
                return {"call": bench.clock.capture(call)}

        ready = outcome(bench, prepare)
        if ready["status"] in DONE:
            calls[name] = ready["call"]
        else:
            rows[name] = ready
    rows |= _compared(bench, calls, "samples/32 draws")
    return {"draws": draws, "variants": rows} | bench.instead("3 draws of 2 images of 16 x 16")


def _compared(
    bench: Bench, calls: dict[str, Callable[[], object]], key: str
) -> dict[str, dict[str, Any]]:
    if not calls:
        raise NotAvailable("no variant can be had")
    rows = clocks.summary(clocks.interleave(bench.clock, calls, effort(bench)), "det")
    if "fb" in rows:
        for name, row in rows.items():
            row["times ours"] = row["seconds"]["median"] / rows["fb"]["seconds"]["median"]
            if not bench.dry:
                row |= compare(PREDICTED.get(f"{key}/{name}"), row["times ours"])
    return {name: {"status": bench.good, **row} for name, row in rows.items()}


def leaves(bench: Bench, channels: int, side: int) -> tuple[Tensor, list[Tensor]]:
    """Image in bfloat16; loc, rho and bias."""
    rows, channels, side = (2, 3, 6) if bench.dry else (EXAMPLES, channels, side)
    make = {"device": bench.device}
    image = torch.randn(rows, channels, side, side, **make).bfloat16()
    loc = torch.randn(channels, channels, 3, 3, **make) * 0.05
    last = {"memory_format": torch.channels_last}
    parameters = [loc.contiguous(**last), torch.full_like(loc, -4.0).contiguous(**last)]
    parameters.append(torch.zeros(channels, **make))
    return image.contiguous(**last), [leaf.requires_grad_() for leaf in parameters]


def layer_call(
    image: Tensor, parameters: list[Tensor], variant: str, step: bool
) -> Callable[[], object]:
    """One layer: "det", "shared", "per example", with " direct" for the one-pass kernels."""
    loc, rho, bias = parameters
    draws = image.shape[0] if variant.startswith("per example") else 1
    algorithm = "direct" if variant.endswith("direct") else "auto"

    def forward() -> tuple[Tensor, Tensor | None]:
        if variant == "det":
            weight = loc.to(image.dtype)
            return F.relu(F.conv2d(image, weight, bias.to(image.dtype), padding=1)), None
        if variant == "materialised":
            return materialised(image, loc, rho, bias)
        with fb.algorithm(algorithm):
            return fb.functional.bayes_conv2d(
                image, loc, rho, bias, padding=1, activation="relu", num_samples=draws,
                return_kl=True,
            )  # fmt: skip

    def call() -> object:
        if not step:
            with torch.no_grad():
                return forward()
        output, kl = forward()
        loss = output.float().mean()
        loss = loss if kl is None else loss + KL_WEIGHT * kl
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return call


def materialised(
    image: Tensor, loc: Tensor, rho: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A weight per example in PyTorch: all of them in memory, and a grouped convolution."""
    rows, _, height, width = image.shape
    scale = F.softplus(rho)
    eps = torch.randn((rows, *loc.shape), device=loc.device)
    weight = (loc + scale * eps).to(image.dtype).flatten(0, 1)
    output = F.conv2d(image.reshape(1, -1, height, width), weight, padding=1, groups=rows)
    output = output.view(rows, -1, height, width) + bias.to(image.dtype).view(1, -1, 1, 1)
    kl = (0.5 * (scale.square() + loc.square()) - scale.log() - 0.5).sum()
    return F.relu(output), kl


def per_example(bench: Bench, channels: int, side: int) -> dict[str, Any]:
    """G14: one layer forward, batch 128, a weight draw for every example."""
    image, parameters = leaves(bench, channels, side)
    calls, rows = {}, {}
    for name in ("det", "shared", "per example", "per example direct"):

        def prepare(name: str = name) -> dict[str, Any]:
            if name != "det":
                bench.need_ours()
            with bench.part(name):
                call = layer_call(image, parameters, name, False)
                call()
                return {"call": bench.clock.capture(call)}

        ready = outcome(bench, prepare)
        if ready["status"] in DONE:
            calls[name] = ready["call"]
        else:
            rows[name] = ready
    rows |= _compared(bench, calls, "")
    found: dict[str, Any] = {"variants": rows, **bench.instead("3>3 @6, batch 2")}
    ratios = [
        row["ratio"]["median"]
        for name, row in rows.items()
        if name.startswith("per example") and "ratio" in row
    ]
    if ratios:
        key = f"samples/per example {channels}>{channels} @{side}"
        found["ratio"] = min(ratios)
        found |= {} if bench.dry else compare(PREDICTED.get(key), found["ratio"])
    return found


def items(bench: Bench) -> list[Item]:
    """Stage 6."""
    listed = [Item("32 draws", many_draws, limit=90.0)]
    for channels, side in LAYERS[:1] if bench.dry else LAYERS:
        call = partial(per_example, channels=channels, side=side)
        listed.append(Item(f"per example {channels}>{channels} @{side}", call))
    return listed
