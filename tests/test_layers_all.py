"""What every layer of the torch face does alike; gradients, copies and compile: test_battery.py."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv import noise
from fastbconv.testing import assert_close, assert_same

SEED = torch.tensor([3, 4])
# Arguments, the shape of an input, the function behind the layer and what it is called with.
LAYERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...], str, dict[str, Any]]] = {
    "BayesConv1d": ((4, 6, 3, 1, 1), (4, 4, 9), "bayes_conv1d", {"padding": 1}),
    "BayesConv2d": ((4, 6, 3, 1, 1), (4, 4, 7, 9), "bayes_conv2d", {"padding": 1}),
    "BayesConv3d": ((4, 6, 3, 1, 1), (4, 4, 3, 4, 5), "bayes_conv3d", {"padding": 1}),
    "BayesConvTranspose2d": (
        (4, 6, 3, 2, 1, 1),
        (4, 4, 5, 4),
        "bayes_conv_transpose2d",
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "BayesLinear": ((4, 6), (4, 4), "bayes_linear", {}),
}
ESTIMATORS = ("reparameterization", "flipout", "local")
each_layer = pytest.mark.parametrize("name", LAYERS)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def _layer(name: str, **options: Any) -> nn.Module:
    """A layer whose noise matters."""
    layer = getattr(fb, name)(*LAYERS[name][0], **{"bayesian_bias": True, **options})
    with torch.no_grad():
        layer.weight_rho.add_(1.5)
    return layer


def _input(name: str, **options: Any) -> torch.Tensor:
    return torch.randn(LAYERS[name][1], **options)


def _function(name: str, layer: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    _, _, function, geometry = LAYERS[name]
    tensors = (layer.weight, layer.weight_rho, layer.bias, layer.bias_rho)
    return getattr(fb.functional, function)(x, *tensors, **geometry, **options)


# --- forward --------------------------------------------------------------------------------------


@each_layer
@each_estimator
def test_forward_is_the_functional(name: str, estimator: str) -> None:
    layer, x = _layer(name, estimator=estimator, activation="tanh"), _input(name)
    shared = {"estimator": estimator, "activation": "tanh"}
    for options in ({}, {"num_samples": 2}, {"num_samples": 2, "share_input": True}):
        want = _function(name, layer, x, seed=SEED, **shared, **options)
        assert_same(layer(x, seed=SEED, **options), want)
    outputs = [layer(x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert_same(*outputs)
    assert not torch.equal(layer(x), layer(x))


@each_layer
def test_train_and_eval_draw_alike_unless_asked(name: str) -> None:
    layer, x = _layer(name), _input(name)
    assert_same(layer.train()(x, seed=SEED), layer.eval()(x, seed=SEED))
    mean = _layer(name, eval_mode="mean")
    assert not torch.equal(mean(x), mean(x))
    assert_same(mean.eval()(x), mean(x))


@each_layer
@each_estimator
def test_16_bit_inputs_and_autocast(name: str, estimator: str) -> None:
    layer, x = _layer(name, estimator=estimator), _input(name)
    want = layer(x, seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, seed=SEED)
        with fb.collect_kl(layer) as kl:
            layer(x)
    assert got.dtype == torch.bfloat16
    assert kl.sum().dtype == torch.float32
    assert_close(got, want, 0.1, 0.1)
    for dtype in (torch.bfloat16, torch.float16):
        low = layer(x.to(dtype), seed=SEED)
        assert low.dtype == dtype
        assert_close(low, want, 0.1, 0.1)
    (got.float().square().sum() + kl.sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    layer = _layer(name)
    x = _input(name)
    want = layer(x, seed=SEED)
    layer.to(dtype)
    with torch.no_grad():
        got = layer(x.to(dtype), seed=SEED)
        assert layer.kl_loss().isfinite()
    assert got.dtype == dtype
    assert_close(got, want, 0.1, 0.1)


@pytest.mark.parametrize("name", ["BayesConv2d", "BayesConv3d", "BayesConvTranspose2d"])
@each_estimator
def test_channels_last(name: str, estimator: str) -> None:
    layer, x = _layer(name, estimator=estimator), _input(name)
    want = layer(x, seed=SEED)
    layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    got = layer(x.contiguous(memory_format=layout), seed=SEED)
    assert got.is_contiguous(memory_format=layout)
    assert want.is_contiguous()
    assert_close(got, want, 1e-5, 1e-5)
    moved = layer.to(memory_format=layout)
    assert moved.weight.is_contiguous(memory_format=layout)
    assert moved(x, seed=SEED).is_contiguous()
    assert_close(moved(x, seed=SEED), want, 1e-5, 1e-5)


# --- contexts -------------------------------------------------------------------------------------


@each_layer
@each_estimator
def test_fixed_sample_and_mean_weights(name: str, estimator: str) -> None:
    layer, x = _layer(name, estimator=estimator), _input(name)
    with fb.fixed_sample(layer, 9):
        got = layer(x)
        assert_same(layer(x), got)
    assert_same(got, _function(name, layer, x, seed=noise.derive(9, 0)))
    with fb.mean_weights(layer):
        mean = layer(x)
        assert_same(layer(x), mean)
    tensors = (layer.weight, None, layer.bias, None)
    _, _, function, geometry = LAYERS[name]
    assert_same(mean, getattr(fb.functional, function)(x, *tensors, **geometry))
    assert layer._fb_context is None


@each_layer
@each_estimator
@pytest.mark.parametrize(
    "prior", [(0.1, 0.5), fb.ScaleMixture(0.5, 1.0, 0.1)], ids=["normal", "mix"]
)
def test_collect_kl(name: str, estimator: str, prior: Any) -> None:
    layer = _layer(name, estimator=estimator, prior=prior)
    with fb.collect_kl(layer) as kl:
        layer(_input(name))
    assert_close(kl.sum(), layer.kl_loss(), 1e-5, 0)
    kl.sum().backward()
    assert layer.weight_rho.grad.abs().sum() > 0
    if prior == (0.1, 0.5):
        expected = fb.functional.kl_normal(layer.weight, layer.weight_rho, prior)
        expected = expected + fb.functional.kl_normal(layer.bias, layer.bias_rho, prior)
        assert_close(kl.sum(), expected, 1e-6, 0)


@each_layer
def test_grouped_draws_the_weights_of_fixed_sample(name: str) -> None:
    layer, x = _layer(name), _input(name)
    results = []
    for context in (fb.fixed_sample(layer, 3), fb.grouped(layer, seed=3)):
        layer.zero_grad()
        with context, fb.collect_kl(layer) as kl:
            output = layer(x)
            (output.square().sum() + kl.sum()).backward()
        grads = [parameter.grad.clone() for parameter in layer.parameters()]
        results.append((output, kl.sum(), *grads))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-4, 1e-4)


def test_one_group_serves_every_kind_of_layer() -> None:
    model = nn.ModuleDict({name: _layer(name) for name in LAYERS})
    with fb.grouped(model, seed=3), fb.collect_kl(model) as kl:
        got = {name: layer(_input(name).fill_(1.0)) for name, layer in model.items()}
    with fb.fixed_sample(model, 3):
        for name, layer in model.items():
            assert_close(got[name], layer(_input(name).fill_(1.0)), 1e-5, 1e-5)
    assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)


# --- states and transforms ------------------------------------------------------------------------


@each_layer
def test_a_checkpoint_of_torch(name: str) -> None:
    theirs = getattr(nn, name.removeprefix("Bayes"))(*LAYERS[name][0])
    ours, x = _layer(name), _input(name)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == (["weight_rho", "bias_rho"], [])
    with fb.mean_weights(ours):
        assert_close(ours(x), theirs(x), 1e-5, 1e-5)


@each_layer
def test_parameters_and_buffers(name: str) -> None:
    layer = _layer(name, bayesian_bias=False)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_rho"]
    assert layer.weight_rho.shape == layer.weight.shape
    prior = (torch.zeros(layer.weight.shape), nn.Parameter(torch.ones(())))
    layer = _layer(name, bayesian_bias=False, prior=prior)
    assert "prior_loc" in dict(layer.named_buffers())
    assert "prior_scale" in dict(layer.named_parameters())
    layer.kl_loss().backward()
    assert layer.prior_scale.grad is not None
    groups = {group["name"]: len(group["params"]) for group in fb.param_groups(layer, 1e-3)}
    assert groups == {"posterior": 2, "rho": 1, "other": 1}  # the prior's scale, and the bias


@each_layer
@each_estimator
def test_vmap_over_seeds(name: str, estimator: str) -> None:
    layer, x = _layer(name, estimator=estimator), _input(name)
    parameters = dict(layer.named_parameters())
    seeds = torch.tensor([[1, 0], [2, 0]])

    def run(seed: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,), {"seed": seed})

    batched = torch.func.vmap(run)(seeds)
    assert_close(batched, torch.stack([layer(x, seed=seed) for seed in seeds]), 1e-5, 1e-5)


@each_layer
def test_a_device_set_around_the_construction(name: str) -> None:
    with torch.device("meta"):
        layer = getattr(fb, name)(*LAYERS[name][0], bayesian_bias=True)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(_input(name, device="meta")).is_meta


@each_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_noise(name: str, use_reentrant: bool) -> None:
    layer, x = _layer(name), _input(name).requires_grad_()
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        if wrapped:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        else:
            y = layer(x)
        y.square().sum().backward()
        results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-5, 1e-5)


# --- names and documentation ----------------------------------------------------------------------


@each_layer
def test_repr_names_our_options(name: str) -> None:
    layer = _layer(name, activation="relu", prior=(0.0, 0.5), estimator="flipout", eval_mode="mean")
    for part in ("bayesian_bias=True", "activation='relu'", "prior=(0.0, 0.5)"):
        assert part in repr(layer)
    assert repr(layer).endswith("estimator='flipout', eval_mode='mean')")


@pytest.mark.parametrize(
    "module",
    [
        "layers.conv",
        "layers.conv_transpose",
        "layers.lazy",
        "layers.linear",
        "functional.conv1d",
        "functional.conv2d",
        "functional.conv3d",
        "functional.conv_transpose2d",
        "functional.linear",
    ],
)
def test_examples_of_the_documentation(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fastbconv.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
