"""Times every CPU kernel on a grid of shapes: the evidence behind csrc/cpu/select.cpp.

One thread, CPU time of that thread, kernels interleaved, minimum of several rounds: steadier than
wall clock on a machine that does other things too. In brackets the ratio to ``library``.
Columns: fprop, dgrad, wgrad (with the gradients of the posterior), in milliseconds.

    python benchmarks/selection.py [--rounds 6] [--only SUBSTRING]
"""

from __future__ import annotations

import argparse
import time

import torch

import fastbconv as fb
from fastbconv import functional

# N, C, H, K, filter, stride, dilation, groups, memory format, dtype
GRID = [
    (32, 64, 32, 64, 3, 2, 1, 1, "nhwc", "float32"),
    (32, 64, 28, 128, 1, 1, 1, 1, "nhwc", "float32"),
    (32, 256, 14, 64, 1, 1, 1, 1, "nhwc", "float32"),
    (32, 64, 28, 128, 1, 2, 1, 1, "nhwc", "float32"),
    (16, 3, 112, 64, 7, 2, 1, 1, "nhwc", "float32"),
    (16, 32, 28, 64, 5, 1, 1, 1, "nhwc", "float32"),
    (16, 32, 28, 64, 3, 1, 2, 1, "nhwc", "float32"),
    (64, 1, 28, 32, 5, 1, 1, 1, "nhwc", "float32"),
    (64, 3, 32, 64, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 64, 32, 64, 3, 1, 1, 64, "nhwc", "float32"),
    (16, 64, 32, 64, 3, 1, 1, 4, "nhwc", "float32"),
    (16, 64, 32, 128, 3, 2, 1, 2, "nhwc", "float32"),
    (16, 64, 32, 10, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 64, 32, 1, 1, 1, 1, 1, "nhwc", "float32"),
    (16, 64, 32, 64, 3, 1, 1, 1, "nchw", "float32"),
    (16, 256, 8, 256, 3, 1, 1, 1, "nchw", "float32"),
    (32, 64, 32, 64, 3, 2, 1, 1, "nchw", "float32"),
    (16, 64, 28, 128, 1, 1, 1, 1, "nchw", "float32"),
    (64, 3, 32, 64, 3, 1, 1, 1, "nchw", "float32"),
    (64, 512, 1, 512, 1, 1, 1, 1, "nhwc", "float32"),
    (64, 512, 1, 10, 1, 1, 1, 1, "nhwc", "float32"),
    (16, 17, 15, 33, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 8, 32, 8, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 16, 32, 16, 3, 1, 1, 1, "nhwc", "float32"),
    (1, 64, 32, 64, 3, 1, 1, 1, "nhwc", "float32"),
    (1, 256, 8, 256, 3, 1, 1, 1, "nhwc", "float32"),
    (1, 512, 7, 512, 3, 1, 1, 1, "nhwc", "float32"),
    (64, 512, 4, 512, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 512, 7, 512, 3, 1, 1, 1, "nhwc", "float32"),
    (16, 64, 32, 64, 3, 1, 1, 1, "nhwc", "bfloat16"),
    (64, 3, 32, 64, 3, 1, 1, 1, "nhwc", "bfloat16"),
]


def measure(row: tuple, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each direction, by algorithm."""
    n, c, h, k, r, stride, dilation, groups, layout, dtype = row
    layout = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(n, c, h, h, dtype=getattr(torch, dtype)).contiguous(memory_format=layout)
    loc = torch.randn(k, c // groups, r, r).contiguous(memory_format=layout)
    tensors = [x, loc, torch.full_like(loc, -4.0), torch.zeros(k)]
    x, loc, rho, bias = (tensor.requires_grad_() for tensor in tensors)
    names = ["direct", "library"]
    if r == 3 and stride == dilation == groups == 1:
        names.append("winograd2")
    times: dict[str, list[list[float]]] = {name: [[], [], []] for name in names}
    grad = None
    for _ in range(rounds + 1):
        for name in names:
            with fb.algorithm(name):
                marks = [time.thread_time()]
                y, kl = functional.bayes_conv2d(
                    x,
                    loc,
                    rho,
                    bias,
                    stride=stride,
                    padding=r // 2 * dilation,
                    dilation=dilation,
                    groups=groups,
                    activation="relu",
                    seed=0,
                    return_kl=True,
                )
                marks.append(time.thread_time())
                grad = torch.randn_like(y) if grad is None else grad
                torch.autograd.grad(y, (x,), grad, retain_graph=True)
                marks.append(time.thread_time())
                torch.autograd.grad((y, kl), (loc, rho, bias), (grad, torch.ones(())))
                marks.append(time.thread_time())
            for series, begin, end in zip(times[name], marks, marks[1:], strict=False):
                series.append(1e3 * (end - begin))
    return {name: [min(series[1:]) for series in times[name]] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in GRID:
        if options.only not in str(row):
            continue
        times = measure(row, options.rounds)
        print(",".join(map(str, row)))
        for name, values in times.items():
            cells = (
                f"{v:8.2f} ({v / b:.2f})" for v, b in zip(values, times["library"], strict=True)
            )
            print(f"    {name:10}", "  ".join(cells))


if __name__ == "__main__":
    main()
