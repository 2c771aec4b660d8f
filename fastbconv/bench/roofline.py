"""What the machine can do, measured: multiply-adds, memory, noise; and what a row needs of each.

The multiply-add peak is a loop of independent float32 multiply-adds on registers, of the native
library, in the widest instructions of the processor and on all threads, the best of many runs: what
nothing can exceed without fewer operations. Without a native library it is a large matrix product
of PyTorch, which on some processors reaches half of that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import fastbconv as fb
from fastbconv import _native

from . import machine, shapes
from .shapes import Shape

_MATRIX = 1536
_ITERATIONS = 2**20  # a few milliseconds: starting the threads does not show
_ARRAY = 32 * 2**20  # floats: larger than caches


class Limits(NamedTuple):
    """Measured with the threads in use.

    Attributes:
        gflops: float32 multiply-adds, two operations each, 10^9 a second.
        gbytes: copy between arrays larger than the caches, read plus written, 10^9 a second.
        sampling: seconds per weight of our sampling pass and of our KL, one after the other; the
            layers do both in one pass, a little faster.
    """

    gflops: float
    gbytes: float
    sampling: float


def _best(call: Callable[[], object], budget: float) -> float:
    call()
    best, began = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - began >= budget:
            return best


class Peak(NamedTuple):
    """The multiply-add peak.

    Attributes:
        gflops: float32, two operations each, 10^9 a second, with the threads in use.
        source: what was run.
    """

    gflops: float
    source: str


def measure_peak(budget: float = 1.0) -> Peak:
    """The multiply-add peak of the threads in use.

    Args:
        budget: seconds; the best of them counts.

    Returns:
        The rate on registers, or, without a native library, that of a matrix product.
    """
    native = _native.load()
    if native is None:
        return Peak(_matrix_product(budget), "a float32 matrix product")
    best, began = native.multiply_add_rate(_ITERATIONS), time.perf_counter()
    while time.perf_counter() - began < budget:
        best = max(best, native.multiply_add_rate(_ITERATIONS))
    return Peak(1e-9 * best, f"float32 multiply-adds on registers ({native.cpu_capability()})")


def _matrix_product(budget: float) -> float:
    """float32 GFLOP/s of PyTorch's, large: best of ``budget`` seconds."""
    a, b = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
    out = torch.empty(_MATRIX, _MATRIX)
    return 2e-9 * _MATRIX**3 / _best(lambda: torch.mm(a, b, out=out), budget)


def measure(budget: float = 1.0, peak: Peak | None = None) -> Limits:
    """All limits.

    Args:
        budget: seconds for each.
        peak: of multiply-adds, where it has been measured already.

    Returns:
        The limits.
    """
    peak = measure_peak(budget) if peak is None else peak
    source, target = torch.ones(_ARRAY), torch.ones(_ARRAY)
    gbytes = 8e-9 * _ARRAY / _best(lambda: target.copy_(source), budget)
    loc = torch.zeros(512, 512, 3, 3).contiguous(memory_format=torch.channels_last)
    rho = torch.full_like(loc, -3.0)

    def sample() -> None:
        fb.functional.sample_posterior(loc, rho, seed=0)
        fb.functional.kl_normal(loc, rho)

    with torch.no_grad():
        return Limits(peak.gflops, gbytes, _best(sample, budget) / loc.numel())


class Bound(NamedTuple):
    """Least seconds of one forward pass by each limit alone."""

    compute: float
    memory: float
    sampling: float


def bound(shape: Shape, limits: Limits) -> Bound:
    """What a row cannot beat: by direct summation, touching each tensor once, sampling once."""
    pixels = shape.N * shape.H**2
    traffic = 4 * (pixels * (shape.C + shape.K) + 2 * shape.weights)
    return Bound(
        shape.flops * 1e-9 / limits.gflops,
        traffic * 1e-9 / limits.gbytes,
        shape.weights * limits.sampling,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the limits of this machine and the bounds of every row."""
    parser = argparse.ArgumentParser(prog="roofline.py", description=main.__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per limit")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for name, value in machine.environment(options.threads).items():
        print(f"{name:<22} {value}")
    peak = measure_peak(options.budget)
    limits = measure(options.budget, peak)
    print(
        f"\nmultiply-add peak      {limits.gflops:.0f} GFLOP/s, {peak.source}\n"
        f"memory, copy           {limits.gbytes:.1f} GB/s read plus written\n"
        f"sampling and KL        {limits.sampling * 1e9:.2f} ns a weight\n"
    )
    print(
        f"{'N,H,C,K,k':<16} {'GFLOP':>7} {'compute':>9} {'memory':>9} {'sampling':>9}  ms, forward"
    )
    for shape in shapes.SHAPES:
        times = " ".join(f"{seconds * 1e3:9.3f}" for seconds in bound(shape, limits))
        print(f"{shape!s:<16} {shape.flops * 1e-9:7.3f} {times}")
    return 0
