"""The TFP face as a module: losses, noise, whole-model functions, training."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import regularizers
from fastbconv.layers import tfp

Conv, Dense = tfp.Convolution2DReparameterization, tfp.DenseReparameterization
RANDOM_BIAS: dict[str, Any] = {
    "bias_posterior_fn": tfp.default_mean_field_normal_fn(),
    "bias_prior_fn": tfp.default_multivariate_normal_fn,
}


def laplace_posterior(dtype: Any, shape: Any, name: Any, trainable: Any, add: Any) -> Any:
    """A posterior of the user's own, with variables."""
    loc, scale = tfp.default_loc_scale_fn()(dtype, shape, name, trainable, add)
    base = torch.distributions.Laplace(loc, scale, validate_args=False)
    return torch.distributions.Independent(base, len(shape), validate_args=False)


def monte_carlo(q: Any, p: Any, w: Tensor) -> Tensor:
    return q.log_prob(w) - p.log_prob(w)


# --- losses ---------------------------------------------------------------------------------------


def test_losses_in_order_and_replaced_by_the_next_call() -> None:
    layer = Dense(
        2,
        activity_regularizer=lambda y: y.square().sum(),
        kernel_posterior_fn=tfp.default_mean_field_normal_fn(loc_regularizer=regularizers.l1(0.5)),
        **RANDOM_BIAS,
    )
    assert layer.losses == []
    layer.build((None, 3))
    assert len(layer.losses) == 1  # the variable's regulariser
    for _ in range(3):
        y = layer(torch.randn(5, 3))
    kernel, bias, activity, penalty = (loss.item() for loss in layer.losses)
    q, p = layer.kernel_posterior, layer.kernel_prior
    assert kernel == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-5)
    q, p = layer.bias_posterior, layer.bias_prior
    assert bias == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-5)
    assert activity == pytest.approx(y.square().sum().item() / 5, rel=1e-6)
    assert penalty == pytest.approx(0.5 * layer.kernel_posterior_loc.abs().sum().item(), rel=1e-6)
    assert layer.kl_loss().item() == pytest.approx(kernel + bias, rel=1e-6)
    assert fb.regularization_loss(layer).item() == pytest.approx(activity + penalty, rel=1e-6)


def test_kl_is_a_plain_sum_and_independent_of_the_batch() -> None:
    narrow, wide = Conv(8, 3), Conv(16, 3)
    kernels = []
    for layer in (narrow, wide):
        layer.build((None, 6, 6, 4))
        with torch.no_grad():
            layer.kernel_posterior_loc.fill_(0.1)
            layer.kernel_posterior_untransformed_scale.fill_(-3.0)
        for rows in (1, 7):
            layer(torch.zeros(rows, 6, 6, 4))
            kernels.append(layer.losses[0].item())
    assert kernels[0] == kernels[1]
    assert kernels[2] == pytest.approx(2 * kernels[0], rel=1e-6)


@pytest.mark.parametrize("rho", [-200.0, -100.0, 0.0, 100.0, 200.0])
def test_extreme_scales_stay_finite(rho: float) -> None:
    layer = Dense(3, **RANDOM_BIAS)
    layer.build((None, 4))
    with torch.no_grad():
        layer.kernel_posterior_untransformed_scale.fill_(rho)
        layer.bias_posterior_untransformed_scale.fill_(rho)
    y = layer(torch.randn(2, 4))
    (y.sum() + sum(layer.losses)).backward()
    assert y.isfinite().all()
    assert all(loss.isfinite() for loss in layer.losses)
    assert all(weight.grad.isfinite().all() for weight in layer.weights)


def test_a_divergence_that_reads_the_sample_gets_that_of_the_call() -> None:
    seen: list[Tensor] = []

    def divergence(q: Any, p: Any, w: Tensor) -> Tensor:
        seen.append(w)
        return monte_carlo(q, p, w)

    layer = Conv(2, 2, kernel_divergence_fn=divergence)
    layer.build((None, 2, 2, 3))
    y = layer(torch.eye(12).reshape(12, 2, 2, 3))  # the output is the kernel itself, plus the bias
    loss = layer.losses[0]
    kernel = (y - layer.bias_posterior_loc).reshape(2, 2, 3, 2)
    torch.testing.assert_close(seen[0], kernel)
    torch.testing.assert_close(layer.kernel_posterior_tensor, kernel)
    assert layer.bias_posterior_tensor is layer.bias_posterior_loc
    assert layer.kernel_posterior_affine is layer.kernel_posterior_affine_tensor is None
    assert layer.losses[0].item() == loss.item()
    loss.backward()
    assert layer.kernel_posterior_untransformed_scale.grad.abs().sum() > 0


