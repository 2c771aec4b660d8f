"""Divergences and priors: closed forms, Monte-Carlo estimates, stability."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbconv as fb
from fastbconv import kl
from fastbconv.testing import assert_close

kl_normal = fb.functional.kl_normal


def _torch_kl(loc, rho, prior_loc, prior_scale, floor=2.0**-23):
    scale = floor + torch.logaddexp(rho.double(), torch.zeros(()).double())
    posterior = distributions.Normal(loc.double(), scale)
    prior = distributions.Normal(torch.as_tensor(prior_loc).double(), prior_scale)
    return distributions.kl_divergence(posterior, prior).sum()


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (17, 16, 3, 3), (64, 65, 1, 1)])
@pytest.mark.parametrize("prior", [(0.0, 1.0), (-0.5, 0.03), (1.0, 20.0)])
def test_kl_is_the_plain_sum(shape, prior) -> None:
    loc, rho = torch.randn(shape), torch.randn(shape) * 2 - 2
    assert_close(kl_normal(loc, rho, prior), _torch_kl(loc, rho, *prior), 1e-6, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [-200.0, -110.0, -100.0, -87.5, -16.0, 0.0, 88.0, 100.0, 200.0])
def test_kl_and_gradients_are_finite_for_every_rho(rho: float, dtype: torch.dtype) -> None:
    loc = torch.tensor([0.3, -1.0], dtype=dtype, requires_grad=True)
    raw = torch.full((2,), rho, dtype=dtype, requires_grad=True)
    total = kl_normal(loc, raw)
    total.backward()
    floor = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    wide = raw.detach().double().requires_grad_()
    expected = _torch_kl(loc.detach(), wide, 0.0, 1.0, floor)
    expected.backward()
    assert_close(total, expected, 1e-6, 0.0)
    assert_close(loc.grad, loc.detach(), 1e-6, 0.0)
    assert_close(raw.grad, wide.grad, 2e-6, 1e-30)


def test_kl_of_the_prior_itself_is_zero() -> None:
    loc = torch.zeros(1000)
    rho = torch.full((1000,), math.log(math.expm1(1.0 - 2.0**-23)))
    assert 0.0 <= kl_normal(loc, rho).item() < 1e-9
    double = rho.double()
    assert abs(kl_normal(loc.double(), double, (0.0, 1.0)).item()) < 1e-9


def test_kl_is_never_negative_near_the_prior() -> None:
    scale = 1.0 + torch.linspace(-1e-3, 1e-3, 2001, dtype=torch.float64)
    rho = torch.log(torch.expm1(scale)).float()
    for value in rho:
        assert kl_normal(torch.zeros(1), value[None]).item() >= 0.0


def test_kl_is_never_negative_for_many_ratios_near_one() -> None:
    # rho of the floats around softplus^-1(1 - floor); each chunk multiplies 512 such ratios.
    middle = torch.tensor(math.log(math.expm1(1.0 - 2.0**-23)))
    steps = torch.randint(-4, 5, (200, 512), generator=torch.Generator().manual_seed(1))
    rho = (middle.view(torch.int32) + steps.int()).view(torch.float32)
    for row in rho:
        assert 0.0 <= kl_normal(torch.zeros(512), row).item() < 1e-9


def test_kl_of_a_mean_far_away_is_finite_while_it_is_a_float32() -> None:
    # d^2 is none, half of it is.
    loc, rho = torch.tensor([2.2e19]), torch.tensor([0.0])
    assert_close(kl_normal(loc, rho, (0.0, 1.0)), _torch_kl(loc, rho, 0.0, 1.0).float(), 1e-6, 0.0)


@pytest.mark.parametrize("prior_scale", [1e-30, 1e-10, 1e-4, 1.0, 1e4, 1e10, 1e30])
@pytest.mark.parametrize("size", [1, 15, 513])
def test_kl_of_ratios_far_from_one(prior_scale: float, size: int) -> None:
    # Products of such ratios leave the range of float64, the divergence does not.
    rho = torch.linspace(-80.0, 40.0, size)
    loc = torch.randn(size) * min(prior_scale, 1e9)
    want = _torch_kl(loc, rho, 0.0, prior_scale).float()
    assert_close(kl_normal(loc, rho, (0.0, prior_scale)), want, 2e-6, 0.0)


@pytest.mark.parametrize("outlier", [-87.0, 0.0, 1e9, 3e38])
@pytest.mark.parametrize("place", [0, 17, 511, 512, 599])
def test_kl_with_one_ratio_far_from_the_others(outlier: float, place: int) -> None:
    loc, rho = torch.randn(600), torch.full((600,), -4.0)
    rho[place] = outlier
    assert_close(
        kl_normal(loc, rho, (0.0, 1e-3)), _torch_kl(loc, rho, 0.0, 1e-3).float(), 2e-6, 0.0
    )


@pytest.mark.parametrize("place", [0, 31, 519])
def test_kl_shows_what_is_no_number(place: int) -> None:
    for loc, rho, seen in (
        (math.nan, 0.0, math.isnan),
        (0.0, math.nan, math.isnan),
        (math.inf, 0.0, math.isinf),
    ):
        locs, rhos = torch.randn(520), torch.randn(520)
        locs[place], rhos[place] = loc, rho
        assert seen(kl_normal(locs, rhos).item())


def test_kl_of_exact_scales_is_rounded_once() -> None:
    # softplus(rho) is rho there: nothing but the sum can be wrong.
    rho = 20.0 + torch.rand(5000) * 300.0
    for prior_scale in (1.0, 128.0):
        got = kl_normal(torch.zeros(5000), rho, (0.0, prior_scale))
        assert_close(got, _torch_kl(torch.zeros(5000), rho, 0.0, prior_scale), 6e-8, 0.0)


@pytest.mark.parametrize("prior", ["tensors", "parameters"])
def test_prior_gradients(prior: str) -> None:
    loc, rho = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    prior_loc = torch.randn(3, 1, 1, requires_grad=True)
    prior_scale = (torch.rand(4, 1, 1, 1) + 0.5).requires_grad_()
    if prior == "parameters":
        prior_loc, prior_scale = nn.Parameter(prior_loc), nn.Parameter(prior_scale)
    kl_normal(loc, rho, (prior_loc, prior_scale)).backward()
    wide = [t.detach().double().requires_grad_() for t in (prior_loc, prior_scale)]
    _torch_kl(loc, rho, *wide).backward()
    assert_close(prior_loc.grad, wide[0].grad, 1e-5, 1e-5)
    assert_close(prior_scale.grad, wide[1].grad, 1e-5, 1e-5)


def test_the_convolution_returns_the_same_kl() -> None:
    x, w, rho = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    b, b_rho = torch.randn(4), torch.randn(4)
    _, both = fb.functional.bayes_conv2d(
        x, w, rho, b, b_rho, prior=(0.1, 2.0), bias_prior=(0.0, 0.5), return_kl=True
    )
    expected = kl_normal(w, rho, (0.1, 2.0)) + kl_normal(b, b_rho, (0.0, 0.5))
    assert_close(both, expected, 1e-6, 0.0)
    _, none = fb.functional.bayes_conv2d(x, w, rho, b, b_rho, prior=None, return_kl=True)
    assert none.item() == 0.0
    _, bias = fb.functional.bayes_conv2d(
        x, w, rho, b, b_rho, weight_kl=False, bias_prior=(0.0, 0.5), return_kl=True
    )
    assert_close(bias, kl_normal(b, b_rho, (0.0, 0.5)), 1e-6, 0.0)


def test_the_kl_enters_the_gradient_with_its_cotangent() -> None:
    x = torch.randn(2, 3, 5, 5)
    w, rho = (torch.randn(4, 3, 3, 3, requires_grad=True) for _ in range(2))
    y, both = fb.functional.bayes_conv2d(x, w, rho, seed=1, return_kl=True)
    (y.sum() + 0.25 * both).backward()
    fused = w.grad.clone(), rho.grad.clone()
    w.grad = rho.grad = None
    (fb.functional.bayes_conv2d(x, w, rho, seed=1).sum() + 0.25 * kl_normal(w, rho)).backward()
    assert_close(fused[0], w.grad, 1e-5, 1e-5)
    assert_close(fused[1], rho.grad, 1e-5, 1e-5)


# --- priors without a closed form -----------------------------------------------------------------


def test_scale_mixture_density() -> None:
    w = torch.linspace(-3, 3, 31, dtype=torch.float64)
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
        distributions.Normal(0.0, torch.tensor([1.0, 0.1], dtype=torch.float64)),
    )
    assert_close(fb.ScaleMixture(0.25, 1.0, 0.1).log_prob(w), mixture.log_prob(w), 1e-9, 1e-12)


def test_monte_carlo_kl_is_that_of_the_weights_in_use() -> None:
    x, w, rho = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    prior = fb.ScaleMixture(0.5, 1.0, 0.2)
    _, got = fb.functional.bayes_conv2d(
        x, w, rho, seed=5, num_samples=2, prior=prior, return_kl=True
    )
    scale = F.softplus(rho) + 2.0**-23
    expected = 0.0
    for s in range(2):
        sample = w + scale * fb.noise.weight_eps(5, w.shape, s)
        log_q = distributions.Normal(w, scale).log_prob(sample).sum()
        expected = expected + (log_q - prior.log_prob(sample).sum()) / 2
    assert_close(got, expected, 1e-4, 1e-3)


def test_monte_carlo_kl_estimates_the_closed_form() -> None:
    x, w, rho = torch.randn(1, 4, 3, 3), 0.1 * torch.randn(4, 4, 3, 3), torch.zeros(4, 4, 3, 3)
    factory = lambda: distributions.Normal(0.0, 1.0)  # noqa: E731
    values = []
    for seed in range(50):
        _, value = fb.functional.bayes_conv2d(x, w, rho, seed=seed, prior=factory, return_kl=True)
        values.append(value)
    values = torch.stack(values)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - kl_normal(w, rho)) < 4 * error


def test_monte_carlo_gradients_reach_prior_and_posterior() -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self) -> distributions.Distribution:
            return distributions.Laplace(0.0, self.log_scale.exp())

    prior = Prior()
    layer = fb.BayesConv2d(3, 4, 3, prior=prior, bayesian_bias=True)
    assert "prior_module.log_scale" in dict(layer.named_parameters())
    layer(torch.randn(1, 3, 5, 5))
    layer.kl_loss().backward()
    for parameter in (layer.weight, layer.weight_rho, layer.bias, layer.bias_rho, prior.log_scale):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("rho", [-200.0, 200.0])
def test_monte_carlo_kl_is_finite_for_every_rho(rho: float) -> None:
    w = torch.randn(3, 2, 3, 3, requires_grad=True)
    raw = torch.full_like(w, rho).requires_grad_()
    mixture = fb.ScaleMixture(0.5, 1.0, 0.01)
    _, value = fb.functional.bayes_conv2d(
        torch.randn(1, 2, 5, 5), w, raw, prior=mixture, return_kl=True
    )
    value.backward()
    assert all(bool(t.isfinite().all()) for t in (value, w.grad, raw.grad))


def test_resolved_priors() -> None:
    assert kl.resolve_prior(None) is None
    assert kl.resolve_prior((0, 2)) == kl.NormalPrior(0.0, 2.0)
    assert isinstance(kl.resolve_prior(lambda: None), kl.DistributionPrior)


def test_monte_carlo_kl_does_not_depend_on_threads() -> None:
    """Two float32 sums used to be subtracted: their rounding was that of the thread count."""
    loc = torch.randn(300, 700) * 30
    eps, rho = torch.randn_like(loc), torch.full_like(loc, -4.0)
    prior, totals = kl.NormalPrior(0.0, 1.0), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        totals.append(kl.kl_of_sample(prior, loc, rho, eps, 2.0**-23))
    assert len({total.item() for total in totals}) == 1
    assert totals[0].dtype == torch.float32
    scale = kl.posterior_scale(rho, 2.0**-23)
    log_q = -0.5 * eps * eps - torch.log(scale) - 0.5 * math.log(2 * math.pi)
    log_p = prior.log_prob(loc + scale * eps)
    exact = (log_q.double() - log_p.double()).sum().float()
    torch.testing.assert_close(totals[0], exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_prior_scale_tensors_are_positive(value: float) -> None:
    loc = torch.zeros(4, 3)
    prior = (0.0, torch.tensor([1.0, 2.0, value]))
    filters = (0.0, torch.full((4, 1, 1, 1), value))
    x, weight = torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    calls = (
        lambda: fb.functional.kl_normal(loc, loc, prior),
        lambda: fb.functional.bayes_linear(x[0, 0, :1, :3], loc, loc, prior=prior, return_kl=True),
        lambda: fb.functional.bayes_conv2d(x, weight, weight, prior=filters, return_kl=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match="prior scale: expected positive values, got"):
            call()


def test_prior_scale_tensors_are_not_read_while_tracing() -> None:
    loc, scale = torch.zeros(4, 3), torch.full((3,), 2.0)

    def total(scale: torch.Tensor) -> torch.Tensor:
        return fb.functional.kl_normal(loc, loc, (0.0, scale))

    slope = torch.func.grad(total)(scale)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scale), total(scale))
    assert slope.shape == scale.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert total(torch.ones(3)).shape == ()


def _shaped(shape: tuple[int, ...], *, independent: bool = False):
    """A prior given as a function, of a parameter's own shape and with other values everywhere."""
    loc = torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)
    normal = distributions.Normal(loc, 0.5)
    return lambda: distributions.Independent(normal, len(shape)) if independent else normal


