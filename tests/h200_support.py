"""What the tests of the GPU measuring script share: a stage without a device, a filled file."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import torch
from gpu import clock
from gpu.record import Record
from gpu.stage import Bench

CPU = torch.device("cpu")


@functools.cache
def build_library() -> None:
    """The native library is there and works before any test takes time: no test compiles it."""
    import fastbconv as fb

    assert fb.build_info()["built"] != "reference"
    loc = torch.zeros(2, 1, 1, 1)
    fb.functional.sample_posterior(loc, loc, seed=0)


def bench_of(path: Path, seconds: float = 60.0, banned: tuple[str, ...] = ()) -> Bench:
    record = Record(path)
    record.begin("facts")
    deadline = time.monotonic() + seconds
    return Bench(clock.Clock(CPU), True, deadline, record, "facts", banned)


def row(seconds: float, det: float, ours: float) -> dict:
    quartiles = {"low": seconds, "median": seconds, "high": seconds}
    ratio = {name: value / det for name, value in quartiles.items()}
    return {
        "status": "ok",
        "seconds": quartiles,
        "ratio": ratio,
        "verdict": "slower",
        "times ours": seconds / ours,
    }


def filled(path: Path, ours: float) -> Record:
    """A record as a GPU would leave it; ours takes ``ours`` of the deterministic time."""
    record = Record(path)
    rows = {"det": 1.0, "unfused": 10.0, "bayesian-torch": 20.0, "fb": 2.0, "fb-grouped": ours}
    rows |= {"fb-direct": ours / 2, "compiled": 3.0}
    cells = {name: row(seconds, 1.0, ours) for name, seconds in rows.items()}
    networks_ = ("resnet18 128", "resnet18 512", "resnet50 64", "resnet50 256", "lenet 256")
    names = [
        f"{n} {m} {d}" for n in networks_ for m in ("graph", "eager") for d in ("forward", "step")
    ]
    items = {name: {"status": "ok", "variants": cells} for name in [*names, "compiled"]}
    record.begin("models").update(items=items, status="ok")
    ok = {"status": "ok"}
    record.begin("facts")["items"] = {
        "machine": {**ok, "device": "NVIDIA H200"},
        "copy": {**ok, "bytes_per_second": 4.3e12},
    }
    record.begin("kernels")["items"] = {
        "sample 11M": {**ok, "bytes_per_second": 3.5e12, "seconds": {"median": 3e-5}},
        "backward 11M": {**ok, "bytes_per_second": 3.0e12, "seconds": {"median": 6e-5}},
        "conv R18 128 128>128 @16": {**ok, "direct speed": 0.7},
        "conv R18 8 512>512 @4": {**ok, "direct speed": 1.5},
    }
    record.begin("correctness")["items"] = {"eps equals the CPU's": {**ok, "values": 10**8}}
    layers = {}
    for number in range(2):
        above = {"per example": 10.0, "materialised": 1e6}
        memory = {name: {**ok, "above det": value} for name, value in above.items()}
        layers[f"per example {number}"] = {**ok, "layers": 3, "variants": memory}
    record.begin("memory")["items"] = layers
    return record
