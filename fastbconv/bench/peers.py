"""Other ways to have the layer, measured where they are installed.

Each function imports what it needs and returns a Program; one that cannot is named, with the
reason. The libraries draw their bias as well: its scale is made negligible, so that outputs can be
compared. Images are channels_last and parameters contiguous, the faster choice for all of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns import Build, Column, randn_eps
from .problem import SCALE, Problem, Program, Result, program, unfused_layer

_NO_NOISE = -30.0  # raw scale of a bias
_PEERS: list[tuple[Column, str]] = []


def _peer(name: str, module: str, text: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        _PEERS.append((Column(name, text, build, "peer", False), module))
        return build

    return register


def available() -> tuple[list[Column], list[str]]:
    """The columns that can be had here, and a sentence for each that cannot."""
    columns, missing = [], []
    for column, module in _PEERS:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer may fail in any way while it is imported
            missing.append(f"{column.name}: {type(error).__name__}: {error}")
        else:
            columns.append(column)
    return columns, missing


def _of_library(
    problem: Problem,
    parameters: tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter],
    call: Callable[[Tensor], tuple[Tensor, Tensor]],
    raw: Callable[[Tensor], Tensor] = lambda rho: rho,
    # Their KL differs by design (mean, one sample, another prior), and with it d loc and d rho.
    right: tuple[str, ...] = ("output", "input"),
) -> Program:
    """The program of a layer with parameters (loc, rho, bias loc, bias rho)."""
    values = (problem.loc, raw(problem.rho), problem.bias, torch.tensor(_NO_NOISE))
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    leaves = {"input": problem.leaf("input", "nhwc")}
    leaves |= zip(("loc", "rho", "bias", "bias_rho"), parameters, strict=True)

    def layer(input: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        output, kl = call(input)
        return F.relu(output), kl

    return program(problem, layer, leaves, "nhwc", partial(randn_eps, problem), right=right)


@_peer("bayesian-torch", "bayesian_torch.layers", "Conv2dReparameterization and its KL")
def _bayesian_torch(problem: Problem) -> Program:
    from bayesian_torch.layers import Conv2dReparameterization

    shape = problem.shape
    layer = Conv2dReparameterization(shape.C, shape.K, shape.k, padding=shape.padding)
    parameters = (layer.mu_kernel, layer.rho_kernel, layer.mu_bias, layer.rho_bias)
    return _of_library(problem, parameters, layer)


@_peer("bayesian-torch-flipout", "bayesian_torch.layers", "Conv2dFlipout and its KL")
def _bayesian_torch_flipout(problem: Problem) -> Program:
    from bayesian_torch.layers import Conv2dFlipout

    shape = problem.shape
    layer = Conv2dFlipout(shape.C, shape.K, shape.k, padding=shape.padding)
    parameters = (layer.mu_kernel, layer.rho_kernel, layer.mu_bias, layer.rho_bias)
    # A sign for each pixel: another function than Flipout's, so that nothing can be compared.
    return _of_library(problem, parameters, layer, right=())


@_peer("torch-uncertainty", "torch_uncertainty.layers.bayesian", "BayesConv2d and its ELBO terms")
def _torch_uncertainty(problem: Problem) -> Program:
    from torch_uncertainty.layers.bayesian import BayesConv2d

    shape = problem.shape
    layer = BayesConv2d(shape.C, shape.K, shape.k, padding=shape.padding)
    return _of_library(problem, _samplers(layer), partial(_sampled_kl, layer))


@_peer("blitz", "blitz.modules", "BayesianConv2d and its ELBO terms")
def _blitz(problem: Problem) -> Program:
    from blitz.modules import BayesianConv2d

    shape = problem.shape
    layer = BayesianConv2d(shape.C, shape.K, (shape.k, shape.k), padding=shape.padding)
    return _of_library(problem, _samplers(layer), partial(_sampled_kl, layer))


def _samplers(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    weight, bias = layer.weight_sampler, layer.bias_sampler
    return weight.mu, weight.rho, bias.mu, bias.rho


def _sampled_kl(layer: nn.Module, input: Tensor) -> tuple[Tensor, Tensor]:
    output = layer(input)
    return output, layer.log_variational_posterior - layer.log_prior


@_peer("torchbnn", "torchbnn", "BayesConv2d and bayesian_kl_loss")
def _torchbnn(problem: Problem) -> Program:
    import torchbnn

    shape = problem.shape
    layer = torchbnn.BayesConv2d(0.0, 1.0, shape.C, shape.K, shape.k, padding=shape.padding)
    parameters = (
        layer.weight_mu,
        layer.weight_log_sigma,
        layer.bias_mu,
        layer.bias_log_sigma,
    )

    def call(input: Tensor) -> tuple[Tensor, Tensor]:
        kl = torchbnn.functional.bayesian_kl_loss(layer, reduction="sum")
        return layer(input), kl.squeeze()

    return _of_library(problem, parameters, call, lambda rho: F.softplus(rho).log())


@_peer("ivon", "ivon", "F.relu(F.conv2d) inside IVON.sampled_params; without the optimiser's step")
def _ivon(problem: Problem) -> Program:
    import ivon

    padding = problem.shape.padding
    names = ("input", "loc", "bias")
    leaves = {name: problem.leaf(name, "nchw") for name in names}
    leaves["input"] = problem.leaf("input", "nhwc")
    image, loc, bias = leaves.values()
    grad_output = problem.image("grad_output", "nhwc")
    scale = SCALE * math.prod(problem.loc.shape[1:]) ** -0.5
    optimizer = ivon.IVON([loc], lr=0.1, ess=1.0, hess_init=scale**-2, weight_decay=0.0)

    def forward(train: bool = False) -> Result:
        with optimizer.sampled_params(train=train):
            return Result(F.relu(F.conv2d(image, loc, bias, padding=padding)), None)

    def step() -> Result:
        for leaf in leaves.values():
            leaf.grad = None
        with optimizer.sampled_params(train=True):
            output = F.relu(F.conv2d(image, loc, bias, padding=padding))
            output.backward(grad_output)
        return Result(output, None, tuple(leaf.grad for leaf in leaves.values()))

    def eps(seed: int) -> Tensor:
        return randn_eps(problem, seed).double() * scale / F.softplus(problem.rho.double())

    right = ("output", "input", "loc", "bias")
    return Program(forward, step, forward, leaves, eps, right=right)


@_peer("compiled", "torch._inductor", "the ten lines of PyTorch under torch.compile")
def _compiled(problem: Problem) -> Program:
    torch.compiler.reset()  # a new row is a new program, not a recompilation of the last
    layer = torch.compile(partial(unfused_layer, padding=problem.shape.padding), dynamic=False)
    leaves = {name: problem.leaf(name, "nchw") for name in ("loc", "rho", "bias")}
    leaves = {"input": problem.leaf("input", "nhwc"), **leaves}
    # Compiled code draws from a stream of its own, which no eager call repeats.
    return program(problem, layer, leaves, "nhwc", None, right=("kl",))
