"""Is the right network timed? Every column against float64, on the noise that it drew itself.

The network is computed again in plain PyTorch, layer by layer, with each layer's own draw. Where
relu and max-pooling have their kinks, a rounding error can decide which side is taken, and one
pixel that takes the other changes a gradient by far more than rounding does. The column's own
decisions are therefore recorded, and the computation again takes the same. The rule is then that
for layers: at most twice (gradients: three times) the error that PyTorch makes in float32 against
float64, in the worse of its two memory formats. PyTorch's error of a gradient is taken over all
parameters of a layer, relative to the largest value of each: some biases have six numbers, too few
to tell how large an error can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbconv import noise, testing

from .network_columns import NetworkProblem, NetworkProgram
from .networks import Kit, Rectifier
from .problem import FORMATS, KL_WEIGHT, Result, closed_form_kl
from .replay import replayed

_SEED = 20


def check_network(problem: NetworkProblem, program: NetworkProgram) -> None:
    """Compares both directions: logits, KL, and the gradient of every parameter.

    Args:
        problem: the row.
        program: the column.

    Raises:
        AssertionError: a result that is further from float64 than the rule allows.
    """
    calls: dict[str, tuple[Result, list[Tensor]]] = {}
    for direction in ("forward", "step"):
        torch.manual_seed(_SEED)
        with torch.set_grad_enabled(direction == "step"), _decisions(program.model) as taken:
            calls[direction] = getattr(program, direction)(), taken
    if not program.right:
        return
    step, decided = calls["step"]
    replays = _replays(problem, program, decided, step)
    _compare(program, "forward", calls["forward"][0], _of_forward(problem, program, calls, replays))
    _compare(program, "step", step, replays)


def _of_forward(
    problem: NetworkProblem,
    program: NetworkProgram,
    calls: dict[str, tuple[Result, list[Tensor]]],
    of_step: Sequence[dict[str, Tensor]],
) -> Sequence[dict[str, Tensor]]:
    """The replays of the forward pass: those of the step, where both decided alike."""
    result, taken = calls["forward"]
    if all(map(torch.equal, taken, calls["step"][1])):
        return of_step
    return _replays(problem, program, taken, result)


def _replays(
    problem: NetworkProblem, program: NetworkProgram, taken: list[Tensor], result: Result
) -> Sequence[dict[str, Tensor]]:
    """The network again: in float64, then in float32 in both memory formats."""
    forms = [("nchw", torch.float64), *((layout, torch.float32) for layout in FORMATS)]
    return [_again(problem, program, taken, result, *form) for form in forms]


def _compare(
    program: NetworkProgram, direction: str, result: Result, replays: Sequence[dict[str, Tensor]]
) -> None:
    exact, *own = replays
    if "kl" in program.right and result.kl is None:
        raise AssertionError(f"{direction}: kl: expected one, got None")
    got = {"output": result.output.detach(), "kl": result.kl}
    if "parameters" in program.right:
        names = [name for name, _ in program.model.named_parameters()]
        got |= zip(names, result.grads, strict=False)
    errors = _errors(exact, own)
    for name, value in got.items():
        if name not in exact or (name in ("output", "kl") and name not in program.right):
            continue
        forward = name in ("output", "kl")
        factor = testing.FORWARD_FACTOR if forward else testing.GRADIENT_FACTOR
        theirs = exact[name] + errors[_layer(name)] * exact[name].abs().max()
        label = f"{direction}: {name}" if forward else f"d {name}"
        testing.assert_ratio(value, theirs, exact[name], factor, label)


def _layer(name: str) -> str:
    """What the error of a result is taken over: the layer of a parameter, or the result alone."""
    return name.rpartition(".")[0] or name


def _errors(exact: dict[str, Tensor], runs: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """layer -> the largest error of PyTorch's runs, relative to the largest value of a tensor."""
    errors: dict[str, float] = {}
    for name, value in exact.items():
        largest = value.abs().max().item() or 1.0
        error = max((run[name].double() - value).abs().max().item() for run in runs) / largest
        errors[_layer(name)] = max(errors.get(_layer(name), 0.0), error)
    return errors


