"""convert: first values and priors."""

from __future__ import annotations

import io
import math

import pytest
import torch
from networks import small
from torch import nn

import fastbconv as fb
from fastbconv import kl
from fastbconv.testing import assert_close, assert_same

FLOOR = 2.0**-23


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n in ("0.weight", "4.weight")}


# --- rho from a scale -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rho_of_scale_is_the_inverse_of_the_scale(dtype: torch.dtype, bound: float) -> None:
    floor = kl.default_scale_floor(dtype)
    scale = floor + torch.logspace(-20, 3, 4001, dtype=torch.float64)
    rho = kl.rho_of_scale(scale, floor)
    assert rho.isfinite().all()
    exact = kl.posterior_scale(rho, floor)
    assert_close(exact, scale, 1e-14, 0)
    rounded = rho.to(dtype)
    # Rounding rho moves the scale by |rho| eps softplus'(rho): relative to it at most |rho| eps.
    spread = bound * (1 + rho.abs())
    got = kl.posterior_scale(rounded.double(), floor)
    assert ((got - scale).abs() <= spread * scale).all()


def test_a_scale_at_the_floor_or_below_gets_the_floor() -> None:
    rho = kl.rho_of_scale(torch.tensor([0.0, FLOOR / 2, FLOOR, 1e-30]), FLOOR).float()
    assert_same(kl.posterior_scale(rho, FLOOR), torch.full((4,), FLOOR))
    assert (rho > -70).all()


# --- keep and moped -------------------------------------------------------------------------------


def test_keep_has_the_weights_and_the_scales_of_new_layers() -> None:
    model = small()
    converted = fb.convert(model)
    assert_same(converted[0].weight, model[0].weight)
    assert_close(converted[0].weight_scale, torch.full((4, 3, 3, 3), 0.1 / math.sqrt(27)), 1e-5, 0)
    assert converted[0].bias_rho is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moped_sets_posterior_and_prior(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    with torch.no_grad():
        model[4].weight[0, 0] = 0.0
    converted = fb.convert(model, init="moped", delta=0.05, prior=(0.0, 2.0))
    for index in (0, 4):
        w, layer = model[index].weight.detach(), converted[index]
        assert_same(layer.weight.detach(), w)
        assert_close(layer.weight_scale, (0.05 * w.abs()).clamp(min=FLOOR), 1e-5, 2 * FLOOR)
        assert_same(layer.prior_loc, w)
        assert_same(layer.prior.loc, w)
        assert layer.prior.scale == 2.0
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(
            normal(w.double(), layer.weight_scale.double()), normal(w.double(), 2.0)
        )
        assert_close(layer.kl_loss(), expected.sum(), 1e-5, 0)
    assert converted[4].weight_scale[0, 0] <= 2 * kl.default_scale_floor(dtype)


def test_moped_with_bayesian_biases_centres_their_prior_too() -> None:
    model = small()
    converted = fb.convert(model, init="moped", delta=0.1, bayesian_bias=True)
    layer = converted[0]
    assert_same(layer.bias_prior_loc, model[0].bias.detach())
    assert_close(layer.bias_scale, 0.1 * model[0].bias.abs(), 1e-5, 0)
    normal, wide = torch.distributions.Normal, torch.float64
    expected = sum(
        torch.distributions.kl_divergence(
            normal(loc.to(wide), scale.to(wide)), normal(loc.to(wide), 1.0)
        ).sum()
        for loc, scale in ((layer.weight, layer.weight_scale), (layer.bias, layer.bias_scale))
    )
    assert_close(layer.kl_loss(), expected, 1e-5, 0)
    x = torch.randn(2, 3, 6, 6)
    with fb.collect_kl(converted) as fused:
        converted(x)
    assert_close(fused.sum(), fb.kl_loss(converted), 1e-5, 0)
    with fb.grouped(converted), fb.collect_kl(converted) as grouped:
        converted(x)
    assert_close(grouped.sum(), fb.kl_loss(converted), 1e-5, 0)


# --- moments from elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one mapping", "two mappings"])
def test_moments_from_elsewhere(form: str) -> None:
    model = small()
    locs = {name: torch.randn_like(w) for name, w in weights(model).items()}
    scales = {name: torch.rand_like(w) * 0.1 + 1e-4 for name, w in locs.items()}
    init = {name: (locs[name], scales[name]) for name in locs}
    if form == "two mappings":
        init = ({**model.state_dict(), **locs}, scales)  # a whole state_dict may hold the means
    converted = fb.convert(model, init=init)
    for index in (0, 4):
        assert_same(converted[index].weight.detach(), locs[f"{index}.weight"])
        assert_close(converted[index].weight_scale, scales[f"{index}.weight"], 1e-5, 0)
    assert_same(converted[0].bias.detach(), model[0].bias.detach())


def test_moments_of_some_parameters_keep_the_others() -> None:
    model = small()
    bias = (torch.zeros(4), torch.full((4,), 0.3))
    converted = fb.convert(model, init={"0.bias": bias}, bayesian_bias=True)
    assert_close(converted[0].bias_scale, bias[1], 1e-6, 0)
    assert_same(converted[0].bias.detach(), bias[0])
    assert_same(converted[0].weight, model[0].weight)
    assert_close(converted[4].bias_scale, torch.full((5,), 0.1 / 8.0), 1e-5, 0)


GOOD = torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ("mop", ValueError, "init: expected 'keep', 'moped' or moments, got 'mop'"),
        (3, TypeError, "init: expected 'keep', .* got int"),
        ({"0.weight": GOOD}, TypeError, r"init: expected \(loc, scale\) for '0.weight', got Tens"),
        ({"0.bias": (GOOD[:, 0, 0, 0],) * 2}, ValueError, "got '0.bias'; .* bayesian_bias=True"),
        ({"1.weight": (GOOD, GOOD)}, ValueError, r"\(0.weight, 4.weight\), got '1.weight'"),
        ({"0.weight": (GOOD, 0.1)}, TypeError, "init scale of '0.weight': .* tensor, got float"),
        ({"0.weight": (GOOD.int(), GOOD)}, TypeError, "init loc of '0.weight': .* got torch.int32"),
        ({"0.weight": (GOOD, GOOD[0])}, ValueError, r"scale of '0.weight': .* got \(3, 3, 3\)"),
        ({"0.weight": (GOOD, -GOOD)}, ValueError, "positive values, got -1.0; .* not a variance"),
        ({"0.weight": (GOOD, GOOD * 0)}, ValueError, "init scale .*: expected positive values"),
        ({"0.weight": (GOOD / 0, GOOD)}, ValueError, "init loc of '0.weight': expected finite"),
        (({}, {"0.weight": GOOD}), ValueError, "a loc for each scale, got none for 0.weight"),
        ((GOOD, GOOD), TypeError, "init: expected 'keep', .* two mappings"),
    ],
)
def test_moments_that_do_not_fit(init, error, message: str) -> None:
    model = small()
    with pytest.raises(error, match=message):
        fb.convert(model, init=init, inplace=True)
    assert type(model[0]) is nn.Conv2d


