"""Stage 3, the part that needs no test runner: the device against the CPU, float64 and itself.

The reference draws the same noise (the CPU's, which the first check compares bit for bit), rounds
the sampled weight as the kernels do, and computes everything else in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbconv as fb

from .stage import Bench

FLOOR = 2.0**-23  # what is added to softplus(rho)
KL_WEIGHT = 1.0 / 50_000
NAMES = ("output", "kl", "input", "loc", "rho", "bias")
# Largest ||result - reference|| / ||reference||. bfloat16 and float16: one rounding of the output,
# and of the operands of the gradients; float32: long sums, by Winograd perhaps.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One layer: N, C, H (= W), K, filter, stride."""

    N: int
    C: int
    H: int
    K: int
    k: int
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.N}x{self.C}x{self.H}>{self.K} {self.k}x{self.k}/{self.stride}"

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """input, loc, rho, bias: the same numbers on every device."""
        draw = torch.Generator().manual_seed(self.N + 7 * self.C + 31 * self.K + self.k)
        shape = (self.K, self.C, self.k, self.k)
        spread = (self.C * self.k**2) ** -0.5
        values = [
            torch.randn(self.N, self.C, self.H, self.H, generator=draw).to(dtype),
            torch.randn(shape, generator=draw) * spread,
            torch.randn(shape, generator=draw) * 0.3 - 3.0,
            torch.randn(self.K, generator=draw),
        ]
        channels_last = {"memory_format": torch.channels_last}
        values[:3] = [value.to(device, **channels_last) for value in values[:3]]
        values[3] = values[3].to(device)
        return [value.requires_grad_() for value in values]

    def incoming(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The gradient of the output."""
        side = (self.H + 2 * (self.k // 2) - self.k) // self.stride + 1
        draw = torch.Generator().manual_seed(1)
        value = torch.randn(self.N, self.K, side, side, generator=draw).to(dtype)
        return value.to(device, memory_format=torch.channels_last)


CASES = (
    Case(4, 64, 16, 64, 3), Case(2, 17, 9, 40, 3, 2), Case(3, 3, 32, 64, 7, 2),
    Case(8, 1, 28, 6, 5), Case(2, 256, 8, 512, 1), Case(2, 512, 4, 512, 3), Case(1, 8, 5, 8, 3),
)  # fmt: skip
TINY_CASES = (Case(2, 3, 6, 4, 3), Case(1, 1, 5, 2, 3, 2))


def cases(bench: Bench) -> tuple[Case, ...]:
    """Which layers are compared."""
    return TINY_CASES if bench.dry else CASES


def step(
    case: Case,
    leaves: list[Tensor],
    seed: Tensor | None,
    algorithm: str,
    incoming: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Output, KL and the four gradients."""
    if incoming is None:
        incoming = case.incoming(leaves[0].device, leaves[0].dtype)
    with fb.algorithm(algorithm):
        output, kl = fb.functional.bayes_conv2d(
            *leaves,
            stride=case.stride,
            padding=case.k // 2,
            activation="relu",
            seed=seed,
            return_kl=True,
        )
        both = (incoming, torch.full_like(kl, KL_WEIGHT))
        grads = torch.autograd.grad((output, kl), leaves, both)
    return (output.detach(), kl.detach(), *grads)


def reference(case: Case, leaves: list[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """The same on the CPU in float64, from the same noise."""
    dtype = leaves[0].dtype
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    input, loc, rho, bias = wide
    eps = fb.noise.weight_eps(seed.cpu(), tuple(loc.shape)).double()
    scale = FLOOR + F.softplus(rho)
    weight = loc + scale * eps
    weight = weight + (weight.detach().to(dtype).double() - weight.detach())  # rounded, as ours is
    output = F.relu(F.conv2d(input, weight, bias, case.stride, case.k // 2))
    kl = (0.5 * (scale.square() + loc.square()) - scale.log() - 0.5).sum()
    incoming = case.incoming(output.device, dtype).double()
    total = (output * incoming).sum() + KL_WEIGHT * kl
    return (output.detach(), kl.detach(), *torch.autograd.grad(total, wide))


def distance(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN becomes infinity."""
    wide = actual.detach().cpu().double()
    value = ((wide - expected.cpu().double()).norm() / expected.cpu().double().norm()).item()
    return value if value == value else float("inf")


def seed_on(device: torch.device, number: int = 0) -> Tensor:
    """A noise seed."""
    return torch.tensor([0x243F6A8885A308D3 + number, 7], dtype=torch.int64, device=device)


def poison(bench: Bench) -> None:
    """Leaves NaN in memory that the next allocations get: every element must be written."""
    blocks = [torch.full((1 << bits,), float("nan"), device=bench.device) for bits in (10, 16, 20)]
    del blocks


def exact_math() -> None:
    """float32 products in float32, and deterministic convolutions."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def noise_bits(bench: Bench) -> dict[str, Any]:
    """G16: eps of the device against the CPU's, bit for bit."""
    bench.need_ours()
    chunk, total = (1000, 4000) if bench.dry else (10**7, 10**7 if bench.quick else 10**8)
    differ = 0
    worst = 0.0
    draw = torch.ops.fastbconv.standard_normal.default
    for number, first in enumerate(range(0, total, chunk)):
        options = {"stream": number % 2, "sample": number, "element_offset": first + number}
        mine = draw(seed_on(bench.device, number), chunk, **options).cpu()
        host = draw(seed_on(torch.device("cpu"), number), chunk, **options)
        differ += int((mine.view(torch.int32) != host.view(torch.int32)).sum())
        worst = max(worst, (mine - host).abs().max().item())
    if differ:
        raise AssertionError(f"eps: {differ} of {total} values differ, by up to {worst:.3g}")
    return {"values": total, "differ": differ, **bench.instead("the CPU against itself")}


def against_float64(bench: Bench, algorithm: str, dtype: torch.dtype) -> dict[str, Any]:
    """Output, KL and gradients of every case; the CPU's own distance beside."""
    bench.need_ours()
    exact_math()
    rows, wrong = {}, []
    for case in cases(bench):
        leaves = case.tensors(bench.device, dtype)
        poison(bench)
        ours = step(case, leaves, seed_on(bench.device), algorithm)
        exact = reference(case, leaves, seed_on(bench.device))
        host = step(
            case, case.tensors(torch.device("cpu"), dtype), seed_on(torch.device("cpu")), "auto"
        )
        far = {name: distance(*pair) for name, *pair in zip(NAMES, ours, exact, strict=True)}
        from_cpu = {name: distance(*pair) for name, *pair in zip(NAMES, ours, host, strict=True)}
        rows[str(case)] = {"from float64": far, "from the CPU": from_cpu}
        wrong += [
            f"{case} {name}: {value:.2g}" for name, value in far.items() if value > BOUND[dtype]
        ]
    if wrong:
        raise AssertionError(f"further than {BOUND[dtype]} from float64: {'; '.join(wrong)}")
    return {"bound": BOUND[dtype], "cases": rows, **bench.instead("tiny layers on the CPU")}


def twice_the_same(bench: Bench, algorithm: str) -> dict[str, Any]:
    """Two runs from one seed are bitwise equal."""
    bench.need_ours()
    exact_math()
    wrong = []
    for case in cases(bench):
        leaves = case.tensors(bench.device, torch.bfloat16)
        first = step(case, leaves, seed_on(bench.device), algorithm)
        poison(bench)
        again = step(case, leaves, seed_on(bench.device), algorithm)
        wrong += [
            f"{case} {name}"
            for name, a, b in zip(NAMES, first, again, strict=True)
            if not torch.equal(a, b)
        ]
    if wrong:
        raise AssertionError(f"two runs differ: {'; '.join(wrong)}")
    return {"cases": len(cases(bench)), **bench.instead("tiny layers on the CPU")}


def replay(bench: Bench, algorithm: str) -> dict[str, Any]:
    """A captured step replays with fresh noise; with a given seed it equals the eager step."""
    bench.need_ours()
    exact_math()
    case = cases(bench)[0]
    leaves = case.tensors(bench.device, torch.bfloat16)
    seed = seed_on(bench.device)
    incoming = case.incoming(bench.device, torch.bfloat16)  # no copy from the host in a graph
    given = bench.clock.capture(lambda: step(case, leaves, seed, algorithm, incoming))
    for number in range(3):
        seed.copy_(seed_on(bench.device, number))
        graphed = [tensor.clone() for tensor in given()]
        eager = step(case, leaves, seed_on(bench.device, number), algorithm)
        for name, a, b in zip(NAMES, graphed, eager, strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name}: replay {number} differs from the eager step")
    drawn = bench.clock.capture(lambda: step(case, leaves, None, algorithm, incoming)[0])
    outputs = [drawn().clone() for _ in range(3)]
    if any(torch.equal(outputs[0], other) for other in outputs[1:]):
        raise AssertionError("two replays drew the same noise")
    replays = 6 if bench.clock.cuda else 0
    return {"replays": replays, **bench.instead("calls of a CPU: there was no graph")}


STRESS = (
    Case(2, 64, 8, 64, 3), Case(1, 512, 4, 512, 3), Case(16, 64, 16, 64, 3), Case(5, 17, 7, 33, 3),
    Case(4, 128, 8, 256, 1, 2), Case(64, 3, 16, 64, 3), Case(3, 256, 6, 128, 3),
)  # fmt: skip


def stress(bench: Bench) -> dict[str, Any]:
    """Thousands of one-pass launches of changing shapes on several streams, all bitwise right."""
    bench.need_ours()
    shapes = TINY_CASES if bench.dry else STRESS
    launches = 30 if bench.dry else 1000 if bench.quick else 6000
    seed = seed_on(bench.device)

    def call(leaves: list[Tensor], case: Case) -> Tensor:
        options = {"stride": case.stride, "padding": case.k // 2, "activation": "relu"}
        return fb.functional.bayes_conv2d(*leaves, seed=seed, **options)

    with torch.no_grad(), fb.algorithm("direct"):
        data = [case.tensors(bench.device, torch.bfloat16) for case in shapes]
        expected = [call(*pair) for pair in zip(data, shapes, strict=True)]
        bench.clock.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)] if bench.clock.cuda else [None]
        wrong = [torch.zeros((), dtype=torch.int64, device=bench.device) for _ in streams]
        bench.clock.synchronize()
        order = torch.randint(len(shapes), (launches,), generator=torch.Generator().manual_seed(0))
        for number, which in enumerate(order.tolist()):
            lane = number % len(streams)
            with torch.cuda.stream(streams[lane]):  # of None: no effect
                output = call(data[which], shapes[which])
                wrong[lane] += (output != expected[which]).sum()  # also where it is NaN
    bench.clock.synchronize()
    differ = int(sum(int(count) for count in wrong))
    if differ:
        raise AssertionError(f"{differ} elements differ in {launches} launches")
    found = {"launches": launches, "streams": len(streams), "shapes": len(shapes)}
    return found | bench.instead("calls of a CPU, one after the other")
