"""summary and prune."""

from __future__ import annotations

import math

import pytest
import torch
from networks import small
from torch import nn

import fastbconv as fb
from fastbconv import kl
from fastbconv.testing import assert_close, assert_same

FLOOR = 2.0**-23


def _with_posterior(loc: torch.Tensor, scale: torch.Tensor) -> fb.BayesLinear:
    layer = nn.Linear(*reversed(loc.shape))
    return fb.convert(layer, init={"weight": (loc, scale)})


# --- summary --------------------------------------------------------------------------------------


def test_rows_are_the_bayesian_layers() -> None:
    model = fb.convert(small(), bayesian_bias=True)
    model.again = model[4]
    found = fb.summary(model)
    assert [(row.name, row.kind, row.weights) for row in found.rows] == [
        ("0", "BayesConv2d", 4 * 27 + 4),
        ("4", "BayesLinear", 320 + 5),
    ]
    assert [row.kl for row in found.rows] == [model[i].kl_loss().item() for i in (0, 4)]
    assert found.weights == 112 + 325
    assert math.isclose(found.kl, fb.kl_loss(model).item(), rel_tol=1e-6)
    assert found.deterministic == 8  # the batch norm's
    assert fb.summary(fb.convert(small())).rows[0].weights == 108  # a bias that is a point


def test_quantiles_of_scale_and_signal_to_noise() -> None:
    scale = torch.linspace(0.01, 1.0, 101)[torch.randperm(101)].reshape(1, 101)
    found = fb.summary(_with_posterior(2 * torch.ones_like(scale), scale)).rows[0]
    ranked = scale.flatten().sort().values
    for got, rank in zip(found.scale, (5, 50, 95), strict=True):
        assert math.isclose(got, float(ranked[rank]), rel_tol=1e-5)
    for got, rank in zip(found.snr, (95, 50, 5), strict=True):
        assert math.isclose(got, 2.0 / float(ranked[rank]), rel_tol=1e-5)


def test_share_of_scales_that_a_16_bit_weight_rounds_away() -> None:
    loc = torch.tensor([[1.0, -1.0, 1.0, 4.0, 0.0]])
    # Below 1/256 and above, below 1/2048, 4/1024 between the two, and no mean at all.
    scale = torch.tensor([[0.9 / 256, 1.1 / 256, 0.9 / 2048, 4 / 1024, 1e-6]])
    found = fb.summary(nn.Sequential(_with_posterior(loc, scale), fb.BayesLinear(5, 1)))
    assert (found.rows[0].lost_bf16, found.rows[0].lost_fp16) == (3 / 5, 1 / 5)
    assert (found.lost_bf16, found.lost_fp16) == (0.3, 0.1)


def test_the_share_is_where_rounding_hides_the_noise() -> None:
    # What the threshold means: well below it the rounded weight is the mean, well above it is not.
    loc, eps = torch.full((4096,), 1.5), torch.randn(4096)
    for dtype, factor in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        for times, most in ((0.125, 0.01), (8.0, 1.0)):
            drawn = (loc + eps * (loc / factor) * times).to(dtype)
            moved = (drawn != loc.to(dtype)).double().mean()
            assert moved <= most
            assert times < 1.0 or moved > 0.9


def test_the_table_has_a_line_for_each_layer_and_the_total() -> None:
    found = fb.summary(fb.convert(small()))
    lines = str(found).splitlines()
    assert len(lines) == 1 + 2 + 1 + 1
    assert lines[0].split()[:4] == ["layer", "type", "weights", "KL"]
    assert lines[1].split()[:3] == ["0", "BayesConv2d", "108"]
    assert lines[2].split()[:3] == ["4", "BayesLinear", "320"]
    assert lines[3].split()[:2] == ["total", "428"]
    assert lines[4] == "other parameters: 8"
    assert len({len(line) for line in lines[:4]}) == 1


def test_summary_of_the_tfp_face() -> None:
    model = nn.Sequential(fb.Convolution2DReparameterization(4, 3), fb.DenseFlipout(2))
    with pytest.raises(ValueError, match=r"expected initialised parameters, got '0'"):
        fb.summary(model)
    fb.build(model, (None, 5, 5, 3))
    conv, dense = fb.summary(model).rows
    assert (conv.weights, dense.weights) == (108, 8)
    scale = model[0].kernel_posterior.stddev.flatten().sort().values
    assert math.isclose(conv.scale[1], scale[round(0.5 * 107)].item(), rel_tol=1e-5)
    assert math.isclose(conv.kl, model[0].kl_loss().item(), rel_tol=1e-6)


def _laplace_prior(dtype, shape, name, trainable, add_variable_fn):
    return torch.distributions.Laplace(torch.zeros(shape), 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fb.BayesLinear(40, 3, prior=fb.ScaleMixture(0.5, 1.0, 0.1), bayesian_bias=True),
        lambda: fb.build(
            fb.DenseReparameterization(
                3,
                kernel_prior_fn=_laplace_prior,
                kernel_divergence_fn=lambda q, p, w: q.log_prob(w) - p.log_prob(w).sum(),
            ),
            (None, 40),
        ),
    ],
    ids=["torch", "tfp"],
)
def test_summary_draws_nothing(make) -> None:
    """Where a KL needs weights and no call has made some: the same weights, and no random state."""
    layer = make()
    state = torch.get_rng_state()
    first, second = fb.summary(layer), fb.summary(layer)
    assert first.kl == second.kl
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        layer(torch.randn(2, 40))
    assert fb.summary(layer).kl == layer.kl_loss().item() != first.kl


def test_summary_of_nothing_and_of_no_module() -> None:
    found = fb.summary(small())
    assert (found.rows, found.weights, found.kl, found.lost_bf16) == ((), 0, 0, 0.0)
    assert "total" in str(found)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        fb.summary("model")


