"""Stage 7: memory at its peak, by variant, and that of a weight draw per example."""

from __future__ import annotations

from functools import partial
from typing import Any

from .models import EVERY
from .samples import layer_call, leaves
from .stage import Bench, Item, NotMeasured, outcome
from .variants import build

# Layers of a ResNet-18 for 32 x 32 images by channels and side; how many there are of each.
LAYERS = ((64, 32, 4), (128, 16, 3), (256, 8, 3), (512, 4, 3))


def _peak(bench: Bench, call: Any) -> int:
    found = bench.clock.peak(call)
    if found is None:
        raise NotMeasured("a CPU does not count its memory")
    return found


def network(bench: Bench, name: str) -> dict[str, Any]:
    """Peak bytes of a forward pass and of a step, above parameters, gradients and input."""
    found: dict[str, Any] = {}
    with bench.part(name):
        program = build(bench, name, "resnet18", 2 if bench.dry else 128)
        program.step()
        for direction in ("forward", "step"):
            found[direction] = _peak(bench, program.call(direction))
    return found


def networks(bench: Bench) -> dict[str, Any]:
    """ResNet-18, batch 128, every variant."""
    rows = {}
    for name in EVERY:
        rows[name] = outcome(bench, partial(network, bench, name))
    return {"variants": rows, **bench.instead("a tiny network, batch 2, bytes not counted")}


def per_example(bench: Bench, channels: int, side: int, count: int) -> dict[str, Any]:
    """Peak bytes of a step of one layer, above those of the deterministic one."""
    image, parameters = leaves(bench, channels, side)
    rows: dict[str, Any] = {}
    for name in ("det", "shared", "per example", "materialised"):

        def measure(name: str = name) -> dict[str, Any]:
            if name in ("shared", "per example"):
                bench.need_ours()
            with bench.part(name):
                return {"bytes": _peak(bench, layer_call(image, parameters, name, True))}

        rows[name] = outcome(bench, measure)
    base = rows["det"].get("bytes")
    for row in rows.values():
        if base is not None and "bytes" in row:
            row["above det"] = row["bytes"] - base
    numbers = {"draws": image.shape[0], "weights": parameters[0].numel(), "layers": count}
    return {**numbers, "variants": rows, **bench.instead("3>3 @6, batch 2, bytes not counted")}


def items(bench: Bench) -> list[Item]:
    """Stage 7. cuDNN does not try its algorithms in it: their workspaces would count."""
    listed = [Item("resnet18 128", networks)]
    for channels, side, count in LAYERS[:1] if bench.dry else LAYERS:
        call = partial(per_example, channels=channels, side=side, count=count)
        listed.append(Item(f"per example {channels}>{channels} @{side}", call))
    return listed
