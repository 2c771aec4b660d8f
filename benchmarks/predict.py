"""Times a prediction of many samples against one pass for each of them.

Both sides average the probabilities of the same functions over the same images with the same
layers: `predict` puts several functions into a pass, `passes` runs the model once for each under
`fixed_sample`; `passes, no noise` runs it as often with mean weights, which tells what drawing the
weights costs. They take turns in one process, in an order shuffled at every turn; the ratio is
taken within each turn, and the time ends when the result has been released, as in `timer.py` of
fastbconv/bench.

    python benchmarks/predict.py [--network resnet18] [--batch 8] [--samples 32] [--turns 15]
                                 [--samples-per-pass 4 8 16] [--threads 2] [--layout nhwc|nchw]

Prints the machine, and median and quartiles of the times and of passes / predict: above 1 `predict`
is faster. Take figures for publication from a quiet machine; the last line says where it was not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastbconv as fb
from fastbconv.bench import machine
from fastbconv.bench.columns import COLUMNS
from fastbconv.bench.network_columns import NetworkProblem
from fastbconv.bench.networks import NETWORKS
from fastbconv.bench.shapes import NetworkRow
from fastbconv.bench.statistics import quartiles, ratios
from fastbconv.bench.timer import Effort, interleave

COLUMN_OF = {"nhwc": "auto", "nchw": "auto-nchw"}


def passes(model: nn.Module, images: Tensor, num_samples: int) -> Tensor:
    """The mean probabilities, by a pass for each function."""
    total = torch.zeros(())
    with torch.no_grad():
        for sample in range(num_samples):
            with fb.fixed_sample(model, 0, sample=sample):
                total = total + model(images).double().softmax(1)
    return total / num_samples


def mean_passes(model: nn.Module, images: Tensor, num_passes: int) -> Tensor:
    """As many passes of the same layers, without noise."""
    total = torch.zeros(())
    with torch.no_grad(), fb.mean_weights(model):
        for _ in range(num_passes):
            total = total + model(images).double().softmax(1)
    return total / num_passes


def calls(
    model: nn.Module, images: Tensor, num_samples: int, together: list[int]
) -> dict[str, Callable[[], Tensor]]:
    """What is timed; predictions are checked to agree."""
    made: dict[str, Callable[[], Tensor]] = {
        "passes": lambda: passes(model, images, num_samples),
        "predict": lambda: fb.predict(model, images, num_samples).mean,
    }
    for count in together:
        options = {"batch_size": len(images), "samples_per_pass": count}
        made[f"predict, {count} a pass"] = lambda options=options: (
            fb.predict(model, images, num_samples, **options).mean
        )
    expected = made["passes"]()
    for call in made.values():
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-6)
    made["passes, no noise"] = lambda: mean_passes(model, images, num_samples)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--samples-per-pass", type=int, nargs="*", default=[])
    parser.add_argument("--layout", default="nhwc", choices=COLUMN_OF)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, value in machine.environment(options.threads).items():
        print(f"{name:<22} {'-' if value is None else value}")
    problem = NetworkProblem(NetworkRow(options.network, options.batch))
    model = problem.build(COLUMNS[COLUMN_OF[options.layout]]).model.eval()
    images = problem.image(options.layout)
    timed = calls(model, images, options.samples, options.samples_per_pass)
    before = machine.others(), machine.cpu_time()
    samples = interleave(timed, Effort(budget=0.0, turns=options.turns, warm_up=1))
    after = machine.cpu_time(), machine.others()
    print(f"\n{options.network}, batch {options.batch}, {options.samples} samples")
    base = samples["passes"].seconds
    for name, found in samples.items():
        low, middle, high = (1e3 * value for value in quartiles(found.seconds))
        ratio = ratios(base, found.seconds)
        print(
            f"{name:<22} {middle:9.1f} ms ({low:.1f} to {high:.1f})   "
            f"passes / this {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        )
    preempted = [flag for found in samples.values() for flag in found.preempted]
    stolen = machine.share("stolen", before[1], after[0])
    for text in machine.complaints((before[0], after[1]), stolen, sum(preempted) / len(preempted)):
        print(f"WARNING: {text}: do not quote these figures")


if __name__ == "__main__":
    main()