# --- prune ----------------------------------------------------------------------------------------


def _layer() -> fb.BayesLinear:
    loc = torch.tensor([[1.0, -0.1, 0.5, -2.0]])
    return _with_posterior(loc, torch.tensor([[0.5, 0.1001, 1.0, 0.1]]))


def test_weights_below_the_ratio_become_points_at_zero() -> None:
    layer = _layer()
    model, shares = fb.prune(layer, 1.0)
    assert shares == {"": 0.5}
    assert_same(model.weight.detach(), torch.tensor([[1.0, 0.0, 0.0, -2.0]]))
    expected = torch.tensor([[0.5, FLOOR, FLOOR, 0.1]])
    assert_close(model.weight_scale, expected, 1e-5, 0)
    assert_same(layer.weight.detach(), torch.tensor([[1.0, -0.1, 0.5, -2.0]]))  # a copy
    assert_close(model(torch.eye(4)[1:3], seed=1), model.bias.expand(2, 1), 1e-6, 1e-6)


def test_pruning_in_place_again_and_not_at_all() -> None:
    layer = _layer()
    assert fb.prune(layer, 0.0, inplace=True).shares == {"": 0.0}
    assert fb.prune(layer, 3.0, inplace=True).model is layer
    assert fb.prune(layer, 3.0).shares == {"": 0.75}
    assert fb.prune(layer, 100.0).shares == {"": 1.0}
    assert fb.kl_loss(layer).isfinite()


def test_shares_by_layer_with_biases_and_other_dtypes() -> None:
    model = fb.convert(small(), bayesian_bias=True)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(10.0)
    pruned, shares = fb.prune(model.to(torch.bfloat16), 0.5)
    assert shares.keys() == {"0", "4"}
    assert math.isclose(shares["0"], 108 / 112)
    assert 0.0 < shares["4"] < 1.0
    zeros = (pruned[4].weight == 0).sum() + (pruned[4].bias == 0).sum()
    assert int(zeros) == round(shares["4"] * 325)


def test_pruned_scales_stay_and_a_mask_keeps_the_means() -> None:
    layer = fb.prune(_layer(), 1.0).model
    mask = layer.weight != 0
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(64, 4)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x).square().mean() + fb.kl_loss(layer, 1000)).backward()
        optimizer.step()
        with torch.no_grad():
            layer.weight.mul_(mask)
    assert_same(layer.weight != 0, mask)
    assert_same(layer.weight_scale[~mask].detach(), torch.full((2,), FLOOR))
    assert (layer.weight_rho[mask] != kl.rho_of_scale(torch.tensor([0.5, 0.1]), FLOOR)).all()


def test_what_pruning_does_to_kl_training_and_tied_weights() -> None:
    """The three reasons for which it is for inference, as its docstring has them."""
    layer = fb.BayesLinear(8, 4)
    pruned = fb.prune(layer, 1e6)
    assert 15.4 < fb.kl_loss(pruned.model) / 32 < 15.5
    assert fb.kl_loss(layer) / 32 < 3.0
    assert fb.prune(pruned.model, 1e6).shares == {"": 1.0}
    with torch.no_grad():
        pruned.model.weight += 1e-3  # a step of an optimiser
    assert fb.prune(pruned.model, 1e3).shares == {"": 0.0}
    tied = nn.ModuleList([nn.Embedding(4, 8), layer])
    tied[0].weight = layer.weight
    assert (fb.prune(tied, 1e6).model[0].weight == 0).all()


def test_prune_on_the_tfp_face() -> None:
    model = nn.Sequential(fb.Convolution2DReparameterization(4, 3), fb.DenseFlipout(2))
    with pytest.raises(ValueError, match=r"expected initialised parameters, got '0'"):
        fb.prune(model, 1.0)
    fb.build(model, (None, 5, 5, 3))
    with torch.no_grad():
        model[0].kernel_posterior_loc[0].fill_(1e-6)
        model[0].kernel_posterior_loc[1:].fill_(10.0)
    pruned, shares = fb.prune(model, 1.0)
    assert math.isclose(shares["0"], 1 / 3)
    assert_same(pruned[0].kernel_posterior_loc[0].detach(), torch.zeros(3, 3, 4))
    stddev = pruned[0].kernel_posterior.stddev
    assert_same(stddev[0].detach(), torch.full((3, 3, 4), FLOOR))


def test_prune_of_a_posterior_of_the_users_own() -> None:
    def posterior(dtype, shape, name, trainable, add_variable_fn):
        loc = add_variable_fn(f"{name}_loc", shape, dtype=dtype, trainable=trainable)
        return torch.distributions.Independent(torch.distributions.Laplace(loc, 1.0), len(shape))

    layer = fb.DenseReparameterization(2, kernel_posterior_fn=posterior, kernel_divergence_fn=None)
    layer.build((None, 4))
    with pytest.raises(NotImplementedError, match=r"got the model itself .* kernel_posterior_fn"):
        fb.prune(layer, 1.0)
    found = fb.summary(layer).rows[0]
    assert (found.weights, found.kl) == (8, 0.0)
    assert math.isclose(found.scale[1], 2**0.5, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("snr", "error", "message"),
    [
        ("1", TypeError, "snr: expected a number, got str"),
        (-1.0, ValueError, "snr: expected a finite number of at least 0, got -1.0"),
        (math.nan, ValueError, "snr: expected a finite number of at least 0, got nan"),
    ],
)
def test_ratios_that_are_refused(snr, error, message: str) -> None:
    with pytest.raises(error, match=message):
        fb.prune(_layer(), snr)