# --- priors ---------------------------------------------------------------------------------------


def test_priors_of_all_forms() -> None:
    model = small()
    assert fb.convert(model, prior=(0.1, 0.5))[0].prior == kl.NormalPrior(0.1, 0.5)
    tensor = fb.convert(model, prior=(0.0, torch.tensor(0.5)))
    assert_same(tensor[4].prior_scale, torch.tensor(0.5))
    mixture = fb.ScaleMixture(0.5, 1.0, 0.1)
    assert fb.convert(model, prior=mixture)[0].prior == mixture
    assert fb.convert(model, prior=None)[4].losses == []


def test_one_parameter_is_the_prior_scale_of_every_layer() -> None:
    scale = nn.Parameter(torch.tensor(0.5))
    converted = fb.convert(small(), prior=(0.0, scale))
    assert converted[0].prior_scale is scale
    assert converted[4].prior_scale is scale
    fb.kl_loss(converted).backward()
    assert scale.grad is not None
    assert sum(p is scale for p in converted.parameters()) == 1


def test_a_module_is_the_prior_of_every_layer() -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self) -> torch.distributions.Distribution:
            return torch.distributions.Normal(0.0, self.log_scale.exp())

    prior = Prior()
    converted = fb.convert(small(), prior=prior)
    converted(torch.randn(2, 3, 6, 6))
    fb.kl_loss(converted).backward()
    assert converted[0].prior_module is converted[4].prior_module is prior
    assert prior.log_scale.grad is not None


def test_a_factory_gives_each_layer_its_prior() -> None:
    seen = []

    def prior(name: str, layer: nn.Module):
        seen.append((name, type(layer)))
        if isinstance(layer, nn.Linear):
            return lambda: torch.distributions.Laplace(0.0, 0.5)
        return 0.0, 1.0 / layer.weight[0].numel() ** 0.5

    converted = fb.convert(small(), prior=prior)
    assert seen == [("0", nn.Conv2d), ("4", nn.Linear)]
    assert converted[0].prior.scale == 27**-0.5
    assert isinstance(converted[4].prior, kl.DistributionPrior)
    moped = fb.convert(small(), init="moped", prior=lambda n, m: (0.0, 0.1 if n == "0" else 1.0))
    assert (moped[0].prior.scale, moped[4].prior.scale) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prior": lambda: None}, TypeError, r"prior: expected a function of \(name, layer\)"),
        ({"prior": (0.0, -1.0)}, ValueError, r"prior scale: .* got -1.0 \(converting '0'\)"),
        ({"prior": lambda n, m: 3}, TypeError, r"prior: .* got int \(converting '0'\)"),
        (
            {"prior": (torch.zeros(4, 3, 3, 3), 1.0)},
            ValueError,
            r"prior loc: .* \(converting '4'\)",
        ),
        ({"init": "moped", "prior": (0.5, 1.0)}, ValueError, r"prior: expected \(0.0, scale\)"),
        ({"init": "moped", "prior": (torch.zeros(()), 1.0)}, ValueError, r"expected \(0.0, scale"),
        ({"init": "moped", "prior": fb.ScaleMixture(0.5, 1.0, 0.1)}, ValueError, "ScaleMixture"),
        ({"init": "moped", "delta": 0.0}, ValueError, "delta: expected a positive finite number"),
        ({"init": "moped", "delta": "0.1"}, TypeError, "delta: expected a number, got str"),
    ],
)
def test_priors_that_do_not_fit(arguments, error, message: str) -> None:
    model = small()
    with pytest.raises(error, match=message):
        fb.convert(model, inplace=True, **arguments)
    assert (type(model[0]), type(model[4])) == (nn.Conv2d, nn.Linear)


def test_the_prior_comes_back_with_the_state_dict() -> None:
    model = fb.convert(small(), init="moped", delta=0.2, bayesian_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = fb.convert(small(), init="moped", bayesian_bias=True)
    assert fb.kl_loss(other) != fb.kl_loss(model)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert_same(fb.kl_loss(other), fb.kl_loss(model))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.prior_loc"):
        fb.convert(small(), bayesian_bias=True).load_state_dict(model.state_dict())
