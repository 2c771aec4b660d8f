"""The torch face against torch.nn: cases are generated from the signatures of its classes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same

ORDINARY = {
    "BayesConv1d": nn.Conv1d,
    "BayesConv2d": nn.Conv2d,
    "BayesConv3d": nn.Conv3d,
    "BayesConvTranspose2d": nn.ConvTranspose2d,
    "BayesLinear": nn.Linear,
}
LAZY = {
    "LazyBayesConv1d": nn.LazyConv1d,
    "LazyBayesConv2d": nn.LazyConv2d,
    "LazyBayesConv3d": nn.LazyConv3d,
    "LazyBayesConvTranspose2d": nn.LazyConvTranspose2d,
    "LazyBayesLinear": nn.LazyLinear,
}
BAYESIAN = ["activation", "prior", "bayesian_bias", "estimator", "eval_mode"]
CONVOLUTIONS = [name for name in ORDINARY if "Conv" in name]
each_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def _rank(name: str) -> int:
    return int(name[-2])


def _image(name: str) -> torch.Tensor:
    return torch.randn(2, 4, *(6, 7, 5)[: _rank(name)], dtype=torch.float64)


# Values of every parameter of every class; a list holds those of three axes.
VALUES: dict[str, list[Any]] = {
    "in_channels": [4],
    "out_channels": [6],
    "kernel_size": [3, [1, 3, 1]],
    "stride": [1, [2, 1, 3]],
    "padding": [1, [2, 0, 1], "same", "valid"],
    "dilation": [1, [2, 1, 2]],
    "output_padding": [0, [1, 0, 0]],
    "groups": [1, 2],
    "bias": [True, False],
    "padding_mode": ["zeros", "reflect", "replicate", "circular"],
    "device": ["cpu"],
    "dtype": [torch.float64],
}


def _values(name: str, parameter: str) -> list[Any]:
    """The values of a parameter, lists cut to a tuple of the layer's axes."""
    rank = _rank(name)
    values = [tuple(v[:rank]) if isinstance(v, list) else v for v in VALUES[parameter]]
    if "Transpose" in name and parameter in ("padding", "padding_mode"):
        return [value for value in values if not isinstance(value, str) or value == "zeros"]
    return values


def _accepted(name: str, given: dict[str, Any]) -> bool:
    """What torch.nn accepts, at these extents."""
    strides, dilations, added = (
        given.get(key, 0) if isinstance(given.get(key, 0), tuple) else (given.get(key, 0),) * 3
        for key in ("stride", "dilation", "output_padding")
    )
    if given["padding"] == "same" and max(strides) > 1:
        return False
    axes = zip(strides, dilations, added, strict=False)
    return all(more == 0 or more < max(stride, dilation) for stride, dilation, more in axes)


def _grid(name: str) -> Iterator[tuple[Any, ...]]:
    """Positional arguments of the torch.nn class: every combination that it accepts."""
    names = list(inspect.signature(ORDINARY[name]).parameters)
    for values in itertools.product(*(_values(name, parameter) for parameter in names)):
        if _accepted(name, dict(zip(names, values, strict=True))):
            yield values


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ORDINARY, *LAZY])
def test_parameters_are_torchs_and_then_ours_by_keyword(name: str) -> None:
    own = list(inspect.signature(getattr(fb, name)).parameters.values())
    theirs = list(inspect.signature({**ORDINARY, **LAZY}[name]).parameters.values())
    mine, rest = own[: len(theirs)], own[len(theirs) :]
    assert [(p.name, p.default, p.kind) for p in mine] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert [p.name for p in rest] == BAYESIAN
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)


@pytest.mark.parametrize("name", ORDINARY)
def test_forward_begins_as_torchs(name: str) -> None:
    own = list(inspect.signature(getattr(fb, name).forward).parameters)
    theirs = list(inspect.signature(ORDINARY[name].forward).parameters)
    assert own[: len(theirs)] == theirs
    assert own[len(theirs) :] == ["seed", "num_samples", "share_input", "generator"]


