"""check_optimizer: decay of posteriors, and parameters that an optimiser does not know."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import ResNet18, small
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastbconv as fb


def test_adamw_on_all_parameters_decays_rho() -> None:
    model = fb.convert(small())
    with pytest.warns(UserWarning, match=r"weight_decay: AdamW .* 0.weight_rho, 4.weight, 4"):
        names = fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)
    assert names == ["0.weight", "0.weight_rho", "4.weight", "4.weight_rho"]


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


class Prior(nn.Module):
    """One that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self) -> torch.distributions.Distribution:
        return torch.distributions.Normal(0.0, self.rate)


def _tfp(**options) -> nn.Module:
    return fb.build(fb.DenseReparameterization(3, **options), (None, 4))


def _pruned() -> nn.Module:
    layer = fb.BayesLinear(4, 3)
    prune.l1_unstructured(layer, "bias", 1)
    return layer


ONE = nn.Parameter(torch.ones(()))
POINT = fb.default_mean_field_normal_fn(is_singular=True)


# A layer, and its parameters without a term in the KL.
ORDINARY = {
    "point bias": (lambda: fb.BayesConv2d(3, 4, 3), {"bias"}),
    "lazy": (lambda: fb.LazyBayesLinear(4), {"bias"}),
    "no bias": (lambda: fb.BayesLinear(3, 4, bias=False), set()),
    "Bayesian bias": (lambda: fb.BayesLinear(3, 4, bayesian_bias=True), set()),
    "activation": (
        lambda: fb.BayesLinear(3, 4, False, activation=nn.PReLU()),
        {"activation.weight"},
    ),
    "prior": (lambda: fb.BayesLinear(3, 4, prior=(0.0, ONE)), {"bias"}),
    "module of a prior": (lambda: fb.BayesLinear(3, 4, False, prior=Prior()), set()),
    "pruned bias": (_pruned, {"bias_orig"}),
    "parametrized bias": (
        lambda: parametrize.register_parametrization(fb.BayesLinear(3, 4), "bias", nn.Identity()),
        {"parametrizations.bias.original"},
    ),
    "parametrized weight": (
        lambda: parametrizations.weight_norm(fb.BayesLinear(3, 4, bias=False)),
        set(),
    ),
    "TFP face": (_tfp, {"bias_posterior_loc"}),
    "TFP face, Bayesian bias": (
        lambda: _tfp(bias_posterior_fn=fb.default_mean_field_normal_fn()),
        set(),
    ),
    "TFP face, point with a prior": (
        lambda: _tfp(bias_posterior_fn=POINT, bias_prior_fn=fb.default_multivariate_normal_fn),
        set(),
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_has_no_kl_is_an_ordinary_parameter(name: str) -> None:
    make, ordinary = ORDINARY[name]
    layer = make()
    groups = {g["name"]: g for g in fb.param_groups(layer, 1e-3, weight_decay=0.1)}
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    found = {names[id(p)] for p in groups.get("other", {"params": []})["params"]}
    assert found == ordinary
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    decay_all = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.warns(UserWarning, match="weight_decay: SGD decays parameters of posteriors"):
        assert set(fb.check_optimizer(decay_all, layer)) == set(names.values()) - ordinary
    means = [p for p in layer.parameters() if names[id(p)] not in ordinary]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a bias that is not held keeps its value, and no more
        assert fb.check_optimizer(torch.optim.SGD(means, lr=0.1), layer) == []


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
    with pytest.warns(UserWarning, match=r"0.69: conv1.weight, .* and 34 more; make it"):
        names = fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)
    assert len(names) == 42


def test_rho_of_the_tfp_face() -> None:
    model = nn.Sequential(fb.DenseReparameterization(3))
    fb.build(model, (None, 4))
    with pytest.warns(UserWarning, match=r"0.kernel_posterior_untransformed_scale"):
        fb.check_optimizer(torch.optim.AdamW(model.parameters()), model)


def test_no_optimiser() -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        fb.check_optimizer([], small())


class Marked(nn.Module):
    """A layer of the user's own: it has the mark of a Bayesian layer and a KL, nothing else."""

    is_bayesian = True

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def kl_loss(self) -> torch.Tensor:
        return self.loc.square().sum()


def test_layers_of_the_users_own() -> None:
    """Both raised AttributeError, as summary did: all that such a layer has is of its posterior."""
    model = nn.Sequential(Marked(), nn.Linear(3, 3))
    groups = fb.param_groups(model, 1e-3, weight_decay=0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [
        ("posterior", 1),
        ("other", 2),
    ]
    with pytest.warns(UserWarning, match=r"weight_decay: AdamW .* 0.loc"):
        assert fb.check_optimizer(torch.optim.AdamW(model.parameters()), model) == ["0.loc"]
    row = fb.summary(model).rows[0]
    assert (row.name, row.weights, row.kl) == ("0", 0, 0.0)


@pytest.mark.parametrize("way", ["parametrize", "prune"])
def test_scales_under_another_name_have_their_learning_rate(way: str) -> None:
    layer = fb.BayesLinear(3, 4)
    if way == "prune":
        prune.identity(layer, "weight_rho")
    else:
        parametrize.register_parametrization(layer, "weight_rho", nn.Identity())
    groups = fb.param_groups(layer, 1e-3, rho_lr=1.0)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("posterior", 1e-3),
        ("rho", 1.0),
        ("other", 1e-3),
    ]
