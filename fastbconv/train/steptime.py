"""What a training step costs: Bayesian, deterministic, and Bayesian written by hand.

The three take turns in one process, so that they meet the same processor, and a ratio is taken
within each turn. Times of a shared machine scatter: quartiles stand beside every median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastbconv as fb

from . import device as devices
from .data import Dataset
from .loop import make_optimizer
from .model import KINDS, ConvNet, Kind, unfused_kl
from .settings import Settings

Quartiles = tuple[float, float, float]
_WARM_UP = 5
_SECONDS = 8.0  # stop early on a large model
_MIN_TURNS = 5


def quartiles(values: list[float]) -> Quartiles:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _stepper(kind: Kind, settings: Settings, data: Dataset) -> Callable[[], None]:
    """A whole training step on one batch: forward, loss with the KL, backward, Adam."""
    device = devices.find(settings.device, processes=1)
    model = ConvNet(kind, data.image_shape, len(data.classes), settings).to(device)
    optimizer = make_optimizer(model, settings.lr)
    images, labels = data.train.batch(slice(0, settings.batch_size), device)
    weight = settings.beta / len(data.train)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with fb.collect_kl(model) as collected:
            loss = F.cross_entropy(model(images), labels)
        if kind == "bayesian":
            loss = loss + weight * collected.sum()
        elif kind == "unfused":
            loss = loss + weight * unfused_kl(model)
        loss.backward()
        optimizer.step()
        devices.synchronize(device)

    return step


def measure(settings: Settings, data: Dataset, turns: int = 60) -> dict[str, Quartiles]:
    """Seconds of a step of each kind, and the Bayesian step's ratio to the two others.

    Returns:
        quartiles of ``bayesian``, ``deterministic``, ``unfused`` (seconds),
        ``to_deterministic`` and ``to_unfused`` (ratios).
    """
    with torch.random.fork_rng():
        steps = {kind: _stepper(kind, settings, data) for kind in KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        began = time.perf_counter()
        for turn in range(_WARM_UP + turns):
            for kind, step in steps.items():
                start = time.perf_counter()
                step()
                if turn >= _WARM_UP:
                    seconds[kind].append(time.perf_counter() - start)
            if len(seconds["bayesian"]) >= _MIN_TURNS and time.perf_counter() - began > _SECONDS:
                break
    result = {kind: quartiles(values) for kind, values in seconds.items()}
    for other in ("deterministic", "unfused"):
        pairs = zip(seconds["bayesian"], seconds[other], strict=True)
        result[f"to_{other}"] = quartiles([ours / theirs for ours, theirs in pairs])
    return result