# --- every argument -------------------------------------------------------------------------------


@each_convolution
def test_with_its_means_a_convolution_is_torchs(name: str) -> None:
    """Over the whole grid: attributes, parameters, checkpoint, output with and without a batch."""
    torch.set_num_threads(1)  # many tiny calls
    x, count = _image(name), 0
    for values in _grid(name):
        theirs, ours = ORDINARY[name](*values), getattr(fb, name)(*values)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), values
        for attribute in ("dilation", "output_padding", "groups", "padding_mode", "transposed"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), values
        missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert (missing, unexpected) == (["weight_rho"], [])
        with fb.mean_weights(ours), torch.no_grad():
            assert_close(ours(x), theirs(x), 1e-9, 1e-9, str(values))
            assert_close(ours(x[0]), theirs(x[0]), 1e-9, 1e-9, str(values))
        count += 1
    assert count >= (48 if "Transpose" in name else 300)


@pytest.mark.parametrize("bias", [True, False])
def test_with_its_means_a_linear_layer_is_torchs(bias: bool) -> None:
    arguments = (5, 4, bias, "cpu", torch.float64)
    theirs, ours = nn.Linear(*arguments), fb.BayesLinear(*arguments)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for shape in ((5,), (3, 5), (2, 3, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        with fb.mean_weights(ours):
            assert_close(ours(x), theirs(x), 1e-12, 1e-12)


@pytest.mark.parametrize("name", ORDINARY)
def test_first_values_are_torchs(name: str) -> None:
    """loc is drawn as torch.nn draws it, scale is 0.1 / sqrt(fan_in) of that class."""
    arguments = (4, 6) if name == "BayesLinear" else (4, 6, 3)
    torch.manual_seed(1)
    ours = getattr(fb, name)(*arguments)
    torch.manual_seed(1)
    theirs = ORDINARY[name](*arguments)
    assert_same(ours.weight.data, theirs.weight.data)
    assert_same(ours.bias.data, theirs.bias.data)
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(theirs.weight)
    assert_close(ours.weight_scale, torch.full_like(ours.weight, 0.1 / fan_in**0.5), 1e-5, 0)


@pytest.mark.parametrize("name", ORDINARY)
def test_device_and_dtype(name: str) -> None:
    arguments = (4, 6) if name == "BayesLinear" else (4, 6, 3)
    layer = getattr(fb, name)(
        *arguments, device="meta", dtype=torch.float64, bayesian_bias=True, prior=(0.0, 0.5)
    )
    for parameter in layer.parameters():
        assert parameter.is_meta
        assert parameter.dtype == torch.float64
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(2, 4, dtype=torch.float64) if name == "BayesLinear" else _image(name)
    assert layer(x).isfinite().all()


# --- what only one of them has --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(11, 13), (12, 14), (12, 13), (2, 6, 12, 13), None])
def test_output_size_is_torchs(size: tuple[int, ...] | None) -> None:
    arguments = (4, 6, 3, 2, 1)
    theirs, ours = nn.ConvTranspose2d(*arguments), fb.BayesConvTranspose2d(*arguments)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 4, 6, 7)
    with fb.mean_weights(ours):
        assert_close(ours(x, size), theirs(x, size), 1e-5, 1e-5)
        if size is None or len(size) == 2:
            assert_close(ours(x[0], size), theirs(x[0], size), 1e-5, 1e-5)
        assert_close(ours(x, output_size=size), theirs(x, output_size=size), 1e-5, 1e-5)


@pytest.mark.parametrize("size", [(10, 13), (13, 13), (11, 15), (12,), (6, 12, 13)])
def test_an_output_size_that_does_not_fit(size: tuple[int, ...]) -> None:
    arguments = (4, 6, 3, 2, 1)
    x = torch.randn(2, 4, 6, 7)
    with pytest.raises(ValueError, match=r"output.size"):
        nn.ConvTranspose2d(*arguments)(x, size)
    with pytest.raises(ValueError, match=r"output_size: expected .*, got"):
        fb.BayesConvTranspose2d(*arguments)(x, size)


@pytest.mark.parametrize("name", CONVOLUTIONS[:3])
def test_padding_that_torch_has_not(name: str) -> None:
    """'same' with a stride, and unequal sides."""
    rank, x = _rank(name), _image(name)
    layer = getattr(fb, name)(4, 6, 2, 2, "same", dtype=torch.float64)
    assert layer(x).shape[2:] == tuple((size + 1) // 2 for size in x.shape[2:])
    sides = ((1, 0), (2, 1), (0, 2))[:rank]
    layer = getattr(fb, name)(4, 6, 2, padding=sides, dtype=torch.float64)
    assert layer.padding == sides
    assert f"padding={sides!r}" in repr(layer)
    flat = [zeros for side in reversed(sides) for zeros in side]
    bare = getattr(fb, name)(4, 6, 2, dtype=torch.float64)
    bare.load_state_dict(layer.state_dict())
    assert_close(layer(x, 3), bare(nn.functional.pad(x, flat), 3), 1e-9, 1e-9)
    padded = getattr(fb, name)(4, 6, 2, padding=sides, padding_mode="replicate", dtype=x.dtype)
    padded.load_state_dict(layer.state_dict())
    image = nn.functional.pad(x, flat, mode="replicate")
    assert_close(padded(x, 3), bare(image, 3), 1e-9, 1e-9)


@each_convolution
def test_repr_is_torchs(name: str) -> None:
    for values in _grid(name):
        theirs, ours = repr(ORDINARY[name](*values)), repr(getattr(fb, name)(*values))
        ours = ours.removeprefix("Bayes").replace("'", "")  # torch quotes no names
        assert ours == theirs.replace(", padding=valid", "")


KINDS = {
    nn.Conv1d: (fb.BayesConv1d, fb.LazyBayesConv1d),
    nn.Conv2d: (fb.BayesConv2d, fb.LazyBayesConv2d),
    nn.Conv3d: (fb.BayesConv3d, fb.LazyBayesConv3d),
    nn.ConvTranspose2d: (fb.BayesConvTranspose2d, fb.LazyBayesConvTranspose2d),
    nn.Linear: (fb.BayesLinear, fb.LazyBayesLinear),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layer_is_one_of_the_class_it_stands_for(kind: type[nn.Module]) -> None:
    """What asks isinstance, as the usual functions for ``model.apply`` do, finds the layer."""
    ordinary, lazy = KINDS[kind]
    layer = ordinary(2, 3) if kind is nn.Linear else ordinary(2, 3, 1)
    filled = []

    def fill(module: nn.Module) -> None:
        if isinstance(module, kind):
            filled.append(module)
            nn.init.constant_(module.weight, 2.0)

    nn.Sequential(layer, nn.ReLU()).apply(fill)
    assert filled == [layer]
    assert (layer.weight == 2.0).all()
    assert issubclass(lazy, kind)
    # What the layer does comes before what torch.nn's class has.
    for name in ("__init__", "forward", "extra_repr", "reset_parameters", "__getstate__"):
        assert getattr(ordinary, name) is not getattr(kind, name)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_an_image_that_the_filter_does_not_fit_into(rank: int, stride: int, padding_mode) -> None:
    """One size less gave an output without pixels, whose mean is NaN; nn.Conv raises."""
    arguments = {"stride": stride, "padding_mode": padding_mode}
    ours = getattr(fb, f"BayesConv{rank}d")(3, 4, 4, **arguments)
    plain = getattr(torch.nn, f"Conv{rank}d")(3, 4, 4, **arguments)
    x = torch.randn(2, 3, *[8] * (rank - 1), 3)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        plain(x)
    for input in (x, x[0]):
        with pytest.raises(ValueError, match=r"input: expected a padded size of at least 4 for a"):
            ours(input)
    fits = torch.nn.functional.pad(x, (0, 1))
    assert ours(fits).shape == plain(fits).shape
