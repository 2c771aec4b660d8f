"""convert, one test for each way in which other conversions lose something."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from networks import ResNet18, small
from torch import nn

import fastbconv as fb
from fastbconv._surgery import PAIRS
from fastbconv.testing import assert_close, assert_same

# Kind -> (arguments that all differ from their defaults and from one another, input shape).
LAYERS = {
    nn.Conv1d: (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3,),
            "stride": (2,),
            "padding": (5,),
            "dilation": (7,),
            "groups": 2,
            "bias": False,
            "padding_mode": "reflect",
        },
        (2, 4, 21),
    ),
    nn.Conv2d: (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (2, 3),
            "padding": (4, 1),
            "dilation": (1, 5),
            "groups": 2,
            "bias": False,
            "padding_mode": "circular",
        },
        (2, 4, 11, 13),
    ),
    nn.Conv3d: (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2, 1),
            "stride": (2, 1, 3),
            "padding": (1, 3, 2),
            "dilation": (1, 2, 3),
            "groups": 2,
            "bias": False,
            "padding_mode": "replicate",
        },
        (2, 4, 5, 6, 7),
    ),
    nn.ConvTranspose2d: (
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (2, 3),
            "padding": (1, 0),
            "output_padding": (0, 1),
            "groups": 2,
            "bias": False,
            "dilation": (1, 4),
        },
        (2, 4, 5, 6),
    ),
    nn.Linear: ({"in_features": 7, "out_features": 5, "bias": False}, (2, 3, 7)),
}


# What an argument needs beside it to have an effect, or to be valid.
PARTNER = {"padding_mode": "padding", "output_padding": "stride"}


def kinds_and_arguments() -> list[tuple[type[nn.Module], str]]:
    """Every argument of every kind that is converted, from the kind's own signature."""
    only = {(nn.ConvTranspose2d, "padding_mode")}  # has one value
    return [
        (kind, name)
        for kind in PAIRS
        for name in inspect.signature(kind).parameters
        if name not in ("device", "dtype") and (kind, name) not in only
    ]


