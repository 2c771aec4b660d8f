"""The columns of the table. One function each: it gets a row's data and returns a Program.

To add a column, write a function and decorate it; a library that may be missing goes to peers.py,
and what the column is for a whole network to network_columns.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import estimators, noise

from .problem import Problem, Program, closed_form_kl, program, unfused_layer
from .replay import replayed

FLOOR: Final = 2.0**-23  # what the torch face adds to softplus(rho)
F4_SLACK: Final = (
    16.0  # F(4x4, 3x3) is about that much less accurate, which is why it is on request
)
Build = Callable[[Problem], Program]


@dataclass(frozen=True)
class Column:
    """One way to compute the layer.

    Attributes:
        name: in tables and on the command line.
        text: what is timed, for the header.
        build: data of a row -> calls.
        group: "deterministic", "ours", "estimator", "unfused" or "peer".
        default: whether it is measured when no columns are named.
    """

    name: str
    text: str
    build: Build
    group: str
    default: bool = True


COLUMNS: dict[str, Column] = {}


def _column(name: str, text: str, group: str, default: bool = True) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        COLUMNS[name] = Column(name, text, build, group, default)
        return build

    return register


def _leaves(problem: Problem, layout: str, parameters: str) -> dict[str, Tensor]:
    return {
        "input": problem.leaf("input", layout),
        "loc": problem.leaf("loc", parameters),
        "rho": problem.leaf("rho", parameters),
        "bias": problem.leaf("bias", parameters),
    }


# --- the deterministic layer: the better of the two is the denominator of every ratio -------------


def _deterministic(problem: Problem, layout: str) -> Program:
    padding = problem.shape.padding

    def layer(input: Tensor, loc: Tensor, bias: Tensor) -> tuple[Tensor, None]:
        return F.relu(F.conv2d(input, loc, bias, padding=padding)), None

    leaves = _leaves(problem, layout, layout)
    del leaves["rho"]
    right = ("output", "input", "loc", "bias")
    return program(problem, layer, leaves, layout, None, right=right)


_column("det-nchw", "F.relu(F.conv2d), contiguous tensors", "deterministic")(
    partial(_deterministic, layout="nchw")
)
_column("det-nhwc", "F.relu(F.conv2d), channels_last tensors", "deterministic")(
    partial(_deterministic, layout="nhwc")
)


# --- ours -----------------------------------------------------------------------------------------


def _seeded_eps(problem: Problem, seed: int) -> Tensor:
    """The noise of a call that drew its seed right after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return noise.weight_eps(noise.draw_seed(), problem.loc.shape)


