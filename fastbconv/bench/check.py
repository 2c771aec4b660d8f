"""Is the right thing timed? Every column against float64, on the noise that it drew itself.

A result may be as wrong as PyTorch's own float32 one, times the factors of ``testing``. PyTorch's
own is the layout with the larger error, since its two layouts sum in different orders. Where the
activation has its kink, the sign of a sum near zero is nobody's error: gradients are compared for
the mask that the column itself produced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbconv import testing

from .columns import Column
from .network_check import check_network
from .network_columns import NetworkProblem, problem_of
from .problem import FORMATS, Problem, Program, Result, closed_form_kl
from .shapes import Row

_SEED = 20


def check(
    shapes: Iterable[Row],
    columns: Iterable[Column],
    say: Callable[[str], object] = lambda text: None,
) -> tuple[int, list[str]]:
    """Runs both directions of every column on every row.

    Args:
        shapes: the rows.
        columns: the columns.
        say: receives a line per row, and every mistake as soon as it is found.

    Returns:
        How many pairs of row and column were compared: one that raises NotImplementedError is not;
        and a sentence for each that is wrong or failed in another way.
    """
    compared, wrong = 0, []
    for shape in shapes:
        problem = problem_of(shape)
        for column in columns:
            try:
                program = problem.build(column)
                if isinstance(problem, NetworkProblem):
                    check_network(problem, program)
                else:
                    _check_program(problem, program)
            except NotImplementedError as error:
                say(f"not compared: {shape} {column.name}: {error}")
                continue
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{shape} {column.name} {error}")
                say(f"WRONG: {wrong[-1]}")
            compared += 1
        say(f"checked {shape}")
    return compared, wrong


def _check_program(problem: Problem, program: Program) -> None:
    eps = torch.zeros_like(problem.loc) if program.eps is None else program.eps(_SEED)
    for direction in ("forward", "step"):
        torch.manual_seed(_SEED)
        with torch.set_grad_enabled(direction == "step"):
            result: Result = getattr(program, direction)()
        exact = _evaluate(problem, program, eps, result, "nchw", torch.float64)
        own = [
            _evaluate(problem, program, eps, result, layout, torch.float32) for layout in FORMATS
        ]
        got = {"output": result.output.detach(), "kl": result.kl}
        got |= zip(program.leaves, result.grads, strict=False)
        for name in program.right:
            if name not in got:
                continue
            forward = name in ("output", "kl")
            factor = testing.FORWARD_FACTOR if forward else testing.GRADIENT_FACTOR
            worse = max((values[name] for values in own), key=partial(_error, exact[name]))
            label = f"{direction}: {name}" if forward else f"d {name}"
            testing.assert_ratio(got[name], worse, exact[name], program.slack * factor, label)


def _error(exact: Tensor, value: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def _evaluate(
    problem: Problem,
    program: Program,
    eps: Tensor,
    result: Result,
    layout: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Output, KL and gradients by plain PyTorch in ``dtype``, with the mask of ``result``."""
    leaves = {
        name: problem.leaf(name, layout).detach().to(dtype).requires_grad_()
        for name in ("input", "loc", "rho", "bias")
    }
    input, loc, rho, bias = leaves.values()
    scale = program.scale_floor + F.softplus(rho)
    if program.affine is None:
        weight = loc + scale * eps.to(dtype)
        before = F.conv2d(input, weight, bias, padding=problem.shape.padding)
    else:
        before = program.affine(_SEED, input, loc, scale) + bias[:, None, None]
    kl = closed_form_kl(loc, scale)
    values = {"output": before.detach().relu(), "kl": kl.detach()}
    if not result.grads:
        return values
    mask = problem.image("grad_output", layout) * (result.output > 0)
    outputs, incoming = [before], [mask.to(dtype)]
    if result.kl is not None and "kl" in program.right:
        outputs.append(kl)
        incoming.append(problem.grad_kl.to(dtype))
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return values | dict(zip(leaves, grads, strict=True))
