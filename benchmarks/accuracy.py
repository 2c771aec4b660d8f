"""Errors of what `auto` takes over the grid of selection.py, next to those of PyTorch.

For every float32 row and seed: the weight that the layer draws is taken by itself (the same bits),
and output and gradients are compared with float64 on that weight. The figures are ratios to the
errors that PyTorch's float32 convolution makes on the same numbers, in the memory format of the
row: root mean square and largest error of the output, largest error of the gradients by input,
weight and bias.

    python benchmarks/accuracy.py [--seeds 3] [--only SUBSTRING] [--algorithm auto] [--out FILE.csv]

Bars: output 1.05 (root mean square) and 1.5 (largest), gradients 2. They are meant for `auto`;
"winograd4", and "winograd2x4" where `auto` leaves it out, are above them. Rows that the algorithm
cannot compute are left out.
"""

from __future__ import annotations

import argparse
import csv
from typing import NamedTuple

import selection
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbconv as fb
from fastbconv import functional

BARS = {"output_rms": 1.05, "output": 1.5, "input": 2.0, "weight": 2.0, "bias": 2.0}


class Pass(NamedTuple):
    """Output and gradients of one convolution."""

    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor


def plain(
    row: selection.Row, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, dtype: torch.dtype
) -> Pass:
    """PyTorch's convolution in one dtype."""
    leaves = tuple(t.to(dtype).detach().requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(*leaves, **selection.geometry(row))
    return Pass(y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype)))


def bayesian(row: selection.Row, tensors: tuple[Tensor, ...], grad: Tensor, seed: int) -> Pass:
    """The layer; without KL the gradient by loc is that by the weight."""
    x, loc, _, bias = tensors
    y = functional.bayes_conv2d(*tensors, **selection.geometry(row), seed=seed)
    return Pass(y.detach(), *torch.autograd.grad(y, (x, loc, bias), grad))


def errors(got: Pass, exact: Pass) -> dict[str, float]:
    """Root mean square of the output's error, and the largest errors."""
    off = {name: (getattr(got, name).double() - getattr(exact, name)) for name in Pass._fields}
    largest = {name: error.abs().max().item() for name, error in off.items()}
    return {"output_rms": off["output"].square().mean().sqrt().item(), **largest}


def ratios(row: selection.Row, seed: int) -> dict[str, float]:
    """Errors of the layer over those of PyTorch's float32 convolution."""
    torch.manual_seed(seed)
    tensors = selection.tensors(row)
    x, loc, rho, bias = tensors
    with torch.no_grad():
        loc.copy_(torch.randn_like(loc) / loc[0].numel() ** 0.5)
        bias.copy_(torch.randn_like(bias))
        weight = functional.sample_posterior(loc, rho, seed=seed)[0].clone(
            memory_format=torch.preserve_format
        )
        grad = torch.randn_like(F.conv2d(x, weight, bias, **selection.geometry(row)))
    exact = plain(row, x, weight, bias, grad, torch.float64)
    theirs = errors(plain(row, x, weight, bias, grad, torch.float32), exact)
    ours = errors(bayesian(row, tensors, grad, seed), exact)
    least = torch.finfo(torch.float32).tiny  # both may be exact
    return {name: (ours[name] + least) / (theirs[name] + least) for name in ours}


def can_compute(algorithm: str, row: selection.Row) -> bool:
    """Whether the algorithm serves every direction of a row; "auto" and "reference" serve all."""
    x, weight = selection.tensors(row)[:2]
    found = fb.explain(x, weight, **selection.geometry(row))
    return all(entry.available for entry in found if entry.algorithm == algorithm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--algorithm", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="write a CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fb.algorithm(options.algorithm)
    rows = [r for r in selection.GRID if r.dtype == "float32" and options.only in str(r)]
    rows = [r for r in rows if can_compute(options.algorithm, r)]
    lines, missed = [], 0
    for row in rows:
        seeds = [ratios(row, seed) for seed in range(options.seeds)]
        worst = {name: max(ratio[name] for ratio in seeds) for name in BARS}
        over = [name for name, bar in BARS.items() if worst[name] > bar]
        missed += bool(over)
        lines.append([str(row), *(f"{worst[name]:.3f}" for name in BARS)])
        text = "  ".join(f"{name} {worst[name]:.2f}" for name in BARS)
        print(f"{row!s:40} {text}{'   <- ' + ', '.join(over) if over else ''}", flush=True)
    within = f"{len(rows) - missed} of {len(rows)} rows within all bars"
    print(f"{within}, worst of {options.seeds} seeds")
    if options.out:
        with open(options.out, "w", newline="") as file:
            csv.writer(file).writerows([["row", *BARS], *lines])


if __name__ == "__main__":
    main()
