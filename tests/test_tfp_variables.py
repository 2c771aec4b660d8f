"""The TFP face as a module: its variables and its state."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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


# --- build and variables --------------------------------------------------------------------------


def test_kernel_memory_is_the_operators_layout() -> None:
    layer = Conv(5, (3, 2), **RANDOM_BIAS)
    layer.build((None, 8, 8, 4))
    for name in ("loc", "untransformed_scale"):
        kernel = getattr(layer, f"kernel_posterior_{name}")
        assert kernel.shape == (3, 2, 4, 5)
        view = kernel.permute(3, 2, 0, 1)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.data_ptr() == kernel.data_ptr()
    layer(torch.randn(2, 8, 8, 4)).sum().backward()
    assert layer.kernel_posterior_loc.grad.stride() == layer.kernel_posterior_loc.stride()


def test_channels_last_output_is_contiguous() -> None:
    layer = Conv(6, 3, padding="same")
    assert layer(torch.randn(2, 7, 8, 3)).is_contiguous()
    layer = Conv(6, 3, padding="same", data_format="channels_first")
    assert layer(torch.randn(2, 3, 7, 8)).is_contiguous()


def test_both_data_formats_agree() -> None:
    last, first = (
        Conv(4, 3, padding="same"),
        Conv(4, 3, padding="same", data_format="channels_first"),
    )
    last.build((None, 6, 5, 3))
    first.build((None, 3, 6, 5))
    first.set_weights(last.get_weights())
    x = torch.randn(2, 6, 5, 3)
    y = first(x.permute(0, 3, 1, 2), seed=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(last(x, seed=3), y)


def test_building_twice() -> None:
    layer = Conv(4, 3)
    layer.build((None, 8, 8, 3))
    loc = layer.kernel_posterior_loc
    layer.build((2, 5, 5, 3))
    assert layer.kernel_posterior_loc is loc
    with pytest.raises(ValueError, match="expected 3 channels, for which"):
        layer.build((None, 8, 8, 4))


def test_initial_values_are_drawn_independently() -> None:
    """TFP's identical start of layers with equal shapes is not reproduced."""
    options = {"kernel_prior_fn": tfp.default_mean_field_normal_fn(), **RANDOM_BIAS}
    layers = [Dense(64, **options) for _ in range(2)]
    for layer in layers:
        layer.build((None, 64))
    first, second = layers
    assert not torch.equal(first.kernel_posterior_loc, second.kernel_posterior_loc)
    assert not torch.equal(first.kernel_posterior_loc, first.kernel_prior_loc)
    assert not torch.equal(first.bias_posterior_loc, first.kernel_posterior_loc[0])
    loc, rho = first.kernel_posterior_loc, first.kernel_posterior_untransformed_scale
    assert abs(loc.mean().item()) < 0.01
    assert abs(loc.std().item() - 0.1) < 0.01
    assert abs(rho.mean().item() + 3) < 0.01
    assert abs(rho.std().item() - 0.1) < 0.01


def test_order_of_weights_with_trainable_priors() -> None:
    prior = tfp.default_mean_field_normal_fn()
    layer = Dense(2, kernel_prior_fn=prior, bias_posterior_fn=prior, bias_prior_fn=prior)
    layer.build((None, 3))
    roles = ("kernel_posterior", "kernel_prior", "bias_posterior", "bias_prior")
    names = [f"{role}_{part}" for role in roles for part in ("loc", "untransformed_scale")]
    assert [name for name, _ in layer.named_parameters()] == names
    assert all(a is getattr(layer, n) for a, n in zip(layer.weights, names, strict=True))
    assert layer.variables == layer.weights == layer.trainable_variables