def assert_converts(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The converted layer's mean is the layer, and the way back is bit for bit."""
    converted, x = fb.convert(layer), torch.randn(shape, dtype=layer.weight.dtype)
    assert type(converted) is PAIRS[type(layer)]
    with fb.mean_weights(converted):
        bound = 1e-12 if x.dtype == torch.float64 else 1e-5
        assert_close(converted(x), layer(x), bound, bound)
    back = fb.to_deterministic(converted)
    assert type(back) is type(layer)
    assert_same(back(x), layer(x))
    return converted


@pytest.mark.parametrize("kind", PAIRS)
def test_argument_order(kind: type[nn.Module]) -> None:
    arguments, shape = LAYERS[kind]
    converted = assert_converts(kind(**arguments), shape)
    for name, value in arguments.items():
        got = converted.bias is not None if name == "bias" else getattr(converted, name)
        assert got == value, name


@pytest.mark.parametrize(("kind", "name"), kinds_and_arguments())
def test_no_argument_is_dropped(kind: type[nn.Module], name: str) -> None:
    """One argument at a time, all others at their defaults."""
    arguments, shape = LAYERS[kind]
    required = [
        n for n, p in inspect.signature(kind).parameters.items() if p.default is inspect._empty
    ]
    chosen = {n: arguments[n] for n in {*required, name, PARTNER.get(name, name)}}
    assert_converts(kind(**chosen), shape)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same", "valid"])
def test_padding_mode_is_dropped_silently(padding, mode: str) -> None:
    layer = nn.Conv2d(3, 4, (3, 4), padding=padding, dilation=(1, 2), padding_mode=mode)
    assert_converts(layer, (2, 3, 9, 10))


@pytest.mark.parametrize("kind", PAIRS)
def test_a_bias_is_lost_or_added(kind: type[nn.Module]) -> None:
    arguments, shape = LAYERS[kind]
    for bias in (True, False):
        layer = kind(**{**arguments, "bias": bias})
        converted = assert_converts(layer, shape)
        assert (converted.bias is not None) == bias
        assert set(converted.state_dict()) == {*layer.state_dict(), "weight_rho"}
        both = fb.convert(layer, bayesian_bias=True)
        assert (both.bias_rho is not None) == bias


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dilation_and_groups_are_lost(groups: int) -> None:
    assert_converts(nn.Conv2d(4, 8, 3, dilation=(2, 1), groups=groups), (2, 4, 9, 8))


def test_dtype_is_lost() -> None:
    for kind in PAIRS:
        arguments, shape = LAYERS[kind]
        converted = assert_converts(kind(**arguments, dtype=torch.float64), shape)
        assert {p.dtype for p in converted.parameters()} == {torch.float64}
        assert converted(torch.randn(shape, dtype=torch.float64)).dtype == torch.float64


def test_device_is_lost() -> None:
    for kind in PAIRS:
        converted = fb.convert(kind(**LAYERS[kind][0], device="meta"))
        assert {p.device.type for p in converted.parameters()} == {"meta"}


def test_a_subclass_raises_because_its_name_is_unknown() -> None:
    class Named(nn.Conv2d):
        pass

    model = nn.Sequential(Named(3, 3, 1), nn.Conv2d(3, 3, 1))
    with pytest.warns(UserWarning, match=r"'0' \(Named\)"):
        converted = fb.convert(model)
    assert [type(m) for m in converted] == [Named, fb.BayesConv2d]


def test_the_model_given_is_changed() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    converted = fb.convert(model, init="moped")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert type(model[0]) is nn.Conv2d
    for name, value in model.state_dict().items():
        assert_same(value, before[name], name)


def test_moped_leaves_the_prior_at_zero() -> None:
    model = small()
    converted = fb.convert(model, init="moped")
    assert_same(converted[0].prior.loc, model[0].weight.detach())
    zero = fb.functional.kl_normal(converted[0].weight, converted[0].weight_rho, (0.0, 1.0))
    assert converted[0].kl_loss() < zero


def test_batch_norm_is_converted_or_loses_its_statistics() -> None:
    model = small()
    model(torch.randn(4, 3, 6, 6) + 3.0)
    converted = fb.convert(model)
    assert type(converted[1]) is nn.BatchNorm2d
    for name, value in model[1].state_dict().items():
        assert_same(converted[1].state_dict()[name], value, name)


def test_the_prior_is_lost_after_a_reload() -> None:
    model = fb.convert(small(), init="moped", prior=(0.0, torch.tensor(0.3)))
    other = fb.convert(small(), init="moped", prior=(0.0, torch.tensor(1.0)))
    other.load_state_dict(model.state_dict())
    for index in (0, 4):
        assert_same(other[index].prior.loc, model[index].prior.loc)
        assert_same(other[index].prior.scale, torch.tensor(0.3))
    assert_same(fb.kl_loss(other), fb.kl_loss(model))


def test_the_kl_is_that_of_the_last_block_only() -> None:
    model = fb.convert(ResNet18(4))
    layers = [m for m in model.modules() if getattr(m, "is_bayesian", False)]
    assert len(layers) == 21
    expected = torch.stack([fb.functional.kl_normal(m.weight, m.weight_rho) for m in layers])
    assert_close(fb.kl_loss(model), expected.sum(), 1e-6, 0)
    with fb.collect_kl(model) as kl:
        model(torch.randn(2, 3, 32, 32))
    assert_close(kl.sum(), expected.sum(), 1e-6, 0)


def test_the_kl_is_a_mean_and_does_not_grow_with_the_model() -> None:
    moments = {"weight": (torch.zeros(8, 4), torch.full((8, 4), 0.1))}
    one = fb.convert(nn.Linear(4, 8), init=moments)
    moments = {"weight": (torch.zeros(16, 4), torch.full((16, 4), 0.1))}
    two = fb.convert(nn.Linear(4, 16), init=moments)
    assert_close(fb.kl_loss(two), 2 * fb.kl_loss(one), 1e-6, 0)


def test_parameters_are_doubled_and_come_apart_after_to() -> None:
    model = fb.convert(small()).to(torch.float64)
    assert len(list(model.parameters())) == len(list(small().parameters())) + 2
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    with fb.mean_weights(model.eval()):
        assert_close(model(x), fb.to_deterministic(model)(x), 1e-10, 1e-10)  # the trained means


def test_buffers_and_extra_keys_appear() -> None:
    model = small()
    converted = fb.convert(model)
    assert [n for n, _ in converted.named_buffers()] == [n for n, _ in model.named_buffers()]
    extra = set(converted.state_dict()) - set(model.state_dict())
    assert extra == {"0.weight_rho", "4.weight_rho"}


def test_deepcopy_after_a_forward_raises() -> None:
    model, x = fb.convert(small()), torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    assert_same(other[0](x, seed=3), model[0](x, seed=3))


def test_export_raises() -> None:
    model = fb.convert(small()).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 6, 6),))
    assert program.module()(torch.randn(2, 3, 6, 6)).shape == (2, 5)


def test_a_checkpoint_of_the_deterministic_model_does_not_load() -> None:
    model = small()
    converted = fb.convert(small())
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["0.weight_rho", "4.weight_rho"], [])
    layer = fb.BayesConv2d(3, 4, 3)
    missing, unexpected = layer.load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), strict=False)
    assert (missing, unexpected) == (["weight_rho"], [])
    x = torch.randn(2, 3, 6, 6)
    with fb.mean_weights(converted.eval()):
        assert_close(converted(x), model.eval()(x), 1e-5, 1e-5)