def test_several_calls_before_one_backward() -> None:
    """The noise of an earlier call is not overwritten by a later one."""
    layer = Conv(3, 3)
    layer.build((None, 5, 5, 2))
    x = torch.randn(2, 5, 5, 2)
    parameters = list(layer.parameters())
    together = torch.autograd.grad(
        layer(x, seed=1).square().sum() + layer(x, seed=2).square().sum(), parameters
    )
    apart = [torch.autograd.grad(layer(x, seed=s).square().sum(), parameters) for s in (1, 2)]
    for got, first, second in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, first + second)


def test_nothing_of_a_call_is_held_or_copied() -> None:
    layer = Conv(3, 3, activity_regularizer="l2", kernel_divergence_fn=monte_carlo)
    layer(torch.randn(1, 5, 5, 2))
    assert len(layer.losses) == 2
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.losses == []
        assert clone(torch.randn(1, 5, 5, 2)).shape == (1, 3, 3, 3)
        assert clone.kernel_posterior_loc.stride() == layer.kernel_posterior_loc.stride()
    tensors = [v for v in vars(layer).values() if isinstance(v, Tensor)]
    assert tensors == []
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


def test_divergence_results_are_recorded_as_they_are() -> None:
    layer = Dense(2, kernel_divergence_fn=lambda q, p, w: 3.5)
    layer(torch.ones(1, 3))
    assert layer.losses == [3.5]
    assert layer.kl_loss().item() == 3.5
    layer = Dense(2, kernel_divergence_fn=lambda q, p, w: None)
    layer(torch.ones(1, 3))
    with pytest.raises(ValueError, match="kernel_divergence_fn: expected a tensor"):
        _ = layer.losses
    unbuilt = Dense(2)
    with pytest.raises(ValueError, match="kl_loss: expected a built layer"):
        unbuilt.kl_loss()


def test_the_fused_pass_builds_no_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Conv(3, 3, **RANDOM_BIAS)
    layer.build((None, 5, 5, 2))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a distribution was built")

    monkeypatch.setattr(torch.distributions.Distribution, "__init__", refuse)
    with fb.collect_kl(layer) as kl:
        y = layer(torch.randn(2, 5, 5, 2))
    (y.sum() + kl.sum() + sum(layer.losses)).backward()
    with pytest.raises(AssertionError, match="was built"):
        _ = layer.kernel_posterior


def test_backward_keeps_no_noise_and_no_sample() -> None:
    """Saved: input, parameters and the 16-byte seed."""
    layer = Conv(6, 3, padding="same")
    x = torch.randn(2, 7, 7, 4, requires_grad=True)
    layer.build(tuple(x.shape))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, id):
        y = layer(x)
    allowed = {t.data_ptr() for t in (x, y, *layer.parameters())}
    others = [pointer for pointer in saved if pointer not in allowed]
    # One more: the seed. The reference is plain PyTorch and saves what that saves.
    assert len(others) <= 1 or not fb.build_info()["library"]


# --- noise ----------------------------------------------------------------------------------------


