"""Every layer of the TFP face, whatever its rank and estimator: contexts, KL, PyTorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import tfp_layers
import torch
from tfp_layers import AFFINE, CONVOLUTIONS, NAMES, RANDOM_BIAS, built, gradients, make, twin
from torch import Tensor, nn
from torch.distributions import LogNormal

import fastbconv as fb
from fastbconv.layers import tfp

SEED = torch.tensor([5, 1])


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def reparameterized(layer: Any, name: str, **options: Any) -> Any:
    """The Reparameterization layer with the variables of another one."""
    return twin(layer, tfp_layers.stem_of(name) + "Reparameterization", **options)


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_draw(name: str) -> None:
    layer, x = built(name, **RANDOM_BIAS)
    assert torch.equal(layer(x, seed=4), layer(x, seed=4))
    assert not torch.equal(layer(x, seed=4), layer(x, seed=5))
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer.eval()(x), first)
    state = torch.get_rng_state()
    layer(x, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert tuple(first.shape) == layer.compute_output_shape(x.shape)
    assert torch.equal(layer(x.numpy(), seed=4), layer(x, seed=4))


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("posterior", [None, tfp_layers.plain_normal])
def test_a_function_of_ones_own_draws_the_same(name: str, posterior: Any) -> None:
    """``lambda d: d.sample()`` is the default, and so is the normal that the default makes."""
    fused, x = built(name, activation="tanh", **RANDOM_BIAS)
    options = {} if posterior is None else {"kernel_posterior_fn": posterior}
    for function in (tfp_layers.own_sample, tfp.posterior_sample):
        own = twin(
            fused,
            name,
            activation="tanh",
            kernel_posterior_tensor_fn=function,
            **options,
            **RANDOM_BIAS,
        )
        for got, want in zip(
            gradients(own, x, seed=SEED), gradients(fused, x, seed=SEED), strict=True
        ):
            close(got, want)
        close(own(x, seed=SEED), fused(x, seed=SEED))
        close(own.kernel_posterior_affine_tensor, fused.kernel_posterior_affine_tensor)
        close(own.kernel_posterior_affine.stddev, fused.kernel_posterior_affine.stddev)


@pytest.mark.parametrize("name", NAMES)
def test_mean_weights(name: str) -> None:
    layer, x = built(name, activation="relu", **RANDOM_BIAS)
    mean = twin(
        layer,
        name,
        activation="relu",
        kernel_posterior_tensor_fn=tfp.posterior_mean,
        bias_posterior_tensor_fn=tfp.posterior_mean,
        **RANDOM_BIAS,
    )
    want = reparameterized(layer, name, activation="relu", **RANDOM_BIAS)
    state = torch.get_rng_state()
    with fb.mean_weights(nn.Sequential(layer, want)):
        got = layer(x)
        close(got, want(x))
    close(mean(x), got)
    assert torch.equal(torch.get_rng_state(), state)
    close(mean(x, seed=1), got)
    if name in AFFINE:
        assert mean.kernel_posterior_tensor is None
        close(mean.kernel_posterior_affine_tensor, layer.kernel_posterior_affine.mean)
        close(layer.kernel_posterior_affine_tensor, layer.kernel_posterior_affine.mean)


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("function", [tfp.posterior_sample, tfp_layers.own_sample])
def test_fixed_sample_draws_the_weights_once(name: str, function: Any) -> None:
    layer, x = built(name, kernel_posterior_tensor_fn=function, **RANDOM_BIAS)
    other = reparameterized(layer, name, kernel_posterior_tensor_fn=function, **RANDOM_BIAS)
    with fb.fixed_sample(layer, 3), fb.fixed_sample(other, 3):
        got, want = layer(x), other(x)
        close(got, want)
        close(layer(x[1:]), want[1:])  # every row sees the same weights
        assert not torch.allclose(layer(x, seed=3), want)  # a given seed keeps the estimator
        layer(x)
    close(layer.kernel_posterior_tensor, other.kernel_posterior_tensor)
    assert layer.kernel_posterior_affine is layer.kernel_posterior_affine_tensor is None
    layer(x)
    assert layer.kernel_posterior_tensor is None


@pytest.mark.parametrize("name", NAMES)
def test_collected_kl(name: str) -> None:
    for options in ({}, {"kernel_posterior_tensor_fn": tfp_layers.own_sample}):
        layer, x = built(name, **options, **RANDOM_BIAS)
        with fb.collect_kl(layer) as kl:
            y = layer(x)
        close(kl.sum(), layer.kl_loss())
        close(sum(layer.losses), layer.kl_loss())
        close(kl.sum(), reparameterized(layer, name, **RANDOM_BIAS).kl_loss())
        want = torch.autograd.grad(layer.kl_loss(), layer.weights)
        got = torch.autograd.grad(kl.sum() + 0.0 * y.sum(), layer.weights)
        for gradient, expected in zip(got, want, strict=True):
            close(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_pass_builds_no_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = built(name, **RANDOM_BIAS)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a distribution was built")

    monkeypatch.setattr(torch.distributions.Distribution, "__init__", refuse)
    with fb.collect_kl(layer) as kl:
        y = layer(x)
    (y.sum() + kl.sum() + sum(layer.losses)).backward()


@pytest.mark.parametrize("name", AFFINE)
def test_a_group_leaves_the_layer_alone(name: str) -> None:
    layer, x = built(name, **RANDOM_BIAS)
    torch.manual_seed(3)
    want = layer(x)
    torch.manual_seed(3)
    with fb.grouped(layer), fb.collect_kl(layer) as kl:
        assert torch.equal(layer(x), want)
    close(kl.sum(), layer.kl_loss())
    with fb.grouped(layer, seed=2), fb.fixed_sample(layer, 2):
        want = reparameterized(layer, name, **RANDOM_BIAS)(x, seed=fb.noise.derive(2, 0))
        close(layer(x), want)


@pytest.mark.parametrize("name", AFFINE)
def test_a_divergence_gets_no_sample(name: str) -> None:
    seen = []

    def divergence(q: Any, p: Any, w: Any) -> Tensor:
        seen.append(w)
        return tfp.kl_divergence(q, p)

    layer, x = built(name, kernel_divergence_fn=divergence, bias_divergence_fn=divergence)
    layer(x)
    assert len(layer.losses) == 1
    assert seen == [None]
    layer.kl_loss()
    assert seen == [None, None]


# --- posteriors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINE)
def test_the_posterior_has_to_be_normal(name: str) -> None:
    singular = tfp.default_mean_field_normal_fn(is_singular=True)
    for function, kind in (
        (singular, "Deterministic"),
        (tfp_layers.laplace, "Laplace"),
        (lambda _, shape, *__: LogNormal(torch.zeros(shape), 1.0), "LogNormal"),
    ):
        layer, x = built(name, kernel_posterior_fn=function)
        with pytest.raises(TypeError, match=f"expected .*Normal.*, got {kind}.*Reparam"):
            layer(x)
        with fb.mean_weights(layer):
            layer(x)  # the mean of any distribution


@pytest.mark.parametrize("name", AFFINE)
def test_results_of_a_tensor_function_are_checked(name: str) -> None:
    layer, x = built(name, kernel_posterior_tensor_fn=lambda d: d.mean[:1])
    with pytest.raises(ValueError, match="kernel_posterior_tensor_fn: expected a tensor of shape"):
        layer(x)
    layer, x = built(name, kernel_posterior_tensor_fn=lambda d: d.mean())
    with pytest.raises(TypeError, match="properties"):
        layer(x)


# --- the last call --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINE)
def test_attributes_of_a_call(name: str) -> None:
    layer, x = built(name)
    for attribute in ("tensor", "affine", "affine_tensor"):
        with pytest.raises(AttributeError, match=f"kernel_posterior_{attribute}: expected a layer"):
            getattr(layer, f"kernel_posterior_{attribute}")
    layer(x)
    assert layer.kernel_posterior_tensor is None
    drawn = layer.kernel_posterior_affine_tensor
    assert torch.equal(layer.kernel_posterior_affine_tensor, drawn)
    affine = layer.kernel_posterior_affine
    assert affine.mean.shape == affine.sample().shape == drawn.shape
    assert not torch.equal(affine.sample(), affine.sample())
    layer(x)
    assert not torch.equal(layer.kernel_posterior_affine_tensor, drawn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [tfp.posterior_sample, tfp_layers.own_sample])
def test_nothing_of_a_call_is_held_or_copied(name: str, function: Any) -> None:
    layer, x = built(name, kernel_posterior_tensor_fn=function, activity_regularizer="l2")
    layer(x)
    held = [v for v in vars(layer._last).values() if isinstance(v, Tensor)]
    assert sorted(tuple(v.shape) for v in held) == [(), (2,)]  # the activity loss and the seed
    assert len(layer._last.tensors) == (function is tfp_layers.own_sample)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.losses == []
        assert torch.equal(clone(x, seed=1), layer(x, seed=1))
    assert set(layer.state_dict()) == {key for key, _ in layer.named_parameters()}
    again = make(name, kernel_posterior_tensor_fn=function, activity_regularizer="l2")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, seed=1), layer(x, seed=1))


# --- layout, dtypes, devices ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("function", [tfp.posterior_sample, tfp_layers.own_sample])
def test_layouts(name: str, function: Any) -> None:
    """Both data formats have one result and one kernel; memory is that of the operators."""
    options = {"padding": "same", "kernel_posterior_tensor_fn": function, **RANDOM_BIAS}
    last, x = built(name, **options)
    first, y = built(name, data_format="channels_first", **options)
    first.set_weights(last.get_weights())
    y = x.movedim(-1, 1).contiguous()
    output = last(x, seed=3)
    close(first(y, seed=3).movedim(1, -1), output)
    assert output.is_contiguous()
    assert first(y, seed=3).is_contiguous()
    kernel = last.kernel_posterior_loc
    assert kernel.shape == (*[2] * last.rank, 3, 4)
    assert kernel.permute(-1, *range(last.rank + 1)).is_contiguous()  # (filters, *window, C)
    if "Local" in name:  # a pre-activation, in the layout of the output
        got = first.kernel_posterior_affine_tensor.movedim(1, -1)
        close(got, last.kernel_posterior_affine_tensor)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [tfp.posterior_sample, tfp_layers.own_sample])
def test_autocast_and_low_precision(name: str, function: Any) -> None:
    layer, x = built(name, kernel_posterior_tensor_fn=function)
    want = layer(x, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, seed=1).dtype == layer(x.bfloat16(), seed=1).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x, seed=1).float(), want, rtol=0.03, atol=0.03)
        (layer(x).float().sum() + layer.kl_loss()).backward()
    assert layer.kernel_posterior_untransformed_scale.grad.dtype == torch.float32
    with torch.no_grad(), fb.mean_weights(layer):
        want = layer(x)
        half = layer.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(half.float(), want, rtol=0.03, atol=0.03)
    with torch.no_grad():
        assert layer(x.bfloat16(), seed=1).dtype == half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [tfp.posterior_sample, tfp_layers.own_sample])
def test_meta_device(name: str, function: Any) -> None:
    options: dict[str, Any] = {"kernel_posterior_tensor_fn": function, **RANDOM_BIAS}
    if "Flipout" in name:
        options["seed"] = 3
    with torch.device("meta"):
        layer = make(name, **options)
    x = tfp_layers.image(name)
    y = layer(x.to("meta"))
    assert (tuple(y.shape), y.device.type) == (layer.compute_output_shape(x.shape), "meta")


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(name: str, use_reentrant: bool) -> None:
    layer, x = built(name, **RANDOM_BIAS)
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        z = x.clone().requires_grad_()
        if wrapped:
            y = torch.utils.checkpoint.checkpoint(layer, z, use_reentrant=use_reentrant)
        else:
            y = layer(z)
        y.square().sum().backward()
        results.append([weight.grad.clone() for weight in layer.weights])
    for got, want in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_and_vmap_over_seeds(name: str) -> None:
    layer, x = built(name, **RANDOM_BIAS)
    parameters = {key: value.detach() * 2 for key, value in layer.named_parameters()}
    seeds = torch.tensor([[1, 0], [2, 0], [3, 5]])

    def run(seed: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,), {"seed": seed})

    got = torch.func.vmap(run)(seeds)
    close(got, torch.stack([run(seed) for seed in seeds]))
    torch.func.vmap(run)(seeds)
    assert layer.losses[0].ndim == 0  # nothing of the transform is left on the layer
    if "Local" not in name:
        sample = layer.kernel_posterior_affine_tensor if "Flip" in name else None
        sample = layer.kernel_posterior_tensor if sample is None else sample
        assert sample.shape == layer.kernel_posterior_loc.shape


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph_and_draws_the_same_noise(name: str) -> None:
    layer, x = built(name, activation="softmax", activity_regularizer="l2", **RANDOM_BIAS)
    torch.compiler.reset()

    def step(x: Tensor) -> Tensor:
        return layer(x).square().mean() + sum(layer.losses)

    torch.manual_seed(0)
    want = step(x)
    torch.manual_seed(0)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    close(got, want)


def test_a_small_network_trains() -> None:
    features = torch.randn(24, 6, 6, 1)
    labels = (features.mean((1, 2, 3)) > 0).long()
    model = nn.Sequential(
        fb.Convolution2DFlipout(4, 3, activation="relu", seed=1),
        nn.Flatten(),
        fb.DenseLocalReparameterization(8, activation="relu"),
        fb.DenseFlipout(2),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    history = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(features), labels) + fb.kl_loss(model, 10_000)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert np.mean(history[-5:]) < np.mean(history[:5])
