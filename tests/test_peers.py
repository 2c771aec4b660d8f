"""What other Bayesian layers get wrong, each as a test. The first line of a docstring says why."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same

LAYERS = {
    "conv": lambda **options: fb.BayesConv2d(3, 4, 3, **options),
    "linear": lambda **options: fb.BayesLinear(8, 4, **options),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest):
    """A constructor of one kind of layer."""
    return LAYERS[request.param]


def _input(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)


def _scale(rho: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(rho, torch.zeros_like(rho)) + 2.0**-23


def test_two_samples_before_one_backward(make) -> None:
    """Noise in a buffer, refilled in place, gives the first sample the second one's gradient."""
    layer, x = make(), _input()
    seeds = [torch.tensor([1, 0]), torch.tensor([2, 0])]
    (layer(x, seeds[0]).square().sum() + layer(x, seeds[1]).square().sum()).backward()
    together = layer.weight_rho.grad.clone()
    layer.zero_grad()
    for seed in seeds:
        layer(x, seed).square().sum().backward()
    assert_close(together, layer.weight_rho.grad, 1e-5, 1e-5)
    # And against autograd through the written-out formula.
    rho = layer.weight_rho.detach().clone().requires_grad_()
    total = 0.0
    for seed in seeds:
        weight = layer.weight + _scale(rho) * fb.noise.weight_eps(seed, rho.shape)
        function = F.conv2d if rho.ndim == 4 else F.linear
        total = total + function(x, weight, layer.bias).square().sum()
    total.backward()
    assert_close(together, rho.grad, 1e-4, 1e-3)


