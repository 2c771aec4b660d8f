"""A tiny program for compute-sanitizer: every kernel of ours once, on small odd shapes.

    compute-sanitizer --tool racecheck python benchmarks/gpu/sanitize_target.py

Convolutions are given ready weights or run by the one-pass kernels, so that little else than our
own kernels is watched. ``--device cpu`` runs the same calls without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def posteriors(device: torch.device) -> None:
    """Sampling, its gradients, the KL."""
    import fastbconv as fb

    for shape in ((5, 3, 3, 3), (8, 16, 1, 1), (7,)):
        loc = torch.randn(shape, device=device).requires_grad_()
        rho = torch.full(shape, -2.0, device=device).requires_grad_()
        stream = "weight" if len(shape) == 4 else "bias"
        draws = fb.functional.sample_posterior(loc, rho, seed=1, num_samples=2, stream=stream)
        (draws.square().sum() + fb.functional.kl_normal(loc, rho)).backward()
        assert bool(torch.isfinite(rho.grad).all())


def convolutions(device: torch.device, algorithm: str) -> None:
    """One layer forward and backward, over awkward sizes, strides and numbers of draws."""
    import fastbconv as fb

    sizes = ((1, 3, 7, 5, 3, 1, 1), (4, 8, 6, 9, 3, 2, 2), (3, 17, 5, 16, 1, 1, 1))
    for rows, channels, extent, filters, side, stride, draws in sizes:
        image = torch.randn(rows, channels, extent, extent, device=device, dtype=torch.bfloat16)
        image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
        shape = (filters, channels, side, side)
        loc, rho = (torch.full(shape, value, device=device) for value in (0.1, -3.0))
        bias = torch.zeros(filters, device=device)
        leaves = [leaf.requires_grad_() for leaf in (loc, rho, bias)]
        with fb.algorithm(algorithm):
            output, kl = fb.functional.bayes_conv2d(
                image,
                *leaves,
                stride=stride,
                padding=side // 2,
                activation="relu",
                num_samples=draws,
                seed=3,
                return_kl=True,
            )
            (output.float().mean() + kl).backward()
        assert bool(torch.isfinite(rho.grad).all())


def main(arguments: list[str]) -> int:
    """Runs everything once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    for name, call in (
        ("posteriors", posteriors),
        ("direct", lambda device: convolutions(device, "direct")),
        ("auto", lambda device: convolutions(device, "auto")),
    ):
        call(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: no error raised", flush=True)  # how far a run came that is cut short
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
