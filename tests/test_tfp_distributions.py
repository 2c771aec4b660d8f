"""Distributions, built-in functions and regularisers of the TFP face."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Independent,
    Laplace,
    Normal,
    Poisson,
    StudentT,
    kl_divergence,
)

import fastbconv as fb
from fastbconv import noise, regularizers
from fastbconv.initializers import RandomNormal
from fastbconv.layers import tfp
from fastbconv.layers.tfp_distribution_classes import SeededNormal, reparameterized


def _add(**options: Any) -> Tensor:
    """An add_variable_fn without a layer."""
    value = options["initializer"](options["shape"], options["dtype"])
    return value if value.requires_grad else value.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_field_normal(dtype: torch.dtype) -> None:
    names: list[str] = []

    def add(**options: Any) -> Tensor:
        names.append(options["name"])
        assert (options["dtype"], options["trainable"]) == (dtype, True)
        return _add(**options)

    make = fb.default_mean_field_normal_fn(
        untransformed_scale_initializer=lambda shape, dtype: torch.full(shape, -40.0, dtype=dtype)
    )
    d = make(dtype, (2, 3), "kernel_posterior", True, add)
    assert names == ["kernel_posterior_loc", "kernel_posterior_untransformed_scale"]
    assert isinstance(d, Independent)
    assert (d.batch_shape, d.event_shape) == ((), (2, 3))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(d.stddev, torch.full((2, 3), eps + math.exp(-40), dtype=dtype))


def test_scale_is_exact_where_softplus_switches() -> None:
    """scale = eps + softplus(rho), also around the threshold of F.softplus and far from it."""
    rho = torch.tensor([-200.0, -30.0, 0.0, 19.0, 21.0, 39.0, 41.0, 200.0], dtype=torch.float64)
    rho.requires_grad_()
    make = fb.default_loc_scale_fn(untransformed_scale_initializer=lambda shape, dtype: rho)
    _, scale = make(torch.float64, (8,), None, True, _add)
    values = rho.detach().numpy()
    expected = np.logaddexp(0, values) + np.finfo(np.float64).eps
    np.testing.assert_allclose(scale.detach().numpy(), expected, rtol=1e-15)
    scale.sum().backward()
    np.testing.assert_allclose(rho.grad.numpy(), 1 / (1 + np.exp(-values)), rtol=1e-14)


def test_point_mass() -> None:
    make = fb.default_mean_field_normal_fn(is_singular=True)
    d = make(torch.float32, (3,), "bias_posterior", True, _add)
    loc = d.base_dist.loc
    assert d.mean is loc
    assert d.mode is loc
    assert torch.equal(d.sample(), loc)
    assert d.rsample((4,)).shape == (4, 3)
    assert torch.equal(d.stddev, torch.zeros(3))
    assert d.log_prob(loc) == 0
    assert d.log_prob(loc + 1) == -math.inf
    assert d.expand((2,)).sample().shape == (2, 3)
    prior = Independent(Normal(torch.zeros(3), 2.0), 1)
    torch.testing.assert_close(tfp.kl_divergence(d, prior), -prior.log_prob(loc))
    torch.testing.assert_close(kl_divergence(d, prior), -prior.log_prob(loc))
    assert (
        fb.default_loc_scale_fn(is_singular=True)(torch.float32, (3,), "b", True, _add)[1] is None
    )


def test_default_prior() -> None:
    prior = fb.default_multivariate_normal_fn(torch.float64, (2, 3), "p", True, None)
    assert (prior.event_shape, prior.mean.dtype) == ((2, 3), torch.float64)
    assert prior.mean.abs().sum() == 0
    assert (prior.stddev == 1).all()


def test_sample_carries_gradients() -> None:
    """``lambda d: d.sample()``, TFP's default, must train: sample is rsample."""
    loc = torch.zeros(3, requires_grad=True)
    for d in (Normal(loc, 1.0), Independent(Normal(loc, 1.0), 1), Laplace(loc, 1.0)):
        made = reparameterized(d)
        assert isinstance(made, type(d))
        assert type(made).__name__ == type(d).__name__
        assert made.sample().requires_grad
        assert made.sample((2,)).shape == (2, 3)
        assert not d.sample().requires_grad
        assert made.expand((2, *made.batch_shape)) is not None
    q, p = reparameterized(Independent(Normal(loc, 1.0), 1)), Independent(Normal(loc + 1, 1.0), 1)
    assert kl_divergence(q, p).item() == pytest.approx(1.5)


def test_a_distribution_without_rsample_warns() -> None:
    with pytest.warns(UserWarning, match="Poisson has no rsample"):
        made = reparameterized(Poisson(torch.ones(3)))
    assert type(made) is Poisson