@pytest.mark.parametrize("rho", [-200.0, -110.0, -100.0, 100.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_rho_is_finite(make, rho: float, dtype: torch.dtype) -> None:
    """log(1 + exp(rho)) overflows at 100 and has log 0 in the KL at -110."""
    layer = make().to(torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.constant_(layer.weight_rho, rho)
    y = layer(_input().to(dtype))
    (y.float().sum() + layer.kl_loss()).backward()
    values = [y, layer.kl_loss(), *(p.grad for p in layer.parameters())]
    assert all(bool(v.isfinite().all()) for v in values)


@pytest.mark.parametrize("prior", [(0.0, 1.0), fb.ScaleMixture(0.5, 1.0, 0.1)])
def test_deepcopy_after_a_forward(make, prior) -> None:
    """A sample kept on the module carries its graph, which deepcopy refuses (EMA, ensembles)."""
    layer = make(prior=prior)
    layer(_input())
    twin = copy.deepcopy(layer)
    assert_same(twin(_input() * 0 + 1, 5), layer(_input() * 0 + 1, 5))
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)


def test_kl_is_a_sum_not_a_mean() -> None:
    """A mean over weights makes the KL independent of the layer's size: no ELBO."""
    small, large = fb.BayesLinear(8, 4), fb.BayesLinear(8, 8)
    for layer in (small, large):
        nn.init.constant_(layer.weight, 0.3)
        nn.init.constant_(layer.weight_rho, -2.0)
    assert_close(large.kl_loss(), 2 * small.kl_loss(), 1e-6, 0)


def test_kl_of_the_prior_is_zero(make) -> None:
    """An added constant per weight makes the ELBO wrong and the KL negative."""
    layer = make()
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.weight_rho, math.log(math.expm1(1.0)))
    assert abs(layer.kl_loss().item()) < 1e-6


def test_kl_does_not_depend_on_depth_or_batch_or_calls() -> None:
    """Divided by the number of layers or by the batch, the KL weight depends on the model."""
    first, second = fb.BayesLinear(8, 8), fb.BayesLinear(8, 8)
    model = nn.Sequential(first, second)
    model(torch.randn(3, 8))
    model(torch.randn(300, 8))
    assert_close(fb.kl_loss(model), first.kl_loss() + second.kl_loss(), 1e-6, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_keeps_noise_and_parameters(make, dtype: torch.dtype) -> None:
    """A second Parameter made from the first is untied by .to(); default-dtype noise fails."""
    layer = make()
    optimiser_view = list(layer.parameters())
    x = _input()
    before = layer(x, 5)
    layer.to(dtype)
    assert all(a is b for a, b in zip(optimiser_view, layer.parameters(), strict=True))
    with torch.no_grad():
        after = layer(x.to(dtype), 5)
    assert after.dtype == dtype
    assert_close(after, before, 3e-2, 3e-2)  # the same noise, at that precision


def test_an_optimiser_made_before_the_first_call(make) -> None:
    """Parameters that appear at the first forward are never trained."""
    layer = make()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    (layer(_input()).square().mean() + layer.kl_loss() / 100).backward()
    optimiser.step()
    assert all(not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_no_buffers(make) -> None:
    """Noise and prior buffers are broadcast by DDP at each forward and fill checkpoints."""
    layer = make()
    layer(_input())
    assert list(layer.buffers()) == []
    assert set(layer.state_dict()) == {"weight", "weight_rho", "bias"}


def test_parameters_appear_once_and_all_get_gradients(make) -> None:
    """Duplicates never get a gradient: DDP raises, checkpoints double."""
    layer = make(bayesian_bias=True)
    parameters = list(layer.parameters())
    assert len(parameters) == len({p.data_ptr() for p in parameters}) == 4
    layer(_input()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)


def test_equal_shaped_layers_differ_under_one_seed() -> None:
    """One seed handed to every layer gives equal shapes equal noise."""
    model = nn.Sequential(*(fb.BayesLinear(64, 64, bias=False) for _ in range(2)))
    for layer in model:
        nn.init.zeros_(layer.weight)
    with fb.fixed_sample(model, 3):
        draws = torch.stack([layer(torch.eye(64)).flatten() for layer in model]).detach()
    assert torch.corrcoef(draws)[0, 1].abs() < 5 / 64


def test_memory_format_does_not_change_the_noise() -> None:
    """Eager normal noise follows the memory layout, and is eight times slower on channels_last."""
    layer, x = fb.BayesConv2d(5, 6, 3), torch.randn(2, 5, 7, 7)
    expected = layer(x, 7)
    layer = layer.to(memory_format=torch.channels_last)
    assert_close(layer(x, 7), expected, 1e-5, 1e-5)
    assert_close(layer(x.to(memory_format=torch.channels_last), 7), expected, 1e-5, 1e-5)


def test_vmap_over_seeds(make) -> None:
    """An in-place noise buffer refuses vmap; ensembles then need a loop."""
    layer, x = make(), _input()
    seeds = torch.tensor([[3, 0], [4, 9]])
    batched = torch.func.vmap(lambda seed: layer(x, seed))(seeds)
    assert_close(batched, torch.stack([layer(x, seed) for seed in seeds]), 1e-5, 1e-5)


def test_vmap_with_drawn_seeds(make) -> None:
    """randomness='different' must give every member its own weights."""
    layer, x = make(), _input()

    def run(_: torch.Tensor) -> torch.Tensor:
        return layer(x)

    outputs = torch.func.vmap(run, randomness="different")(torch.arange(3))
    assert not torch.equal(outputs[0], outputs[1])


def test_grad_of_functional_call(make) -> None:
    """Meta-learning and Laplace tools differentiate by a dict of parameters."""
    layer, x = make(), _input()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, values, (x, 3)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    layer(x, 3).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(gradients[name], parameter.grad, 1e-4, 1e-4, name)


def test_export(make) -> None:
    """A module that mutates a buffer in its forward cannot be exported."""
    layer, x = make().eval(), _input()
    program = torch.export.export(layer, (x, torch.tensor([3, 0])))
    assert_close(program.module()(x, torch.tensor([3, 0])), layer(x, 3), 1e-5, 1e-5)


def test_no_scale_means_no_noise(make) -> None:
    """A perturbation by the full sample flips the mean itself: outputs differ without any scale."""
    layer, x = make(), _input()
    nn.init.constant_(layer.weight_rho, -200.0)
    function = F.conv2d if layer.weight.ndim == 4 else F.linear
    for seed in (1, 2):
        assert_close(layer(x, seed), function(x, layer.weight, layer.bias), 1e-5, 1e-5)


def test_one_function_per_draw_over_space() -> None:
    """Noise per pixel: no image sees one function, so a constant image gives a varying output."""
    layer = fb.BayesConv2d(3, 4, 3)
    y = layer(torch.ones(2, 3, 8, 8))
    assert (y - y[:1, :, :1, :1]).abs().max() < 1e-5


def test_nothing_is_kept_between_steps(make) -> None:
    """Samples and densities kept on the module hold the last graph and its memory."""
    layer, x = make(), _input()
    layer(x)  # the layer's arguments are parsed here, once
    before = {name: id(value) for name, value in vars(layer).items()}
    assert not any(isinstance(value, torch.Tensor) for value in vars(layer).values())
    layer(x)
    assert {name: id(value) for name, value in vars(layer).items()} == before


def test_a_frozen_prediction_follows_the_parameters(make) -> None:
    """A frozen mean copied at .to() predicts with untrained values."""
    layer, x = make(eval_mode="mean"), _input()
    layer.eval().to(torch.float64)
    with torch.no_grad():
        layer.weight.add_(1.0)
    function = F.conv2d if layer.weight.ndim == 4 else F.linear
    expected = function(x.double(), layer.weight, layer.bias)
    assert_close(layer(x.double()), expected, 1e-6, 1e-6)


def test_training_in_float32_warns_about_nothing(make) -> None:
    """A library that warns at every step is a library whose warnings nobody reads."""
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer(_input()).sum() + fb.kl_loss(layer, 10)).backward()