@pytest.mark.parametrize("independent", [False, True])
def test_a_prior_of_the_shape_of_the_parameter(independent: bool) -> None:
    """Linear maps and one-dimensional convolutions reshape their weight; its prior goes with it."""
    draw = {"seed": 3, "return_kl": True}
    calls = (
        (fb.functional.bayes_linear, torch.ones(2, 3), (4, 3)),
        (fb.functional.bayes_conv1d, torch.ones(2, 3, 5), (3, 3, 3)),
        (fb.functional.bayes_conv2d, torch.ones(2, 3, 5, 5), (3, 3, 3, 3)),
        (fb.functional.bayes_conv3d, torch.ones(2, 3, 5, 5, 5), (3, 3, 3, 3, 3)),
    )
    for function, x, shape in calls:
        loc, rho = torch.randn(shape), torch.randn(shape)
        prior = _shaped(shape, independent=independent)
        _, total = function(x, loc, rho, prior=prior, **draw)
        (sample,) = fb.functional.sample_posterior(loc, rho, seed=3)
        scale = kl.posterior_scale(rho, 2.0**-23)
        log_q = distributions.Normal(loc, scale).log_prob(sample).sum()
        torch.testing.assert_close(total, log_q - prior().log_prob(sample).sum())


@pytest.mark.parametrize("independent", [False, True])
def test_the_kl_collected_is_that_of_kl_loss(independent: bool) -> None:
    prior = _shaped((4, 3), independent=independent)
    layer = fb.BayesLinear(3, 4, prior=prior)
    with fb.collect_kl(layer) as collected, fb.fixed_sample(layer, seed=5):
        layer(torch.ones(2, 3))
        torch.testing.assert_close(collected.sum(), layer.kl_loss())


def test_a_prior_of_another_shape_is_refused() -> None:
    loc = torch.zeros(4, 3, 3, 3)
    for shape in ((2, 4, 3, 3, 3), (4, 1, 1, 2)):
        with pytest.raises(ValueError, match=r"prior: .* broadcasts to \(4, 3, 3, 3\), got"):
            fb.functional.bayes_conv2d(
                torch.zeros(1, 3, 5, 5), loc, loc, prior=_shaped(shape), return_kl=True
            )
