"""Stage 8: where the time of one step goes, kernel by kernel: what explains a missed prediction."""

from __future__ import annotations

import collections
from functools import partial
from typing import Any

from .stage import Bench, Item
from .variants import build

KERNELS = 14


def step(bench: Bench, name: str, direction: str) -> dict[str, Any]:
    """Number and time of the kernels of one call, by name, from PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    calls = 2 if bench.dry else 5
    activity = ProfilerActivity.CUDA if bench.clock.cuda else ProfilerActivity.CPU
    with bench.part(name):
        program = build(bench, name, "resnet18", 2 if bench.dry else 128)
        call = program.call(direction)
        for _ in range(3):
            call()
        bench.clock.synchronize()
        with profile(activities=[activity]) as profiler:
            for _ in range(calls):
                call()
            bench.clock.synchronize()
    spent: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        if not bench.clock.cuda or event.device_type.name == "CUDA":
            spent[event.name] += event.time_range.elapsed_us()
            count[event.name] += 1
    if not spent:
        raise RuntimeError("the profiler saw no kernels")
    top = [
        {"kernel": kernel[:120], "count": count[kernel] / calls, "us": spent[kernel] / calls}
        for kernel, _ in spent.most_common(KERNELS)
    ]
    total = sum(spent.values()) / calls
    found = {"kernels": sum(count.values()) / calls, "us": total, "top": top}
    return found | bench.instead("operators of a CPU, a tiny network, batch 2")


def items(bench: Bench) -> list[Item]:
    """Stage 8."""
    cases = [("fb-grouped", "step"), ("det", "step"), ("fb", "forward"), ("fb-direct", "forward")]
    return [
        Item(f"{name} {direction}", partial(step, name=name, direction=direction))
        for name, direction in (cases[:2] if bench.quick else cases)
    ]