def _ours(
    problem: Problem,
    algorithm: str,
    layout: str = "nhwc",
    keep_weight: bool = False,
    slack: float = 1.0,
) -> Program:
    padding = problem.shape.padding

    def layer(input: Tensor, loc: Tensor, rho: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with fb.algorithm(algorithm, keep_weight=keep_weight):
            return fb.functional.bayes_conv2d(
                input, loc, rho, bias, padding=padding, activation="relu", return_kl=True
            )

    leaves, eps = _leaves(problem, layout, layout), partial(_seeded_eps, problem)
    return program(problem, layer, leaves, layout, eps, scale_floor=FLOOR, slack=slack)


for _name, _text, _default, _slack in (
    ("auto", "chosen by shape", True, 1.0),
    ("direct", "direct kernels", True, 1.0),
    ("library", "our sampling pass, then PyTorch's convolution", True, 1.0),
    ("winograd2", "F(2x2, 3x3) kernels", False, 1.0),
    ("winograd2x4", "F(2x4, 3x3) kernels", False, 2.0),
    ("winograd4", "F(4x4, 3x3) kernels", False, 4.0),
):
    _column(
        _name,
        f"ours, {_text}; noise, KL, bias, relu in one call; channels_last tensors",
        "ours",
        _default,
    )(partial(_ours, algorithm=_name, slack=_slack))
_column("auto-nchw", "ours, as auto, contiguous tensors", "ours", False)(
    partial(_ours, algorithm="auto", layout="nchw")
)
_column("auto-keep", "ours, as auto, the sampled weight kept for backward", "ours", False)(
    partial(_ours, algorithm="auto", keep_weight=True)
)


@_column("on-access", "ours, as auto, the KL by layer.kl_loss() in a pass of its own", "ours")
def _on_access(problem: Problem) -> Program:
    shape = problem.shape
    layer = fb.BayesConv2d(shape.C, shape.K, shape.k, padding=shape.padding, activation="relu")
    leaves = _leaves(problem, "nhwc", "nhwc")
    layer.weight, layer.weight_rho, layer.bias = (
        nn.Parameter(leaves[name].detach()) for name in ("loc", "rho", "bias")
    )
    leaves.update(loc=layer.weight, rho=layer.weight_rho, bias=layer.bias)

    def call(input: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return layer(input), layer.kl_loss()

    return program(problem, call, leaves, "nhwc", partial(_seeded_eps, problem), scale_floor=FLOOR)


# --- other estimators -----------------------------------------------------------------------------


def _replayed(
    problem: Problem, estimator: str, seed: int, input: Tensor, loc: Tensor, scale: Tensor
) -> Tensor:
    """Our Flipout or local reparameterisation of one call, by plain PyTorch on its noise."""
    torch.manual_seed(seed)
    apply = partial(F.conv2d, padding=problem.shape.padding)
    return replayed(noise.draw_seed(), estimator, apply, input, loc, scale)


def _estimator(problem: Problem, name: str) -> Program:
    def layer(input: Tensor, loc: Tensor, rho: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return fb.functional.bayes_conv2d(
            input, loc, rho, bias, padding=problem.shape.padding, activation="relu",
            return_kl=True, estimator=name,
        )  # fmt: skip

    leaves = _leaves(problem, "nhwc", "nhwc")
    affine = partial(_replayed, problem, name)
    return program(problem, layer, leaves, "nhwc", None, affine=affine, scale_floor=FLOOR)


def _estimator_by_hand(problem: Problem, name: str) -> Program:
    """Two convolutions and what goes around them, as anybody writes it."""
    shape = problem.shape
    apply = partial(F.conv2d, padding=shape.padding)

    def layer(input: Tensor, loc: Tensor, rho: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scale = F.softplus(rho)
        if name == "flipout":
            delta = scale * torch.randn_like(loc)
            r = torch.randint(2, (shape.N, shape.C, 1, 1), dtype=input.dtype) * 2 - 1
            t = torch.randint(2, (shape.N, shape.K, 1, 1), dtype=input.dtype) * 2 - 1
            z = estimators.flipout(apply, input, loc, delta, r, t)
        else:
            mean, deviation = estimators.local_moments(apply, input, loc, scale)
            # In the memory of its neighbours, and eight times as fast as randn_like(mean).
            eps = torch.randn(shape.N, shape.H, shape.H, shape.K).permute(0, 3, 1, 2)
            z = mean + deviation * eps
        return F.relu(z + bias[:, None, None]), closed_form_kl(loc, scale)

    leaves = _leaves(problem, "nhwc", "nchw")
    # Its noise is not replayed: what is compared is the KL.
    return program(problem, layer, leaves, "nhwc", None, right=("kl",))


for _name, _text in (("flipout", "Flipout"), ("local", "local reparameterisation")):
    _column(
        _name,
        f"ours, {_text}; noise, KL, bias, relu in one call; channels_last tensors",
        "estimator",
        False,
    )(partial(_estimator, name=_name))
    _column(
        f"{_name}-unfused",
        f"{_text} by two convolutions of PyTorch, channels_last input",
        "estimator",
        False,
    )(partial(_estimator_by_hand, name=_name))


# --- ten lines of PyTorch -------------------------------------------------------------------------


def randn_eps(problem: Problem, seed: int) -> Tensor:
    """The noise of a call whose first draw is torch.randn_like(loc), contiguous."""
    torch.manual_seed(seed)
    return torch.randn_like(problem.loc)


def _unfused(problem: Problem, layout: str) -> Program:
    # Contiguous parameters in both: noise for channels_last ones costs eight times as much, so this
    # is the faster way to write it.
    leaves = _leaves(problem, layout, "nchw")
    layer = partial(unfused_layer, padding=problem.shape.padding)
    return program(problem, layer, leaves, layout, partial(randn_eps, problem))


_column("unfused-nchw", "ten lines of PyTorch, contiguous tensors", "unfused")(
    partial(_unfused, layout="nchw")
)
_column("unfused-nhwc", "ten lines of PyTorch, channels_last input", "unfused")(
    partial(_unfused, layout="nhwc")
)


def select(names: Sequence[str], peers: Sequence[Column]) -> list[Column]:
    """Columns by name, in the order of the registry; the deterministic ones always.

    Args:
        names: of columns; "default", "all" and "peers" stand for several.
        peers: the columns of peers.py that can be had.

    Raises:
        ValueError: a name that does not exist or cannot be had.
    """
    known = {**COLUMNS, **{peer.name: peer for peer in peers}}
    groups = {
        "default": [name for name, column in COLUMNS.items() if column.default],
        "all": list(COLUMNS),
        "peers": [peer.name for peer in peers],
    }
    wanted = {name for name, column in COLUMNS.items() if column.group == "deterministic"}
    for name in names:
        if name not in groups and name not in known:
            raise ValueError(
                f"columns: expected some of {', '.join([*groups, *known])}, got {name}"
            )
        wanted.update(groups.get(name, [name]))
    return [column for name, column in known.items() if name in wanted]
