"""check_optimizer: decay of posteriors, and parameters that an optimiser does not know."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import ResNet18, small
from torch import nn

import fastbconv as fb


def test_adamw_on_all_parameters_decays_rho() -> None:
    model = fb.convert(small())
    with pytest.warns(UserWarning, match=r"weight_decay: AdamW .* 0.weight_rho, 4.weight, 4.bias"):
        names = fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)
    assert names == ["0.weight", "0.bias", "0.weight_rho", "4.weight", "4.bias", "4.weight_rho"]


def test_what_decay_does_to_a_scale() -> None:
    # The reason for the warning: without data every rho tends to 0, every scale to softplus(0).
    layer = fb.BayesLinear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(400):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert (layer.weight_scale - 0.6931).abs().max() < 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.Adam(m.parameters()),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.0),
        lambda m: torch.optim.AdamW(fb.param_groups(m, 1e-3, weight_decay=0.1)),
    ],
)
def test_optimisers_that_are_right(make) -> None:
    model = fb.convert(small())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fb.check_optimizer(make(model), model) == []


def test_decay_of_other_parameters_is_fine() -> None:
    model = small()
    assert fb.check_optimizer(torch.optim.AdamW(model.parameters()), model) == []


def test_an_optimiser_made_before_the_conversion() -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    fb.convert(model, inplace=True)
    with pytest.warns(UserWarning, match=r"params: Adam does not hold .* 0.weight_rho, 4.weight_r"):
        names = fb.check_optimizer(optimizer, model)
    assert names == ["0.weight_rho", "4.weight_rho"]
    model[0].weight_rho.requires_grad_(False)  # a fixed scale need not be held
    with pytest.warns(UserWarning, match=r"their values: 4.weight_rho;"):
        assert fb.check_optimizer(optimizer, model) == ["4.weight_rho"]


def test_of_many_names_the_message_has_some() -> None:
    model = fb.convert(ResNet18(4))
    with pytest.warns(UserWarning, match=r"0.69: conv1.weight, .* and 35 more; make it"):
        names = fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)
    assert len(names) == 43


def test_rho_of_the_tfp_face() -> None:
    model = nn.Sequential(fb.DenseReparameterization(3))
    fb.build(model, (None, 4))
    with pytest.warns(UserWarning, match=r"0.kernel_posterior_untransformed_scale"):
        fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)


def test_no_optimiser() -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        fb.check_optimizer([], small())
