"""Lazy layers: everything that torch.nn's can do before the first call, and nothing of it after."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same

# Arguments after the first, and the shape of an input.
CASES: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "BayesConv1d": ((6, 3), (2, 4, 9)),
    "BayesConv2d": ((6, 3), (2, 4, 7, 9)),
    "BayesConv3d": ((6, 3), (2, 4, 5, 6, 5)),
    "BayesConvTranspose2d": ((6, 3, 2, 1), (2, 4, 5, 4)),
    "BayesLinear": ((6,), (2, 4)),
}
CONVOLUTIONS = [name for name in CASES if "Conv" in name]
each_layer = pytest.mark.parametrize("name", CASES)
SEED = torch.tensor([3, 4])


def _lazy(name: str, **options: Any) -> nn.Module:
    return getattr(fb, f"Lazy{name}")(*CASES[name][0], **{"bayesian_bias": True, **options})


def _ordinary(name: str, **options: Any) -> nn.Module:
    return getattr(fb, name)(4, *CASES[name][0], **{"bayesian_bias": True, **options})


def _torchs(name: str) -> nn.Module:
    return getattr(nn, name.removeprefix("Bayes"))(4, *CASES[name][0])


def _input(name: str, **options: Any) -> torch.Tensor:
    return torch.randn(CASES[name][1], **options)


# --- the first call -------------------------------------------------------------------------------


@each_layer
def test_the_first_call_makes_an_ordinary_layer(name: str) -> None:
    x = _input(name)
    torch.manual_seed(1)
    want = _ordinary(name)
    layer = _lazy(name)
    assert isinstance(layer, LazyModuleMixin)
    assert all(map(is_lazy, layer.parameters()))
    assert repr(layer).startswith(f"Lazy{name}(")
    torch.manual_seed(1)
    got = layer(x, seed=SEED)
    assert_same(got, want(x, seed=SEED))
    assert type(layer) is getattr(fb, name)
    assert repr(layer) == repr(want)
    assert vars(layer).keys() == vars(want).keys()
    assert not layer._forward_pre_hooks
    assert not layer._load_state_dict_pre_hooks
    assert list(layer.state_dict()) == list(want.state_dict())
    for parameter in layer.parameters():
        assert type(parameter) is nn.Parameter


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_input_without_batch(name: str) -> None:
    layer = _lazy(name, groups=2)
    assert layer(_input(name)[0]).ndim == len(CASES[name][1]) - 1
    assert layer.in_channels == 4


@each_layer
def test_device_and_dtype_are_those_of_the_layer(name: str) -> None:
    layer = _lazy(name, dtype=torch.float64)
    assert layer(_input(name, dtype=torch.float64)).dtype == torch.float64
    moved = _lazy(name).to(torch.float64)
    assert moved(_input(name, dtype=torch.float64)).dtype == torch.float64
    meta = _lazy(name, device="meta")
    assert meta(_input(name, device="meta")).is_meta
    assert meta.weight.is_meta


@each_layer
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_before_the_first_call(name: str, backend: str) -> None:
    torch._dynamo.reset()
    layer, x = _lazy(name), _input(name)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    got = compiled(x, seed=SEED)
    assert type(layer) is getattr(fb, name)
    assert_close(got, layer(x, seed=SEED), 1e-5, 1e-6)


@each_layer
def test_optimisers_made_before(name: str) -> None:
    layer = _lazy(name)
    optimiser = torch.optim.Adam(fb.param_groups(layer, 0.1))
    layer(_input(name)).square().sum().backward()
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimiser.step()
    for parameter, value in zip(layer.parameters(), before, strict=True):
        assert not torch.equal(parameter, value)


@each_layer
def test_build(name: str) -> None:
    layer = _lazy(name)
    assert fb.build(layer, (None, *CASES[name][1][1:])) is layer
    assert type(layer) is getattr(fb, name)
    assert layer.weight.shape == _ordinary(name).weight.shape
    model = nn.Sequential(nn.LazyConv2d(3, 3), fb.LazyBayesConv2d(4, 3), fb.LazyBayesConv2d(2, 1))
    fb.build(model, (None, 5, 8, 8))
    assert [module.in_channels for module in model] == [5, 3, 4]


@each_layer
def test_contexts_around_the_first_call(name: str) -> None:
    x = _input(name)
    layer = _lazy(name)
    with fb.grouped(layer), fb.collect_kl(layer) as kl:
        layer(x)
    assert_close(kl.sum(), layer.kl_loss(), 1e-6, 0)
    layer = _lazy(name)
    with fb.fixed_sample(layer, 3):
        first = layer(x)
        assert_same(layer(x), first)
    layer = _lazy(name)
    with fb.mean_weights(layer):
        assert_same(layer(x), layer(x))
    assert layer._fb_context is None


# --- copies and states ----------------------------------------------------------------------------


@each_layer
def test_copies_of_an_uninitialised_layer(name: str) -> None:
    layer, x = _lazy(name), _input(name)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        clone(x)
        assert type(clone) is getattr(fb, name)
    assert all(map(is_lazy, layer.parameters()))  # nothing is shared


@each_layer
def test_a_state_into_an_uninitialised_layer(name: str) -> None:
    source, x = _ordinary(name), _input(name)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    layer = _lazy(name)
    layer.load_state_dict(torch.load(stream, weights_only=True))
    generator = torch.get_rng_state()
    assert_same(layer(x, seed=SEED), source(x, seed=SEED))
    assert_same(torch.get_rng_state(), generator)  # nothing was drawn
    assert type(layer) is getattr(fb, name)
    assert repr(layer) == repr(source)


@each_layer
def test_a_checkpoint_of_torch_into_an_uninitialised_layer(name: str) -> None:
    source, x = _torchs(name), _input(name)
    layer = _lazy(name)
    missing, unexpected = layer.load_state_dict(source.state_dict(), strict=False)
    assert (missing, unexpected) == (["weight_rho", "bias_rho"], [])
    with fb.mean_weights(layer):
        assert_close(layer(x), source(x), 1e-5, 1e-5)
    fresh = _ordinary(name)
    assert_same(layer.weight_rho.data, fresh.weight_rho.data)
    assert_same(layer.bias_rho.data, fresh.bias_rho.data)


@each_layer
def test_an_uninitialised_state_into_an_uninitialised_layer(name: str) -> None:
    layer = _lazy(name)
    layer.load_state_dict(_lazy(name).state_dict())
    layer(_input(name))
    assert type(layer) is getattr(fb, name)


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_input_that_does_not_fit_leaves_the_layer_lazy(name: str) -> None:
    layer, x = _lazy(name, groups=2), _input(name)
    for wrong, message in (
        (x[:, :3], "groups: expected a divisor of in_channels = 3, got 2"),
        (x[:, :0], "input: expected at least one channel"),
        (x[0, 0], "input: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(wrong)
        assert all(map(is_lazy, layer.parameters()))
    with pytest.raises(TypeError, match="input: expected a tensor, got list"):
        layer([1.0])
    layer(x)


@each_layer
def test_a_prior_meets_the_weight_at_the_first_call(name: str) -> None:
    shape = _ordinary(name).weight.shape
    layer = _lazy(
        name, bayesian_bias=False, prior=(torch.zeros(shape), nn.Parameter(torch.ones(1)))
    )
    layer(_input(name))
    assert layer.kl_loss().isfinite()
    wrong = _lazy(name, bayesian_bias=False, prior=(torch.zeros(7, *shape[1:]), 1.0))
    with pytest.raises(ValueError, match="prior loc: expected a shape that broadcasts to"):
        wrong(_input(name))


@each_layer
def test_loaded_weights_of_another_shape(name: str) -> None:
    layer = _lazy(name)
    layer.load_state_dict(_ordinary(name).state_dict())
    x = _input(name)
    more = torch.cat([x, x], 1)
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer(more)
    layer(x)


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="out_channels: expected a positive integer, got 0"):
        fb.LazyBayesConv2d(0, 3)
    with pytest.raises(ValueError, match="estimator: expected one of"):
        fb.LazyBayesLinear(3, estimator="mean")
    with pytest.raises(ValueError, match="in_channels: expected a positive integer, got 0"):
        fb.BayesConv3d(0, 3, 3)


@pytest.mark.parametrize("make", [fb.LazyBayesLinear, fb.DenseReparameterization])
def test_the_kl_before_the_first_call_is_an_error(make) -> None:
    model = nn.Sequential(fb.BayesLinear(3, 4), nn.Sequential(nn.ReLU(), make(2)))
    message = rf"expected initialised parameters, got '1.1' \({make.__name__}\).* fastbconv.build"
    with pytest.raises(ValueError, match=message):
        fb.kl_loss(model, 10)
    with pytest.raises(ValueError, match=r"kl_loss: expected .* before its first call; call "):
        model[1][1].kl_loss()
    fb.build(model, (None, 3))
    assert fb.kl_loss(model, 10).isfinite()
