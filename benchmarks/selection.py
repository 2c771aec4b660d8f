"""Times every CPU kernel on a grid of shapes and compares the choice of `auto` with the fastest.

The evidence behind csrc/cpu/select.cpp. Every kernel that can serve a call takes its turn in one
process, in an order shuffled at every turn: fprop, dgrad, wgrad (with the gradients of the
posterior). Wall clock, medians. A choice is right where it is the fastest or within 10 % of it; a
kernel that `auto` leaves out for its rounding errors is timed but does not compete.

    python benchmarks/selection.py [--threads 2] [--budget 1.0] [--only SUBSTRING] [--out FILE.csv]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import fastbconv as fb
from fastbconv import functional
from fastbconv.bench import machine

DIRECTIONS = ("fprop", "dgrad", "wgrad")
KERNELS = ("direct", "library", "winograd2", "winograd2x4")
TOLERANCE = 1.10


class Row(NamedTuple):
    """K filters of size x size over n images of c x h x h; height and width kept at stride 1."""

    n: int
    c: int
    h: int
    k: int
    size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    layout: str = "nhwc"
    dtype: str = "float32"

    def __str__(self) -> str:
        return ",".join(map(str, self))


GRID = (
    # LeNet, first layers, small channel counts
    Row(128, 1, 28, 32, 5),
    Row(64, 1, 28, 6, 5),
    Row(64, 6, 14, 16, 5),
    Row(64, 3, 32, 64, 3),
    Row(64, 3, 32, 16, 3),
    Row(16, 3, 112, 64, 7, 2),
    Row(16, 3, 64, 32, 3, 2),
    Row(16, 8, 32, 8, 3),
    Row(16, 16, 32, 16, 3),
    Row(32, 16, 32, 32, 3),
    Row(32, 32, 32, 32, 3),
    Row(16, 17, 15, 33, 3),
    Row(16, 48, 20, 40, 3),
    # 3 x 3 of ResNet-18 and -50
    Row(64, 64, 32, 64, 3),
    Row(64, 128, 16, 128, 3),
    Row(64, 256, 8, 256, 3),
    Row(64, 512, 4, 512, 3),
    Row(16, 64, 56, 64, 3),
    Row(16, 128, 28, 128, 3),
    Row(16, 256, 14, 256, 3),
    Row(16, 512, 7, 512, 3),
    Row(64, 64, 32, 128, 3, 2),
    Row(64, 128, 16, 256, 3, 2),
    Row(64, 256, 8, 512, 3, 2),
    # few pixels
    Row(1, 64, 8, 64, 3),
    Row(1, 64, 32, 64, 3),
    Row(4, 64, 16, 64, 3),
    Row(1, 128, 16, 128, 3),
    Row(4, 128, 8, 128, 3),
    Row(1, 256, 8, 256, 3),
    Row(2, 256, 8, 256, 3),
    Row(4, 256, 8, 256, 3),
    Row(8, 256, 8, 256, 3),
    Row(16, 256, 8, 256, 3),
    Row(1, 512, 7, 512, 3),
    Row(2, 512, 7, 512, 3),
    Row(4, 512, 7, 512, 3),
    Row(8, 512, 7, 512, 3),
    Row(16, 512, 4, 512, 3),
    # 1 x 1
    Row(16, 64, 56, 256, 1),
    Row(32, 64, 28, 128, 1),
    Row(32, 256, 14, 64, 1),
    Row(32, 512, 7, 512, 1),
    Row(32, 64, 28, 128, 1, 2),
    Row(16, 64, 32, 1, 1),
    Row(16, 96, 32, 24, 1),
    # 5 x 5, 7 x 7, dilation
    Row(16, 32, 28, 64, 5),
    Row(16, 64, 28, 64, 5),
    Row(16, 128, 14, 128, 5),
    Row(8, 64, 28, 64, 7),
    Row(16, 32, 28, 64, 3, 1, 2),
    Row(16, 64, 32, 64, 3, 1, 2),
    # few filters
    Row(16, 64, 32, 10, 3),
    Row(16, 64, 32, 3, 3),
    # depthwise and groups
    Row(16, 64, 32, 64, 3, 1, 1, 64),
    Row(16, 128, 16, 128, 5, 1, 1, 128),
    Row(16, 128, 32, 128, 3, 2, 1, 128),
    Row(16, 64, 32, 64, 3, 1, 1, 4),
    Row(16, 128, 28, 128, 3, 1, 1, 32),
    Row(16, 64, 32, 128, 3, 2, 1, 2),
    # linear layers
    Row(64, 512, 1, 512, 1),
    Row(64, 512, 1, 10, 1),
    Row(256, 784, 1, 256, 1),
    Row(1, 1024, 1, 1024, 1),
    # contiguous
    Row(64, 3, 32, 64, 3, layout="nchw"),
    Row(128, 1, 28, 32, 5, layout="nchw"),
    Row(64, 64, 32, 64, 3, layout="nchw"),
    Row(64, 256, 8, 256, 3, layout="nchw"),
    Row(16, 512, 7, 512, 3, layout="nchw"),
    Row(32, 64, 32, 64, 3, 2, layout="nchw"),
    Row(16, 64, 28, 128, 1, layout="nchw"),
    Row(16, 64, 32, 64, 3, 1, 1, 64, layout="nchw"),
    # 16 bit
    Row(64, 64, 32, 64, 3, dtype="bfloat16"),
    Row(64, 128, 16, 128, 3, dtype="bfloat16"),
    Row(64, 256, 8, 256, 3, dtype="bfloat16"),
    Row(16, 512, 7, 512, 3, dtype="bfloat16"),
    Row(64, 3, 32, 64, 3, dtype="bfloat16"),
    Row(16, 64, 56, 256, 1, dtype="bfloat16"),
)


def tensors(row: Row) -> tuple[torch.Tensor, ...]:
    """Input, loc, rho, bias."""
    layout = torch.channels_last if row.layout == "nhwc" else torch.contiguous_format
    image = torch.randn(row.n, row.c, row.h, row.h, dtype=getattr(torch, row.dtype))
    loc = torch.randn(row.k, row.c // row.groups, row.size, row.size).contiguous(
        memory_format=layout
    )
    image = image.contiguous(memory_format=layout)
    leaves = (image, loc, torch.full_like(loc, -4.0), torch.zeros(row.k))
    return tuple(tensor.requires_grad_() for tensor in leaves)


def geometry(row: Row) -> dict[str, int]:
    padding = row.size // 2 * row.dilation
    return {
        "stride": row.stride,
        "padding": padding,
        "dilation": row.dilation,
        "groups": row.groups,
    }


def choices(row: Row) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """What `auto` takes for each direction, and what it leaves out for its errors."""
    x, loc, *_ = tensors(row)
    rows = fb.explain(x, loc, **geometry(row))
    inexact = {(c.direction, c.algorithm) for c in rows if "its errors" in str(c.reason)}
    return {c.direction: c.algorithm for c in rows if c.chosen}, inexact


def _turn(row: Row, leaves: tuple[torch.Tensor, ...], grad: torch.Tensor | None) -> list[float]:
    """Seconds of the three directions, by the kernel in force."""
    x, loc, rho, bias = leaves
    marks = [time.perf_counter()]
    y, kl = functional.bayes_conv2d(
        x, loc, rho, bias, **geometry(row), activation="relu", seed=0, return_kl=True
    )
    marks.append(time.perf_counter())
    grad = torch.randn_like(y) if grad is None else grad
    torch.autograd.grad(y, (x,), grad, retain_graph=True)
    marks.append(time.perf_counter())
    torch.autograd.grad((y, kl), (loc, rho, bias), (grad, torch.ones(())))
    marks.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(marks)]


def measure(row: Row, budget: float) -> dict[str, list[float]]:
    """Median milliseconds of each direction, by kernel; ``budget`` seconds for each."""
    leaves = tensors(row)
    names = ["direct", "library"]
    if row.size == 3 and row.stride == row.dilation == row.groups == 1:
        names += ["winograd2", "winograd2x4"]
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    grad = torch.randn_like(functional.bayes_conv2d(*leaves, **geometry(row)))
    began, turns = time.perf_counter(), 0
    while turns < 6 or time.perf_counter() - began < budget * len(names):
        for name in random.sample(names, len(names)):
            with fb.algorithm(name):
                times[name].append(_turn(row, leaves, grad))
        turns += 1
    return {
        name: [1e3 * statistics.median(series) for series in zip(*rounds[2:], strict=True)]
        for name, rounds in times.items()
    }


class Cell(NamedTuple):
    """One direction of one row."""

    row: Row
    direction: str
    chosen: str
    best: str
    ratio: float  # time of the chosen kernel, of the fastest
    times: dict[str, float]


def cells(row: Row, budget: float) -> Iterator[Cell]:
    """The three directions of one row."""
    times = measure(row, budget)
    chosen, inexact = choices(row)
    for i, direction in enumerate(DIRECTIONS):
        here = {name: values[i] for name, values in times.items()}
        exact = [name for name in here if (direction, name) not in inexact]
        best = min(exact, key=here.__getitem__)
        pick = chosen[direction]
        yield Cell(row, direction, pick, best, here[pick] / here[best], here)


def write(path: str, results: list[Cell], threads: int) -> None:
    """A CSV file: the machine in lines that start with #, then a line for each cell."""
    with open(path, "w", newline="") as file:
        for key, value in machine.environment(threads).items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(["row", "direction", "chosen", "fastest", "ratio", *KERNELS])
        for cell in results:
            numbers = [f"{cell.times[n]:.4f}" if n in cell.times else "" for n in KERNELS]
            writer.writerow(
                [cell.row, cell.direction, cell.chosen, cell.best, f"{cell.ratio:.3f}", *numbers]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds for each kernel of a row"
    )
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--out", help="write a CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[Cell] = []
    for row in (row for row in GRID if options.only in str(row)):
        for cell in cells(row, options.budget):
            results.append(cell)
            mark = "" if cell.ratio <= TOLERANCE else f"   <- {cell.best} {1 / cell.ratio:.2f}"
            texts = "  ".join(f"{name} {value:.3f}" for name, value in cell.times.items())
            print(f"{row!s:40} {cell.direction}  {cell.chosen:11}  {texts}{mark}", flush=True)
    right = sum(cell.ratio <= TOLERANCE for cell in results)
    share = f"{right} of {len(results)} choices ({right / len(results):.1%})"
    print(f"{share} within 10 % of the fastest, {len({cell.row for cell in results})} rows")
    if options.out:
        write(options.out, results, options.threads)
        print("written:", options.out, file=sys.stderr)


if __name__ == "__main__":
    main()
