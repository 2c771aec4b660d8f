"""The columns of the table for whole networks: what each of ``columns`` is for a model.

Every column has the same parameters and images. Forward is a pass in train mode; a step ends with
the gradients of all parameters, of the mean cross entropy and the KL's share, and without an
optimiser. What a column cannot be for a network it says by NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb

from .columns import FLOOR, Column
from .networks import CLASSES, NETWORKS, Kit
from .problem import FORMATS, KL_WEIGHT, SCALE, Problem, Result, closed_form_kl
from .shapes import NetworkRow, Row

Run = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]
_NO_NOISE = -30.0  # raw scale of a bias


@dataclass(frozen=True)
class NetworkProgram:
    """One column on one network: calls ready to be timed, as in ``problem.Program``.

    Attributes:
        forward: a pass without graph: logits and KL.
        step: a pass and the gradients of the model's parameters, in their order.
        graph: a pass with graph and without backward, for what is saved.
        leaves: name -> images and parameters.
        model: the network.
        noise: where its noise comes from: "ours", "torch" (randn of each weight), "torch, biases
            too" (randn of each weight and then of its bias), or None.
        estimator: how ours enters.
        scale_floor: added to softplus(rho).
        right: results that --check compares: "output", "kl", "parameters" (their gradients).
    """

    forward: Callable[[], Result]
    step: Callable[[], Result]
    graph: Callable[[], Result]
    leaves: dict[str, Tensor]
    model: nn.Module
    noise: str | None = None
    estimator: str = "reparameterization"
    scale_floor: float = 0.0
    right: tuple[str, ...] = ("output", "kl", "parameters")


class NetworkProblem:
    """Data of one row: images, labels, and one state of the network for all columns."""

    def __init__(self, row: NetworkRow, seed: int = 1) -> None:
        self.row = row
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(row.N, *NETWORKS[row.name].image, generator=generator)
        self.target = torch.randint(CLASSES, (row.N,), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.state = NETWORKS[row.name](Kit()).state_dict()
        for name, loc in list(self.state.items()):
            if loc.ndim > 1:  # a weight; what is normalised has no posterior
                spread = torch.tensor(SCALE * loc[0].numel() ** -0.5)
                rho = 0.1 * torch.randn(loc.shape, generator=generator) + spread.expm1().log()
                self.state[f"{name}_rho"] = rho

    def image(self, layout: str) -> Tensor:
        """The images in a layout."""
        return self.images.contiguous(memory_format=FORMATS[layout])

    def model(self, kit: Kit, layout: str = "nchw") -> nn.Module:
        """The network of a kit with the state of this row, parameters in a layout."""
        made = NETWORKS[self.row.name](kit)
        made.load_state_dict(self.state, strict=False)  # a plain network has no rho
        return made.to(memory_format=FORMATS[layout])

    def build(self, column: Column) -> NetworkProgram:
        """The calls of a column.

        Raises:
            NotImplementedError: the column does not exist for networks, with the reason.
        """
        if column.name not in BUILDS:
            reason = _LACKING.get(column.name, "measured on single layers only")
            raise NotImplementedError(f"not available for networks: {reason}")
        return BUILDS[column.name](self)


def problem_of(row: Row) -> Problem | NetworkProblem:
    """The data of a row, of whichever kind."""
    return NetworkProblem(row) if isinstance(row, NetworkRow) else Problem(row)


def _program(
    problem: NetworkProblem, model: nn.Module, run: Run, layout: str, **more: object
) -> NetworkProgram:
    """A column from a pass: ``run(images)`` -> (logits, kl or None)."""
    image, target = problem.image(layout), problem.target
    parameters = list(model.parameters())
    model.train()

    def forward() -> Result:
        return Result(*run(image))

    def step() -> Result:
        output, kl = run(image)
        loss = F.cross_entropy(output, target)
        if kl is not None:
            loss = loss + KL_WEIGHT * kl
        loss.backward()
        grads = tuple(parameter.grad for parameter in parameters)
        for parameter in parameters:
            parameter.grad = None  # they are released with the result, inside the call's time
        return Result(output, kl, grads)

    leaves = {"input": image, **dict(model.named_parameters()), **dict(model.named_buffers())}
    return NetworkProgram(forward, step, forward, leaves, model, **more)


# --- the deterministic network --------------------------------------------------------------------


def _deterministic(problem: NetworkProblem, layout: str) -> NetworkProgram:
    model = problem.model(Kit(), layout)

    def run(image: Tensor) -> tuple[Tensor, None]:
        return model(image), None

    return _program(problem, model, run, layout, right=("output", "parameters"))


# --- ours -----------------------------------------------------------------------------------------


class _OurKit(Kit):
    """BayesConv2d and BayesLinear, with relu inside where it follows at once."""

    fuses_relu = True

    def __init__(self, estimator: str) -> None:
        self.estimator = estimator

    def conv(
        self, C: int, K: int, k: int, stride: int, padding: int, bias: bool, relu: bool
    ) -> nn.Module:
        """Ours."""
        return fb.BayesConv2d(
            C, K, k, stride, padding, bias=bias,
            activation="relu" if relu else None, estimator=self.estimator,
        )  # fmt: skip

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        """Ours."""
        activation = "relu" if relu else None
        return fb.BayesLinear(C, K, activation=activation, estimator=self.estimator)


def _ours(
    problem: NetworkProblem,
    algorithm: str,
    layout: str = "nhwc",
    keep_weight: bool = False,
    estimator: str = "reparameterization",
    on_access: bool = False,
) -> NetworkProgram:
    model = problem.model(_OurKit(estimator), layout)

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        with fb.algorithm(algorithm, keep_weight=keep_weight):
            if on_access:
                return model(image), fb.kl_loss(model)
            with fb.collect_kl(model) as kl:
                output = model(image)
            return output, kl.sum()

    return _program(
        problem, model, run, layout, noise="ours", estimator=estimator, scale_floor=FLOOR
    )


# --- ten lines of PyTorch a layer -----------------------------------------------------------------


class _UnfusedLayer(nn.Module):
    """``problem.unfused_layer`` as a module: any linear map, its KL appended to a list.

    Args:
        apply: ``apply(input, weight, bias)``.
        size: of the weight.
        bias: whether there is one.
        terms: receives the KL of every pass.
    """

    def __init__(
        self, apply: Callable[..., Tensor], size: tuple[int, ...], bias: bool, terms: list[Tensor]
    ) -> None:
        super().__init__()
        self.weight, self.weight_rho = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(size[0])) if bias else None
        self.apply_map, self.terms = apply, terms

    def forward(self, input: Tensor) -> Tensor:
        """One draw."""
        scale = F.softplus(self.weight_rho)
        weight = self.weight + scale * torch.randn_like(self.weight)
        self.terms.append(closed_form_kl(self.weight, scale))
        return self.apply_map(input, weight, self.bias)


class _UnfusedKit(Kit):
    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def conv(
        self, C: int, K: int, k: int, stride: int, padding: int, bias: bool, relu: bool
    ) -> nn.Module:
        apply = partial(F.conv2d, stride=stride, padding=padding)
        return _UnfusedLayer(apply, (K, C, k, k), bias, self.terms)

    def linear(self, C: int, K: int, relu: bool) -> nn.Module:
        return _UnfusedLayer(F.linear, (K, C), True, self.terms)


def _unfused(problem: NetworkProblem, layout: str) -> NetworkProgram:
    kit = _UnfusedKit()
    model = problem.model(kit)  # contiguous parameters in both, as for single layers

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        kit.terms.clear()
        output = model(image)
        kl = torch.stack(kit.terms).sum()
        kit.terms.clear()  # or the graph of this pass would live until the next
        return output, kl

    return _program(problem, model, run, layout, noise="torch")


# --- peers ----------------------------------------------------------------------------------------


def _bayesian_torch(problem: NetworkProblem, kind: str) -> NetworkProgram:
    """``dnn_to_bnn`` of the plain network; see peers.py for what can be compared."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    model = problem.model(Kit())
    settings = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0,
        "type": kind, "moped_enable": False, "moped_delta": 0.5,
    }  # fmt: skip
    dnn_to_bnn(model, settings)
    with torch.no_grad():
        for path, module in model.named_modules():
            names = {n.split("_", 1)[1]: n for n in module._parameters if n.startswith("mu_")}
            for part, name in names.items():  # kernel or weight, and bias
                here = f"{path}.{'bias' if part == 'bias' else 'weight'}"
                rho = getattr(module, f"rho_{part}")
                if here in problem.state and rho is not None:
                    getattr(module, name).copy_(problem.state[here])
                    rho.copy_(problem.state.get(f"{here}_rho", torch.tensor(_NO_NOISE)))

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        return model(image), get_kl_loss(model)

    # Their KL is a mean, and Flipout takes a sign for each pixel: another function than ours.
    right = ("output",) if kind == "Reparameterization" else ()
    return _program(problem, model, run, "nhwc", noise="torch, biases too", right=right)