def test_posteriors_print_under_the_name_that_users_know() -> None:
    size = "(loc: torch.Size([3, 2]), scale: torch.Size([3, 2]))"
    for name in ("DenseReparameterization", "DenseFlipout"):
        layer = getattr(tfp, name)(2)
        layer.build((None, 3))
        assert repr(layer.kernel_posterior) == f"Independent(Normal{size}, 2)"
        assert repr(layer.kernel_posterior.base_dist) == f"Normal{size}"
    layer = tfp.DenseLocalReparameterization(2)
    x = torch.randn(3, 4)
    layer(x)
    assert repr(layer.kernel_posterior_affine) == f"Normal{size}"


def test_seeded_draws_have_successive_numbers() -> None:
    d = SeededNormal(torch.zeros(2, 3), torch.ones(2, 3))
    assert d.rsample().shape == (2, 3)
    d.eps_source = lambda number: noise.weight_eps(7, (2, 3), number)
    first, second = d.rsample(), d.rsample((2,))
    torch.testing.assert_close(first, noise.weight_eps(7, (2, 3), 0))
    torch.testing.assert_close(second[1], noise.weight_eps(7, (2, 3), 2))


@pytest.mark.parametrize("wrap_q", [False, True])
@pytest.mark.parametrize("wrap_p", [False, True])
def test_default_divergence_takes_any_mix(wrap_q: bool, wrap_p: bool) -> None:
    q, p = Normal(torch.randn(2, 3), torch.rand(2, 3) + 0.1), Normal(0.5, 2.0)
    expected = kl_divergence(q, p).sum()
    p = Normal(torch.full((2, 3), 0.5), 2.0)
    got = tfp.kl_divergence(Independent(q, 2) if wrap_q else q, Independent(p, 2) if wrap_p else p)
    torch.testing.assert_close(got, expected)


def test_default_divergence_of_other_pairs() -> None:
    q, p = Laplace(torch.zeros(3), 1.0), Laplace(torch.ones(3), 1.0)
    expected = kl_divergence(q, p).sum()
    torch.testing.assert_close(tfp.kl_divergence(Independent(q, 1), p), expected)
    with pytest.raises(
        NotImplementedError, match="Laplace and Poisson; pass a divergence function"
    ):
        tfp.kl_divergence(q, Poisson(torch.ones(3)))


def test_the_kl_of_equal_normals_is_zero() -> None:
    q = Normal(torch.randn(100), torch.rand(100) + 0.01)
    assert tfp.kl_divergence(q, q).item() == 0.0
    near = Normal(q.loc, q.scale * (1 + 1e-4))
    assert tfp.kl_divergence(near, q).item() == pytest.approx(100 * 1e-8, rel=0.01)


@pytest.mark.parametrize("name", ["mean", "stddev"])
def test_a_called_property_is_explained(name: str) -> None:
    layer = fb.DenseReparameterization(
        2, kernel_posterior_tensor_fn=lambda d: getattr(d, name)(), bias_posterior_fn=None
    )
    with pytest.raises(
        TypeError, match=r"kernel_posterior_tensor_fn: .* properties.*posterior_mean"
    ):
        layer(torch.ones(1, 3))
    other = fb.DenseReparameterization(2, kernel_posterior_tensor_fn=lambda d: d + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        other(torch.ones(1, 3))


def test_bad_results_of_tensor_functions() -> None:
    layer = fb.DenseReparameterization(2, kernel_posterior_tensor_fn=lambda d: 1.0)
    with pytest.raises(TypeError, match="expected it to return a tensor, got float"):
        layer(torch.ones(1, 3))
    layer = fb.DenseReparameterization(2, kernel_posterior_tensor_fn=lambda d: d.mean.T)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), got \(2, 3\)"):
        layer(torch.ones(1, 3))


def test_posteriors_are_live() -> None:
    layer = fb.DenseReparameterization(2)
    layer.build((None, 3))
    before = layer.kernel_posterior.mean.clone()
    with torch.no_grad():
        layer.kernel_posterior_loc.add_(1)
    torch.testing.assert_close(layer.kernel_posterior.mean, before + 1)
    assert layer.bias_prior is None
    assert layer.kernel_posterior.sample().requires_grad
    assert not torch.equal(layer.kernel_posterior.sample(), layer.kernel_posterior.sample())


