"""Local reparameterisation on the TFP face: marginals, rows of zeros, the input of a call."""

from __future__ import annotations

from typing import Any

import pytest
import tfp_layers
import torch
from tfp_layers import RANDOM_BIAS, built, own_sample, twin

import fastbconv as fb
from fastbconv.layers import tfp

LOCAL = [name for name in tfp_layers.NAMES if "Local" in name]
FUNCTIONS = pytest.mark.parametrize("function", [tfp.posterior_sample, own_sample])


@FUNCTIONS
@pytest.mark.parametrize("name", LOCAL)
def test_zeros_have_finite_gradients(name: str, function: Any) -> None:
    """The root of a variance of 0 has an infinite derivative: TFP gives NaN here."""
    layer, x = built(name, kernel_posterior_tensor_fn=function, **RANDOM_BIAS)
    x[1] = 0.0
    x.requires_grad_()
    y = layer(x, seed=1)
    (y.square().sum() + layer.kl_loss()).backward()
    for gradient in (x.grad, *(weight.grad for weight in layer.weights)):
        assert gradient.isfinite().all()
    others = twin(layer, name, kernel_posterior_tensor_fn=function, **RANDOM_BIAS)
    others(x.detach()[[0, 0, 2]], seed=1)[[0, 2]].square().sum().backward()
    rho = "kernel_posterior_untransformed_scale"
    layer.zero_grad()
    layer(x, seed=1).square().sum().backward()
    # A row of zeros adds nothing to the gradient of the scales.
    torch.testing.assert_close(getattr(layer, rho).grad, getattr(others, rho).grad)


@pytest.mark.parametrize("name", LOCAL)
def test_marginals_are_those_of_a_drawn_kernel(name: str) -> None:
    """Mean and variance of every entry; the covariances of pixels are dropped, on purpose."""
    layer, x = built(name, bias_posterior_fn=None)
    x, draws = x[:1], 3000
    other = twin(layer, tfp_layers.stem_of(name) + "Reparameterization", bias_posterior_fn=None)
    torch.set_num_threads(1)
    with torch.no_grad():
        local = torch.stack([layer(x, seed=n) for n in range(draws)]).double().flatten(1)
        shared = torch.stack([other(x, seed=n) for n in range(draws)]).double().flatten(1)
        affine = layer.kernel_posterior_affine
    mean, variance = affine.mean.double().flatten(), affine.variance.double().flatten()
    for outputs in (local, shared):
        assert ((outputs.mean(0) - mean).abs() / (variance / draws).sqrt()).max() < 5
        assert ((outputs.var(0) - variance).abs() / (variance * (2 / draws) ** 0.5)).max() < 5
    correlations = torch.corrcoef(local.T).fill_diagonal_(0.0)
    assert correlations.abs().max() < 5.5 / draws**0.5
    if layer.rank:  # the same filter at neighbouring pixels: its weights are shared
        pixels = torch.corrcoef(shared.T)[:4, 4:8].diagonal()
        assert pixels.abs().max() > 0.1


@FUNCTIONS
@pytest.mark.parametrize("name", LOCAL)
def test_the_pre_activation_of_a_call(name: str, function: Any) -> None:
    options = {"kernel_posterior_tensor_fn": function, "activation": "relu", **RANDOM_BIAS}
    layer, x = built(name, **options)
    output = layer(x, seed=3)
    drawn = layer.kernel_posterior_affine_tensor
    want = torch.relu(drawn + layer.bias_posterior_tensor)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    affine = layer.kernel_posterior_affine
    assert isinstance(affine, torch.distributions.Normal)
    with fb.mean_weights(layer):
        mean = layer(x)
    torch.testing.assert_close(mean, torch.relu(affine.mean + layer.bias_posterior_loc))


@pytest.mark.parametrize("name", LOCAL)
def test_the_layer_keeps_no_input(name: str) -> None:
    layer, x = built(name)
    layer(x + 1)
    for attribute in ("kernel_posterior_affine", "kernel_posterior_affine_tensor"):
        with pytest.raises(AttributeError, match=r"input of the last call to be alive.* keep a"):
            getattr(layer, attribute)
    assert len(layer.losses) == 1
    layer(x)
    assert layer.kernel_posterior_affine_tensor.shape == layer.kernel_posterior_affine.mean.shape
    own = twin(layer, name, kernel_posterior_tensor_fn=own_sample)
    own(x + 1)
    assert own.kernel_posterior_affine_tensor is own._last.tensors["affine"]


@FUNCTIONS
@pytest.mark.parametrize("name", LOCAL)
def test_an_input_that_was_changed_in_place(name: str, function: Any) -> None:
    """What is made again from it would be of another call."""
    layer, x = built(name, kernel_posterior_tensor_fn=function)
    layer(x)
    layer.kernel_posterior_affine_tensor  # noqa: B018  unchanged: there
    x[:1].mul_(2.0)  # through a view
    with pytest.raises(AttributeError, match=r"changed in place since, .*x\.clone\(\)"):
        layer.kernel_posterior_affine  # noqa: B018
    if function is tfp.posterior_sample:
        with pytest.raises(AttributeError, match="changed in place since"):
            layer.kernel_posterior_affine_tensor  # noqa: B018
    else:
        assert layer.kernel_posterior_affine_tensor is layer._last.tensors["affine"]
    layer(x)
    with torch.no_grad():  # variables may change: the distribution is that of the present ones
        before = layer.kernel_posterior_affine.mean
        layer.kernel_posterior_loc.add_(1.0)
        assert not torch.equal(layer.kernel_posterior_affine.mean, before)


@pytest.mark.parametrize("name", LOCAL)
def test_inputs_without_a_count_of_changes(name: str) -> None:
    layer, x = built(name)
    with torch.inference_mode():
        for given in (x.clone(), x.numpy()):
            layer(given)
            assert layer.kernel_posterior_affine.mean.isfinite().all()
