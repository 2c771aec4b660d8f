"""The short way of a call of the TFP face: the bits of the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv.layers import tfp_draws

TFP_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: fb.Convolution2DReparameterization(4, 3, padding="same", activation="relu"),
    "strides": lambda: fb.Convolution2DReparameterization(4, 3, strides=2, padding="valid"),
    "dilation": lambda: fb.Convolution2DReparameterization(4, 3, dilation_rate=2),
    "own activation": lambda: fb.Convolution2DReparameterization(4, 3, activation=torch.cos),
    "channels first": lambda: fb.Convolution2DReparameterization(
        4, 3, data_format="channels_first"
    ),
    "bayesian bias": lambda: fb.Convolution2DReparameterization(
        4,
        3,
        bias_posterior_fn=fb.default_mean_field_normal_fn(),
        bias_prior_fn=fb.default_multivariate_normal_fn,
    ),
    "no bias": lambda: fb.Convolution2DReparameterization(4, 3, bias_posterior_fn=None),
    "no prior": lambda: fb.Convolution2DReparameterization(4, 3, kernel_prior_fn=None),
    "trained prior": lambda: fb.Convolution2DReparameterization(
        4, 3, kernel_prior_fn=fb.default_mean_field_normal_fn()
    ),
    "float64": lambda: fb.Convolution2DReparameterization(4, 3, dtype=torch.float64),
    "conv1d": lambda: fb.Convolution1DReparameterization(4, 3),
    "dense": lambda: fb.DenseReparameterization(4, activation="tanh"),
}


@pytest.mark.parametrize("name", TFP_LAYERS)
def test_both_ways_of_the_tfp_face_give_the_same_bits(name: str, monkeypatch) -> None:
    """Output, KL, losses and every gradient; and the short way is taken where it is meant."""
    layer = TFP_LAYERS[name]()
    shape = {"conv1d": (2, 9, 4), "dense": (5, 6)}.get(name, (2, 9, 9, 9))
    x = torch.randn(shape, dtype=layer.dtype).requires_grad_()
    layer(x.detach())
    taken: list[bool] = []
    short = tfp_draws.quick_map

    def long(*arguments: Any) -> None:
        return None

    def watched(*arguments: Any) -> Any:
        found = short(*arguments)
        taken.append(found is not None)
        return found

    results = []
    for way in (watched, long):
        monkeypatch.setattr(tfp_draws, "quick_map", way)
        torch.manual_seed(7)
        plain = layer(x)
        with fb.collect_kl(layer) as kl:
            y = layer(x)
        loss = y.square().sum() + kl.sum() + sum(layer.losses)
        gradients = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
        results.append((plain, y, kl.sum(), *layer.losses, *gradients))
        assert y.stride() == plain.stride()
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
    assert taken == [True, name not in ("no prior", "trained prior")]