def test_a_user_prior_with_tensors_is_taken_in_closed_form() -> None:
    """Priors that broadcast to the documented shape mean the same on both paths."""
    loc = torch.randn(4)  # one per filter, the last axis
    for shape in ((4,), (1, 4), (3, 3, 2, 4), ()):
        value = loc.expand(3, 3, 2, 4) if len(shape) == 4 else loc.reshape(shape) if shape else 0.3

        def prior(dtype: Any, _: Any, *__: Any, value: Any = value) -> Normal:
            return Normal(torch.as_tensor(value, dtype=dtype), torch.tensor(0.7, dtype=dtype))

        closed = fb.Convolution2DReparameterization(4, 3, kernel_prior_fn=prior)
        generic = fb.Convolution2DReparameterization(
            4,
            3,
            kernel_prior_fn=prior,
            kernel_divergence_fn=lambda q, p, w: tfp.kl_divergence(q, p),
        )
        x = torch.randn(1, 5, 5, 2)
        for layer in (closed, generic):
            layer.build(tuple(x.shape))
            layer.set_weights(closed.get_weights())
            layer(x)
        torch.testing.assert_close(closed.losses[0], generic.losses[0])


def test_user_distributions_without_closed_form() -> None:
    def prior(dtype: Any, shape: Any, *_: Any) -> StudentT:
        return StudentT(torch.full(shape, 4.0, dtype=dtype))

    layer = fb.DenseReparameterization(2, kernel_prior_fn=prior)
    layer(torch.ones(1, 3))
    with pytest.raises(NotImplementedError, match="Monte-Carlo"):
        _ = layer.losses


def test_initialisers_draw_afresh() -> None:
    init = RandomNormal(-3.0, 0.1)
    first, second = (init((1000,), torch.float64) for _ in range(2))
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(-3, abs=0.02)
    assert first.std().item() == pytest.approx(0.1, abs=0.01)
    assert init((4,), torch.float16).dtype == torch.float16


def test_bad_initialiser() -> None:
    make = fb.default_mean_field_normal_fn(loc_initializer=lambda shape, dtype: torch.zeros(5))
    layer = fb.DenseReparameterization(2, kernel_posterior_fn=make)
    with pytest.raises(ValueError, match=r"kernel_posterior_loc: expected .* \(3, 2\), got \(5,\)"):
        layer.build((None, 3))


@pytest.mark.parametrize("name", ["kernel_posterior_loc", "weights", "a.b", "", None, "_records"])
def test_bad_variable_names(name: Any) -> None:
    def prior(dtype: Any, shape: Any, role: Any, trainable: Any, add: Any) -> Normal:
        return Normal(add(name=name, shape=shape), 1.0)

    layer = fb.DenseReparameterization(2, kernel_prior_fn=prior)
    with pytest.raises(ValueError, match="name: expected"):
        layer.build((None, 3))


def test_default_initialiser_of_user_variables() -> None:
    def prior(dtype: Any, shape: Any, role: Any, trainable: Any, add: Any) -> Normal:
        return Normal(add(name="scaled", shape=shape), 1.0)

    layer = fb.DenseReparameterization(64, kernel_prior_fn=prior)
    layer.build((None, 32))
    limit = math.sqrt(6 / (32 + 64))
    assert 0.9 * limit < layer.scaled.abs().max().item() <= limit


def test_regularisers() -> None:
    x = torch.tensor([1.0, -2.0])
    assert regularizers.l1()(x).item() == pytest.approx(0.03)
    assert regularizers.l2()(x).item() == pytest.approx(0.05)
    assert regularizers.l1_l2()(x).item() == pytest.approx(0.08)
    assert regularizers.L1L2()(x).item() == 0
    assert regularizers.l2()(x.half()).dtype == torch.float32
    for given in ("l1", "L2", "l1_l2"):
        regularizer = regularizers.get(given)
        assert regularizers.get(regularizers.serialize(regularizer)) == regularizer
    assert regularizers.get(None) is None
    assert regularizers.get(torch.sum) is torch.sum
    assert regularizers.get(regularizers.L1L2) == regularizers.L1L2()
    assert repr(regularizers.l1(0.5)) == "l1_l2(l1=0.5, l2=0.0)"
    assert len({regularizers.l1(0.5), regularizers.L1L2(0.5)}) == 1
    with pytest.raises(ValueError, match="l1: expected a finite non-negative number, got -1"):
        regularizers.l1(-1)
    with pytest.raises(TypeError, match="l2: expected a number, got str"):
        regularizers.l2("0.1")
    with pytest.raises(TypeError, match="expected one of 'l1', 'l2', 'l1_l2', got 'l3'"):
        regularizers.get("l3")
    with pytest.raises(ValueError, match="got 3"):
        regularizers.get(3)