BUILDS: dict[str, Callable[[NetworkProblem], NetworkProgram]] = {
    "det-nchw": partial(_deterministic, layout="nchw"),
    "det-nhwc": partial(_deterministic, layout="nhwc"),
    "auto": partial(_ours, algorithm="auto"),
    "direct": partial(_ours, algorithm="direct"),
    "library": partial(_ours, algorithm="library"),
    "auto-nchw": partial(_ours, algorithm="auto", layout="nchw"),
    "auto-keep": partial(_ours, algorithm="auto", keep_weight=True),
    "on-access": partial(_ours, algorithm="auto", on_access=True),
    "flipout": partial(_ours, algorithm="auto", estimator="flipout"),
    "local": partial(_ours, algorithm="auto", estimator="local"),
    "unfused-nchw": partial(_unfused, layout="nchw"),
    "unfused-nhwc": partial(_unfused, layout="nhwc"),
    "bayesian-torch": partial(_bayesian_torch, kind="Reparameterization"),
    "bayesian-torch-flipout": partial(_bayesian_torch, kind="Flipout"),
}
_NO_WINOGRAD = "its kernels compute 3 x 3 filters without stride, and a network has others"
_LACKING = {
    "winograd2": _NO_WINOGRAD,
    "winograd2x4": _NO_WINOGRAD,
    "winograd4": _NO_WINOGRAD,
    "ivon": "its optimiser would have to be set up for a whole model",
}
