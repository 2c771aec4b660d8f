"""The KL under torch.compile(fullgraph=True): in closed form, and of the weights in use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastbconv as fb
from fastbconv.testing import assert_close

PRIORS = {
    "numbers": lambda: (0.0, 0.5),
    "mixture": lambda: fb.ScaleMixture(0.5, 1.0, 0.1),
    "distribution": lambda: lambda: torch.distributions.Laplace(0.0, 1.0),
}
WAYS: dict[str, Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]] = {}


def way(function: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> None:
    WAYS[function.__name__] = function


@way
def of_the_model(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), fb.kl_loss(model, 10)


@way
def of_the_layer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), model[0].kl_loss()


@way
def collected(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with fb.collect_kl(model) as kl:
        y = model(x)
    return y, kl.sum()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("prior", PRIORS)
def test_the_kl_is_part_of_one_graph(name: str, prior: str) -> None:
    """is_lazy, and a question to torch.func, broke the graph of kl_loss and of every call of a
    layer whose prior has no closed form."""
    model = nn.Sequential(fb.BayesConv2d(3, 4, 3, prior=PRIORS[prior]()), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for run in (WAYS[name], torch.compile(WAYS[name], fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)  # the same draw, and so the same KL of it
        y, kl = run(model, x)
        gradients.append((y, kl, *torch.autograd.grad(y.sum() + kl, model.parameters())))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, 1e-5, 1e-6)


def test_a_compiled_call_is_the_one_whose_kl_is_asked_for() -> None:
    layer = fb.BayesLinear(4, 3, prior=fb.ScaleMixture(0.5, 1.0, 0.1))
    x = torch.randn(2, 4)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    layer(x)
    expected = layer.kl_loss()
    torch.manual_seed(5)
    run(x)
    assert_close(layer.kl_loss(), expected, 1e-6, 0)


def test_a_model_of_the_tfp_face() -> None:
    layer = fb.Convolution2DReparameterization(4, 3)
    x = torch.randn(2, 8, 8, 3)
    layer(x)
    run = torch.compile(
        lambda x: layer(x).sum() * 0 + fb.kl_loss(layer), fullgraph=True, backend="aot_eager"
    )
    assert_close(run(x), fb.kl_loss(layer), 1e-6, 0)
