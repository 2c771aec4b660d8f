"""Threads with small stacks (servers, musl) run the kernels too."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading, torch, fastbconv as fb
torch.set_num_threads(1)
layer = fb.BayesConv2d(32, 32, 3, padding=1).to(getattr(torch, sys.argv[1]))
x = torch.randn(2, 32, 8, 8, dtype=layer.weight.dtype, requires_grad=True)
def step():
    with fb.collect_kl(layer) as kl:
        y = layer(x)
    (y.sum() + kl.sum()).backward()
step()  # what torch itself sets up, once
threading.stack_size(256 * 1024)
thread = threading.Thread(target=step)
thread.start()
thread.join()
print("done", torch.isfinite(x.grad).all().item())
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward_and_backward_in_256_kilobytes(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    assert done.stdout == "done True\n"