def test_order_of_weights_with_user_functions_and_fixed_variables() -> None:
    def prior(dtype: Any, shape: Any, name: str, trainable: bool, add: Any) -> Any:
        loc = add(name=f"{name}_center", shape=shape, dtype=dtype, trainable=False)
        return torch.distributions.Normal(loc, 1.0)

    layer = Dense(2, kernel_posterior_fn=laplace_posterior, kernel_prior_fn=prior)
    layer.build((None, 3))
    names = [name for name, _ in layer.named_parameters()]
    kernel = ["kernel_posterior_loc", "kernel_posterior_untransformed_scale"]
    assert names == [*kernel, "kernel_prior_center", "bias_posterior_loc"]
    # Trainable ones first, then the others.
    expected = [*kernel, "bias_posterior_loc", "kernel_prior_center"]
    assert all(w is getattr(layer, n) for w, n in zip(layer.weights, expected, strict=True))
    assert layer.non_trainable_weights == [layer.kernel_prior_center]


def test_exchange_of_weights() -> None:
    layer = Conv(4, 3, **RANDOM_BIAS)
    assert layer.get_weights() == []
    layer.set_weights([])
    with pytest.raises(ValueError, match="expected 0 arrays"):
        layer.set_weights([np.zeros(3)])
    with pytest.raises(ValueError, match="expected a built layer"):
        layer.count_params()
    layer.build((None, 5, 5, 2))
    weights = layer.get_weights()
    assert [w.shape for w in weights] == [(3, 3, 2, 4), (3, 3, 2, 4), (4,), (4,)]
    assert layer.count_params() == sum(w.size for w in weights)
    copies = [w.astype(np.float64) + 1 for w in weights]
    layer.set_weights(copies)
    np.testing.assert_allclose(layer.get_weights()[0], copies[0], rtol=1e-6)
    np.testing.assert_array_less(weights[0], layer.get_weights()[0])
    with pytest.raises(ValueError, match="expected 4 arrays"):
        layer.set_weights(weights[:3])
    with pytest.raises(
        ValueError, match=r"weights\[0\]: expected an array of shape \(3, 3, 2, 4\)"
    ):
        layer.set_weights([weights[0][..., :2], *weights[1:]])
    for given in (None, 3):
        with pytest.raises(TypeError, match=f"weights: .*list.*, got {type(given).__name__}"):
            layer.set_weights(given)
    with pytest.raises(ValueError, match="got list"):
        layer.set_weights([*weights[:2], weights[2].tolist(), weights[3]])


def test_freezing() -> None:
    layer = Dense(2, **RANDOM_BIAS)
    layer.build((None, 3))
    layer.trainable = False
    assert (len(layer.trainable_weights), len(layer.non_trainable_weights)) == (0, 4)
    layer(torch.ones(1, 3))
    assert [loss.requires_grad for loss in layer.losses] == [False, False]
    layer.trainable = True
    assert len(layer.trainable_weights) == 4
    layer.kernel_posterior_untransformed_scale.requires_grad_(False)
    assert len(layer.non_trainable_variables) == 1
    built_frozen = Dense(2, trainable=False)
    built_frozen(torch.ones(1, 3))
    assert len(built_frozen.losses) == 1
    assert len(built_frozen.non_trainable_weights) == 3


# --- state ----------------------------------------------------------------------------------------