@contextmanager
def _decisions(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives, in the order of the calls, what each kink of the model decided."""
    taken: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Rectifier):
            taken.append(output.detach() > 0)
        else:
            taken.append(F.max_pool2d(inputs[0].detach(), 2, return_indices=True)[1])

    kinks = [m for m in model.modules() if isinstance(m, Rectifier | nn.MaxPool2d)]
    handles = [module.register_forward_hook(record) for module in kinks]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _again(
    problem: NetworkProblem,
    program: NetworkProgram,
    taken: list[Tensor],
    result: Result,
    layout: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Logits, KL and gradients by plain PyTorch in ``dtype``, on the noise of that call."""
    kit = _ReplayKit(program, iter(taken))
    model = problem.model(kit).to(dtype).to(memory_format=FORMATS[layout]).train()
    wants_grads = "parameters" in program.right and bool(result.grads)
    torch.manual_seed(_SEED)
    with torch.set_grad_enabled(wants_grads):
        output = model(problem.image(layout).to(dtype))
        values = {"output": output.detach()}
        loss = F.cross_entropy(output, problem.target)
        if kit.terms and result.kl is not None:
            kl = torch.stack(kit.terms).sum()
            values["kl"] = kl.detach()
            loss = loss + KL_WEIGHT * kl
    if wants_grads:
        named = dict(model.named_parameters())
        wanted = {name: value for name, value in named.items() if name in program.leaves}
        grads = torch.autograd.grad(loss, list(wanted.values()))
        values |= zip(wanted, grads, strict=True)
    return values


class _ReplayKit(Kit):
    """Plain layers that draw as a column's layers did, and kinks that decide as its kinks did."""

    def __init__(self, program: NetworkProgram, taken: Iterator[Tensor]) -> None:
        self.program, self.taken = program, taken
        self.terms: list[Tensor] = []

    def conv(
        self, C: int, K: int, k: int, stride: int, padding: int, bias: bool, relu: bool
    ) -> nn.Module:
        return _Again(self, partial(F.conv2d, stride=stride, padding=padding), (K, C, k, k), bias)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        return _Again(self, F.linear, (K, C), True)

    def relu(self, after_affine: bool) -> nn.Module:
        return _Kink(lambda x: x * next(self.taken))

    def pool(self) -> nn.Module:
        def chosen(x: Tensor) -> Tensor:
            index = next(self.taken)
            return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)

        return _Kink(chosen)


class _Kink(nn.Module):
    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decide = decide

    def forward(self, input: Tensor) -> Tensor:
        return self.decide(input)


class _Again(nn.Module):
    """One layer in plain PyTorch, in the dtype of its parameters, on the noise of the column."""

    def __init__(
        self, kit: _ReplayKit, apply: Callable[..., Any], size: tuple[int, ...], bias: bool
    ) -> None:
        super().__init__()
        self.weight, self.weight_rho = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(size[0])) if bias else None
        self.apply_map, self.kit = apply, kit

    def forward(self, input: Tensor) -> Tensor:
        program, loc = self.kit.program, self.weight
        if program.noise is None:
            return self.apply_map(input, loc, self.bias)
        scale = program.scale_floor + F.softplus(self.weight_rho)
        self.kit.terms.append(closed_form_kl(loc, scale))
        if program.noise.startswith("torch"):
            eps = torch.randn(loc.shape).to(loc.dtype)
            if program.noise == "torch, biases too" and self.bias is not None:
                torch.randn(self.bias.shape)  # drawn, and of no effect: its scale is negligible
            return self.apply_map(input, loc + scale * eps, self.bias)
        seed = noise.draw_seed()
        z = replayed(seed, program.estimator, self.apply_map, input, loc, scale)
        if self.bias is None:
            return z
        return z + self.bias.view(-1, *(1 for _ in z.shape[2:]))
