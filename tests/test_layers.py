"""BayesConv2d and BayesLinear: arguments, parameters, state, repr, modes, compile."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same

SEED = torch.tensor([3, 4])


def _conv(**options) -> fb.BayesConv2d:
    return fb.BayesConv2d(3, 6, 3, **options)


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8)


# --- parameters ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"padding": 1},
        {"padding": (2, 1), "stride": (1, 2)},
        {"dilation": (2, 1), "padding": "same"},
        {"padding": "valid"},
        {"groups": 3},
        {"bias": False},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate"},
    ],
)
def test_the_mean_is_the_deterministic_layer(options) -> None:
    theirs = nn.Conv2d(3, 6, 3, **options)
    ours = _conv(**options, eval_mode="mean").eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == (["weight_rho"], [])
    x = _image()
    assert_close(ours(x), theirs(x), 1e-5, 1e-5)


def test_a_loaded_linear_checkpoint() -> None:
    theirs = nn.Linear(5, 4)
    ours = fb.BayesLinear(5, 4, eval_mode="mean").eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 3, 5)
    assert_close(ours(x), theirs(x), 1e-6, 1e-6)


def test_same_with_stride_and_four_sided_padding() -> None:
    assert _conv(padding="same", stride=2)(torch.randn(2, 3, 8, 7)).shape == (2, 6, 4, 4)
    layer = _conv(padding=((1, 0), (2, 1)), padding_mode="replicate")
    assert layer(_image()).shape == (2, 6, 8, 9)
    assert layer.padding == ((1, 0), (2, 1))


def test_initial_values() -> None:
    torch.manual_seed(1)
    ours = _conv()
    torch.manual_seed(1)
    theirs = nn.Conv2d(3, 6, 3)
    assert_same(ours.weight.data, theirs.weight.data)
    assert_same(ours.bias.data, theirs.bias.data)
    assert_close(ours.weight_scale, torch.full_like(ours.weight, 0.1 / math.sqrt(27)), 1e-5, 0)
    linear = fb.BayesLinear(16, 4, bayesian_bias=True)
    assert_close(linear.weight_scale, torch.full((4, 16), 0.025), 1e-5, 0)
    assert_close(linear.bias_scale, torch.full((4,), 0.025), 1e-5, 0)
    with torch.no_grad():
        ours.weight_rho.add_(1.0)
    ours.reset_parameters()
    assert_close(ours.weight_scale, torch.full_like(ours.weight, 0.1 / math.sqrt(27)), 1e-5, 0)


def test_parameters_and_state() -> None:
    plain, full = _conv(), _conv(bayesian_bias=True)
    assert list(plain.state_dict()) == ["weight", "bias", "weight_rho"]
    assert list(full.state_dict()) == ["weight", "bias", "weight_rho", "bias_rho"]
    assert list(plain.buffers()) == []
    assert plain.bias_rho is None
    assert _conv(bias=False).bias is None
    prior = _conv(prior=(torch.zeros(6, 1, 1, 1), nn.Parameter(torch.ones(()))))
    assert set(prior.state_dict()) == {"weight", "bias", "weight_rho", "prior_loc", "prior_scale"}
    assert "prior_scale" in dict(prior.named_parameters())
    assert "prior_loc" in dict(prior.named_buffers())


def test_state_survives_a_file_and_other_formats() -> None:
    layer, other = _conv(), _conv()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    x = _image()
    expected = layer(x, SEED)
    assert_same(other(x, SEED), expected)
    swapped = {
        k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v
        for k, v in layer.state_dict().items()
    }
    other.load_state_dict(swapped, assign=True)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(other(x, SEED), expected, 1e-5, 1e-5)
    assert_close(layer.to(memory_format=torch.channels_last)(x, SEED), expected, 1e-5, 1e-5)


def test_meta_construction_and_device_dtype_arguments() -> None:
    layer = _conv(device="meta", dtype=torch.float64)
    assert layer.weight_rho.is_meta
    assert layer.weight_rho.dtype == torch.float64
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(_image().double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(dtype: torch.dtype) -> None:
    layer = _conv(prior=(torch.zeros(6, 1, 1, 1), 1.0)).to(dtype)
    assert {t.dtype for t in layer.state_dict().values()} == {dtype}
    with torch.no_grad():
        assert layer(_image().to(dtype)).dtype == dtype
        assert layer.kl_loss().isfinite()


# --- repr -----------------------------------------------------------------------------------------


def test_repr_names_what_is_not_default() -> None:
    assert repr(_conv()) == "BayesConv2d(3, 6, kernel_size=(3, 3), stride=(1, 1))"
    text = repr(
        _conv(
            stride=2,
            padding="same",
            dilation=2,
            groups=3,
            bias=False,
            padding_mode="reflect",
            activation="relu",
            prior=(0.0, 0.5),
            eval_mode="mean",
        )
    )
    for part in (
        "stride=(2, 2)",
        "padding='same'",
        "dilation=(2, 2)",
        "groups=3",
        "bias=False",
        "padding_mode='reflect'",
        "activation='relu'",
        "prior=(0.0, 0.5)",
        "eval_mode='mean'",
    ):
        assert part in text
    assert "bayesian_bias=True" in repr(fb.BayesLinear(2, 2, bayesian_bias=True))
    assert "prior=(tensor, 1.0)" in repr(_conv(prior=(torch.zeros(()), 1.0)))


# --- forward --------------------------------------------------------------------------------------


def test_forward_is_the_functional() -> None:
    layer = _conv(padding=1, activation="gelu", bayesian_bias=True)
    x = _image()
    expected = fb.functional.bayes_conv2d(
        x,
        layer.weight,
        layer.weight_rho,
        layer.bias,
        layer.bias_rho,
        padding=1,
        activation="gelu",
        seed=SEED,
    )
    assert_same(layer(x, seed=SEED), expected)
    linear = fb.BayesLinear(8, 5, activation="tanh")
    expected = fb.functional.bayes_linear(
        x, linear.weight, linear.weight_rho, linear.bias, activation="tanh", seed=SEED
    )
    assert_same(linear(x, SEED), expected)


def test_samples_of_a_layer() -> None:
    layer, x = _conv(), torch.randn(4, 3, 5, 5)
    assert layer(x, SEED, num_samples=2, share_input=True).shape == (8, 6, 3, 3)
    halves = layer(x, SEED, num_samples=2)
    assert_close(halves[:2], layer(x[:2], SEED), 1e-6, 1e-6)
    assert_close(halves[2:], layer(x[2:], torch.tensor([3, 5])), 1e-6, 1e-6)


def test_train_and_eval_sample_alike_unless_asked() -> None:
    x = _image()
    layer = _conv()
    assert not torch.equal(layer.eval()(x), layer(x))
    assert_same(layer.train()(x, SEED), layer.eval()(x, SEED))
    mean = _conv(eval_mode="mean")
    assert not torch.equal(mean(x), mean(x))
    assert_same(mean.eval()(x), mean(x))
    assert_close(mean(x), F.conv2d(x, mean.weight, mean.bias), 1e-5, 1e-5)


def test_the_generator_governs_the_draw() -> None:
    layer, x = _conv(), _image()
    outputs = [layer(x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert_same(*outputs)


# --- KL -------------------------------------------------------------------------------------------


def test_kl_is_computed_on_access() -> None:
    layer = _conv(bayesian_bias=True, prior=(0.1, 0.5))
    first = layer.kl_loss()
    with torch.no_grad():
        layer.weight.add_(1.0)
    second = layer.kl_loss()
    assert second > first
    expected = fb.functional.kl_normal(layer.weight, layer.weight_rho, (0.1, 0.5))
    expected = expected + fb.functional.kl_normal(layer.bias, layer.bias_rho, (0.1, 0.5))
    assert_close(second, expected, 1e-6, 0)
    assert len(layer.losses) == 1
    assert _conv(prior=None).losses == []
    assert _conv(prior=None).kl_loss().item() == 0.0


def test_a_one_element_prior_serves_weight_and_bias() -> None:
    scale = nn.Parameter(torch.full((1, 1, 1, 1), 0.5))
    layer = _conv(bayesian_bias=True, prior=(0.0, scale))
    expected = _conv(bayesian_bias=True, prior=(0.0, 0.5))
    expected.load_state_dict({k: v for k, v in layer.state_dict().items() if "prior" not in k})
    assert_close(layer.kl_loss(), expected.kl_loss(), 1e-6, 0)
    layer.kl_loss().backward()
    assert scale.grad.shape == scale.shape


def test_a_sampled_kl_uses_the_weights_of_the_last_call() -> None:
    layer = _conv(prior=fb.ScaleMixture(0.5, 1.0, 0.1), bayesian_bias=True)
    x = _image()
    layer(x, SEED)
    first = layer.kl_loss()
    assert_same(layer.kl_loss(), first)
    with fb.collect_kl(layer) as collected:
        layer(x, SEED)
    assert_close(collected.sum(), first, 1e-5, 0)
    layer(x)
    assert not torch.equal(layer.kl_loss(), first)


# --- living with PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [(0.0, 1.0), fb.ScaleMixture(0.5, 1.0, 0.1)])
def test_deepcopy_and_pickle_after_a_forward(prior) -> None:
    layer, x = _conv(prior=prior), _image()
    layer(x).sum().backward()
    with fb.collect_kl(layer):
        copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    for other in copies:
        assert other._fb_context is None
        assert other._last_draw is None
        assert_same(other(x, SEED), layer(x, SEED))


def test_compile_fullgraph_draws_the_same_noise() -> None:
    model = nn.Sequential(
        _conv(padding="same", activation="relu"), nn.Flatten(), fb.BayesLinear(6 * 72, 4)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = _image()
    torch.manual_seed(7)
    expected = model(x)
    torch.manual_seed(7)
    assert_close(compiled(x), expected, 1e-5, 1e-5)
    compiled(x).sum().backward()
    with fb.collect_kl(model) as kl:
        compiled(x)
    assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)


def test_functional_call_and_vmap_over_seeds() -> None:
    layer, x = _conv(), _image()
    parameters = dict(layer.named_parameters())
    seeds = torch.tensor([[1, 0], [2, 0], [3, 0]])

    def run(seed: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x, seed))

    batched = torch.func.vmap(run)(seeds)
    for row, seed in zip(batched, seeds, strict=True):
        assert_close(row, layer(x, seed), 1e-5, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_noise(use_reentrant: bool) -> None:
    layer, x = _conv(), _image().requires_grad_()
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        if wrapped:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        else:
            y = layer(x)
        y.square().sum().backward()
        gradients.append(layer.weight_rho.grad.clone())
    assert_close(gradients[1], gradients[0], 1e-6, 1e-6)