def test_state_dict_builds_an_unbuilt_layer() -> None:
    layer = Conv(3, 3, kernel_posterior_fn=laplace_posterior)
    layer.build((None, 5, 5, 2))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Conv(3, 3, kernel_posterior_fn=laplace_posterior)
    again.load_state_dict(state)
    for got, want in zip(again.weights, layer.weights, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    again.load_state_dict(state, assign=True)
    x = torch.randn(1, 5, 5, 2)
    assert torch.equal(again(x, seed=1), layer(x, seed=1))
    unbuilt = Conv(3, 3, kernel_posterior_fn=laplace_posterior)
    with pytest.raises(RuntimeError, match="Missing key"):
        unbuilt.load_state_dict({})
    default = Conv(3, 3)
    default.load_state_dict(Conv(3, 3).state_dict())
    assert not default.built


def test_any_strides_are_accepted() -> None:
    layer = Conv(3, 3, **RANDOM_BIAS)
    x = torch.randn(2, 5, 5, 2)
    layer.build(tuple(x.shape))
    y, kl = layer(x, seed=1), layer.kl_loss()
    state = {key: value.contiguous() for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.kernel_posterior_loc.is_contiguous()
    torch.testing.assert_close(layer(x, seed=1), y)
    torch.testing.assert_close(layer.kl_loss(), kl)


@pytest.mark.parametrize("built", [False, True])
def test_moving_to_another_dtype(built: bool) -> None:
    layer = Conv(3, 3, bias_posterior_fn=None)
    if built:
        layer.build((None, 5, 5, 2))
    layer.to(torch.float64)
    assert layer.dtype == torch.float64
    y = layer(torch.randn(1, 5, 5, 2))
    assert y.dtype == layer.kernel_posterior.mean.dtype == layer.losses[0].dtype == torch.float64
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    custom = Conv(3, 3, kernel_posterior_fn=laplace_posterior, bias_posterior_fn=None).double()
    custom.build((None, 5, 5, 2))
    assert custom.weights[0].dtype == torch.float64


def test_autocast_casts_the_activation_only() -> None:
    layer = Conv(3, 3, activity_regularizer="l2")
    x = torch.randn(2, 5, 5, 2)
    layer.build(tuple(x.shape))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, seed=1)
        assert y.dtype == layer(x.bfloat16(), seed=1).dtype == torch.bfloat16
    assert [loss.dtype for loss in layer.losses] == [torch.float32] * 2
    assert layer.kernel_posterior_loc.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x, seed=1), rtol=0.02, atol=0.02)
    (y.float().sum() + layer.kl_loss()).backward()
    assert layer.kernel_posterior_untransformed_scale.grad.dtype == torch.float32


def test_functional_call_and_checkpoint() -> None:
    layer = Conv(3, 3)
    x = torch.randn(1, 5, 5, 2)
    layer.build(tuple(x.shape))
    doubled = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    y = torch.func.functional_call(layer, doubled, (x,), {"seed": 1})
    assert not torch.equal(y, layer(x, seed=1))
    torch.manual_seed(0)
    want = torch.autograd.grad(layer(x).square().sum(), layer.kernel_posterior_loc)[0]
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), layer.kernel_posterior_loc)[0]
    torch.testing.assert_close(got, want)


def test_compiles_in_one_graph_and_draws_the_same_noise() -> None:
    layer = Conv(3, 3, activation="softmax", activity_regularizer="l2", **RANDOM_BIAS)
    x = torch.randn(2, 5, 5, 2)
    layer.build(tuple(x.shape))

    def step(x: Tensor) -> Tensor:
        return layer(x).square().mean() + sum(layer.losses)

    torch.manual_seed(0)
    want = step(x)
    torch.manual_seed(0)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)


def test_on_the_meta_device_and_back() -> None:
    with torch.device("meta"):
        layer = Conv(3, 3, **RANDOM_BIAS)
    y = layer(torch.empty(2, 5, 5, 2, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, 3, 3), "meta")
    source = Conv(3, 3, **RANDOM_BIAS)
    source.build((None, 5, 5, 2))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 5, 2)
    assert torch.equal(layer(x, seed=1), source(x, seed=1))


def test_vmap_over_seeds() -> None:
    layer = Dense(2)
    x = torch.randn(3, 4)
    layer.build(tuple(x.shape))
    parameters = dict(layer.named_parameters())
    seeds = torch.arange(6).reshape(3, 2)

    def call(seed: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,), {"seed": seed})

    got = torch.func.vmap(call)(seeds)
    torch.testing.assert_close(got, torch.stack([layer(x, seed=seed) for seed in seeds]))
    torch.func.vmap(call)(seeds)
    assert layer.losses[0].ndim == 0  # nothing of the transform is left on the layer
    assert layer.kernel_posterior_tensor.shape == (4, 2)
