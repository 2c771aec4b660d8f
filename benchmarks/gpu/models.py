"""Stage 5: whole networks, eager and as a CUDA graph, forward and forward with backward."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from . import clock as clocks
from .expected import PREDICTED, compare
from .record import DONE
from .stage import Bench, Item, NotAvailable, NotMeasured, outcome
from .variants import Program, build

EVERY = ("det", "unfused", "fb", "fb-grouped", "bayesian-torch", "fb-direct")
NETWORKS = (
    ("resnet18", 128), ("lenet", 256), ("resnet50", 64), ("resnet18", 512), ("resnet50", 256),
)  # fmt: skip
LARGE = (("resnet18", 512), ("resnet50", 256))  # fewer variants, for want of time and memory
MODES = (("graph", "forward"), ("graph", "step"), ("eager", "forward"), ("eager", "step"))


def effort(bench: Bench) -> clocks.Effort:
    """How long a cell is measured."""
    if bench.dry:
        return clocks.Effort(rounds=2, repeats=2, seconds=0.0)
    return clocks.Effort(rounds=3 if bench.quick else 5)


def programs(bench: Bench, network: str, batch: int, name: str) -> Program:
    """A network that the cells of one network and batch share; those of another are dropped."""
    key = (network, batch)
    if bench.kept.get("network") != key:
        bench.kept["network"], bench.kept["programs"] = key, {}
        gc.collect()
        if bench.clock.cuda:
            torch.cuda.empty_cache()
    found = bench.kept["programs"]
    if name not in found:
        found[name] = build(bench, name, network, batch)
    return found[name]


def _prepare(
    bench: Bench, network: str, batch: int, mode: str, direction: str, name: str
) -> dict[str, Any]:
    """The call of one variant, warmed up: cuDNN has chosen, and its results are finite."""
    with bench.part(name, 90.0 if name == "compiled" else 40.0):
        call = programs(bench, network, batch, name).call(direction)
        for _ in range(2 if bench.dry else 3):
            result = call()
        if mode == "graph":
            call = bench.clock.capture(call)
            result = call()
        value = result if torch.is_tensor(result) else result[0]
        if not bool(torch.isfinite(value.float()).all()):
            raise AssertionError(f"{name}: results that are not finite")
        return {"call": call}


def cell(
    bench: Bench,
    network: str,
    batch: int,
    mode: str,
    direction: str,
    names: Sequence[str] = EVERY,
    key: str | None = None,
) -> dict[str, Any]:
    """All variants by turns; ratios are to the deterministic network."""
    calls, rows = {}, {}
    for name in names:
        ready = outcome(bench, partial(_prepare, bench, network, batch, mode, direction, name))
        if ready["status"] in DONE:
            calls[name] = ready["call"]
        else:
            rows[name] = ready
    if not calls:
        raise NotAvailable("; ".join(str(row.get("reason")) for row in rows.values()))
    times = clocks.interleave(bench.clock, calls, effort(bench))
    rows |= {name: {"status": bench.good, **row} for name, row in summarised(times).items()}
    key = key or cell_name(network, batch, mode, direction)
    tiny = "a tiny network, batch 2" + ", called, not captured" * (mode == "graph")
    found = {"variants": rows, **bench.instead(tiny)}
    return found if bench.dry else {**found, "predictions": predicted(key, rows)}


def summarised(times: dict[str, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """Ratios to det, and beside them how many times slower than ours each variant is."""
    rows = clocks.summary(times, "det")
    mine = best_of_ours(rows)
    for row in rows.values() if mine else ():
        row["times ours"] = row["seconds"]["median"] / rows[mine]["seconds"]["median"]
    return rows


def best_of_ours(rows: dict[str, Any]) -> str | None:
    """The variant that a user of a whole model takes: grouped, else layer by layer."""
    timed = [name for name in ("fb-grouped", "fb") if "seconds" in rows.get(name, {})]
    return timed[0] if timed else None


def predicted(key: str, rows: dict[str, Any]) -> dict[str, Any]:
    """Predictions for this cell beside its figures."""
    mine = best_of_ours(rows) or ""
    figures = {
        "det": rows.get("det", {}).get("seconds", {}).get("median"),
        "ours": rows.get(mine, {}).get("ratio", {}).get("median"),
        "unfused": rows.get("unfused", {}).get("times ours"),
        "bayesian-torch": rows.get("bayesian-torch", {}).get("times ours"),
    }
    found = {}
    for name, value in figures.items():
        compared = compare(PREDICTED.get(f"models/{key}/{name}"), value)
        if compared:
            found[name] = {"measured": value, **compared}
    return found


def cell_name(network: str, batch: int, mode: str, direction: str) -> str:
    """Of an item."""
    return f"{network} {batch} {mode} {direction}"


def compiled(bench: Bench) -> dict[str, Any]:
    """G7: torch.compile of the network written by hand, which takes its time to compile."""
    if bench.quick:
        raise NotMeasured("left out by --quick")
    network, batch = ("lenet", 2) if bench.dry else NETWORKS[0]
    names = ("det", "unfused", "fb", "fb-grouped", "compiled")
    return cell(bench, network, batch, "graph", "step", names, "compiled")


def host_time(bench: Bench) -> dict[str, Any]:
    """Seconds of the host per call of a 64 > 64, 3 x 3 layer on tiny images, device not awaited."""
    rows = {}
    count, repeats = (1, 1) if bench.dry else (50, 5)
    for name in EVERY:
        for direction in ("forward", "step"):

            def measure(name: str = name, direction: str = direction) -> dict[str, Any]:
                with bench.part(name):
                    call = build(bench, name, "layer", 2).call(direction)
                    for _ in range(repeats):
                        call()
                    with clocks.no_collector():
                        times = [bench.clock.host(call, count) for _ in range(repeats)]
                return {"seconds": clocks.quartiles(times)}

            rows[f"{name} {direction}"] = outcome(bench, measure)
    return {"variants": rows, **bench.instead("a layer 3>3 @8, no device to wait for")}


def items(bench: Bench) -> list[Item]:
    """Stage 5, the goals' networks first."""
    listed = []
    chosen = NETWORKS[:2] if bench.quick else NETWORKS
    for number, (network, batch) in enumerate(chosen):
        for mode, direction in MODES:
            name = cell_name(network, batch, mode, direction)
            size = 2 if bench.dry else batch
            names = EVERY[:4] if (network, batch) in LARGE else EVERY
            call = partial(cell, network=network, batch=size, names=names)
            call = partial(call, mode=mode, direction=direction)
            listed.append(Item(name, partial(call, key=name), limit=60.0, least=8.0 * (number > 1)))
        if number == 0:
            listed.append(Item("host time per layer", host_time, limit=60.0))
    listed.append(Item("compiled", compiled, limit=120.0, least=0.0 if bench.dry else 30.0))
    return listed