def test_seeds() -> None:
    layer = Conv(3, 3, **RANDOM_BIAS)
    x = torch.randn(2, 5, 5, 2)
    layer.build(tuple(x.shape))
    assert torch.equal(layer(x, seed=4), layer(x, seed=4))
    assert not torch.equal(layer(x, seed=4), layer(x, seed=5))
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()  # no difference between training and inference
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    state = torch.get_rng_state()
    layer(x, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("posterior", [None, laplace_posterior])
def test_user_functions_obey_the_seed(posterior: Any) -> None:
    options = {} if posterior is None else {"kernel_posterior_fn": posterior}
    layer = Conv(3, 3, kernel_posterior_tensor_fn=lambda d: d.sample(), **options)
    x = torch.randn(2, 5, 5, 2)
    layer.build(tuple(x.shape))
    state = torch.get_rng_state()
    y = layer(x, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(x, seed=4), y)
    assert not torch.equal(layer(x, seed=5), y)
    assert not torch.equal(layer(x), layer(x))
    if posterior is None:
        fused = Conv(3, 3)
        fused.build(tuple(x.shape))
        fused.set_weights(layer.get_weights())
        torch.testing.assert_close(fused(x, seed=4), y)
    y.sum().backward()
    assert layer.kernel_posterior_untransformed_scale.grad.abs().sum() > 0


def test_models_built_one_after_the_other_start_apart() -> None:
    first, second = (fb.build(nn.Sequential(Dense(8)), (None, 8)) for _ in range(2))
    assert not torch.equal(first[0].kernel_posterior_loc, second[0].kernel_posterior_loc)
    assert fb.losses(first) == []  # building is no call


def test_whole_model_contexts() -> None:
    model = nn.Sequential(
        Conv(3, 3, padding="same", **RANDOM_BIAS),
        fb.ChannelsLast(nn.MaxPool2d(2)),
        nn.Flatten(),
        Dense(4, kernel_posterior_tensor_fn=lambda d: d.sample(), kernel_divergence_fn=monte_carlo),
    )
    x = torch.randn(2, 6, 6, 2)
    fb.build(model, tuple(x.shape))
    with fb.fixed_sample(model, 5):
        first = model(x)
        assert torch.equal(model(x), first)
    with fb.mean_weights(model):
        mean = model(x)
        assert torch.equal(model(x), mean)
    assert not torch.equal(first, mean)
    with fb.collect_kl(model) as kl:
        model(x)
    torch.testing.assert_close(kl.sum(), fb.kl_loss(model))
    assert len(fb.losses(model)) == 3
    torch.testing.assert_close(sum(fb.losses(model)), fb.kl_loss(model))


# --- training -------------------------------------------------------------------------------------


def test_an_optimiser_made_before_the_first_call() -> None:
    layer = Dense(2, **RANDOM_BIAS)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    held = [id(p) for p in layer.parameters()]
    (layer(torch.ones(3, 4)).square().mean() + layer.kl_loss()).backward()
    before = layer.get_weights()
    optimiser.step()
    assert held == [id(p) for p in layer.parameters()]
    assert all((a != b).any() for a, b in zip(before, layer.get_weights(), strict=True))


def test_user_variables_made_in_a_training_call_are_announced() -> None:
    layer = Dense(2, kernel_posterior_fn=laplace_posterior)
    with pytest.warns(UserWarning, match=r"kernel_posterior_loc.* functions of your own"):
        layer(torch.ones(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dense(2, kernel_posterior_fn=laplace_posterior).eval()(torch.ones(1, 3))


def test_a_failed_build_leaves_the_layer_unbuilt() -> None:
    def prior(dtype: Any, shape: Any, *_: Any) -> Any:
        raise RuntimeError("no prior today")

    layer = Dense(2, kernel_prior_fn=prior)
    with pytest.raises(RuntimeError, match="no prior today"):
        layer.build((None, 3))
    assert not layer.built
    assert layer.weights == []
    layer.kernel_prior_fn = None
    layer.build((None, 5))
    assert layer.kernel_posterior_loc.shape == (5, 2)


def test_constraints() -> None:
    layer = Dense(
        2, kernel_posterior_fn=tfp.default_mean_field_normal_fn(loc_constraint=torch.relu)
    )
    layer.build((None, 8))
    assert (layer.kernel_posterior_loc < 0).any()
    fb.apply_constraints(nn.Sequential(layer))
    assert (layer.kernel_posterior_loc >= 0).all()


def test_the_documented_example() -> None:
    """The documentation's example line by line; the optimiser is made before the first call."""
    features, labels = torch.randn(16, 32 * 32 * 3), torch.arange(16) % 10
    model = nn.Sequential(
        nn.Unflatten(1, (32, 32, 3)),
        fb.Convolution2DReparameterization(8, kernel_size=5, padding="SAME", activation=F.relu),
        fb.ChannelsLast(nn.MaxPool2d(2, 2, ceil_mode=True)),
        nn.Flatten(),
        fb.DenseReparameterization(10),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(8):
        logits = model(features)
        neg_log_likelihood = F.cross_entropy(logits, labels)
        kl = sum(fb.losses(model)) / 50_000
        loss = neg_log_likelihood + kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert np.mean(history[-3:]) < np.mean(history[:3])


def test_a_bare_pool_on_nhwc_is_not_what_the_wrapper_does() -> None:
    x = torch.randn(1, 4, 6, 8)
    pooled = fb.ChannelsLast(nn.MaxPool2d(2))(x)
    assert pooled.shape == (1, 2, 3, 8)
    torch.testing.assert_close(pooled[0, 0, 0], x[0, :2, :2].amax((0, 1)))
    assert fb.ChannelsLast(nn.Flatten())(x).shape == (1, 192)
    values, indices = fb.ChannelsLast(nn.MaxPool2d(2, return_indices=True))(x)
    assert values.shape == indices.shape == (1, 2, 3, 8)
    with pytest.raises(ValueError, match="spatial axis"):
        fb.ChannelsLast(nn.Identity())(torch.ones(2, 3))
