"""``predict``: how batches are given to a model, and layers that a model does not call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prediction_models import convolutional, images, logits, wide
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same


class AddsInPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide(fb.BayesLinear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.add_(1.0))


@pytest.mark.parametrize(
    "make",
    [AddsInPlace, lambda: nn.Sequential(nn.SiLU(inplace=True), wide(fb.BayesLinear(4, 3)))],
)
@pytest.mark.parametrize("options", [{}, {"samples_per_pass": 1}, {"memory": 1}])
def test_a_model_may_change_its_input(make: Callable[[], nn.Module], options: dict) -> None:
    model, x = make(), torch.randn(5, 4)
    kept = x.clone()
    got = fb.predict(model, x, 4, likelihood=logits, keep_samples=True, **options)
    assert_same(x, kept)
    for sample in range(4):
        with torch.no_grad(), fb.fixed_sample(model, 0, sample=sample):
            assert_close(got.samples[sample], model(kept.clone()), 1e-5, 1e-6)


def test_the_memory_format_of_a_batch_is_kept() -> None:
    seen = []

    class Format(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    x = images(4).to(memory_format=torch.channels_last)
    fb.predict(nn.Sequential(Format(), convolutional()), x, 4, memory=2**14)
    assert seen
    assert all(seen)


class Two(nn.Module):
    """Two inputs, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide(fb.BayesLinear(4, 3))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.body(x) * scale


class Items(Dataset):
    """Dictionaries, as a DataLoader collates them."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.x, self.scale = x, scale

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "scale": self.scale[index], "name": str(index)}


def test_forward_says_how_a_batch_is_given() -> None:
    model, x, scale = Two(), torch.randn(7, 4), torch.rand(7, 1)
    with torch.no_grad():
        expected = []
        for sample in range(4):
            with fb.fixed_sample(model, 0, sample=sample):
                expected.append(model(x, scale))
    forms = {
        "dicts": (
            DataLoader(Items(x, scale), batch_size=3),
            lambda m, b: m(b["x"], scale=b["scale"]),
        ),
        "tuples": (zip(x.split(3), scale.split(3), strict=True), lambda m, b: m(*b)),
        "tensor": (torch.cat([x, scale], 1), lambda m, b: m(b[:, :4], b[:, 4:])),
    }
    for batches, forward in forms.values():
        for options in ({"samples_per_pass": 4}, {"memory": 64}):
            if not isinstance(batches, zip) or "memory" not in options:
                got = fb.predict(
                    model,
                    batches,
                    4,
                    likelihood=logits,
                    forward=forward,
                    keep_samples=True,
                    **options,
                )
                assert_close(got.samples, torch.stack(expected), 1e-5, 1e-6)


def test_forward_of_numbers_beside_tensors() -> None:
    """Rows are those of the first tensor with dimensions; what has none is given as it is."""
    model = Two()
    batch = {"scale": torch.tensor(2.0), "x": torch.randn(3, 4), "kind": "train"}
    got = fb.predict(
        model, [batch], 4, likelihood=logits, forward=lambda m, b: m(b["x"], b["scale"])
    )
    assert got.mean.shape == (3, 3)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([{"x": torch.ones(2, 4)}], {}, "got dict in it; .* forward=lambda model, batch"),
        ({"x": torch.ones(2, 4)}, {}, r"got dict; one batch of another form is forward=..., \[x\]"),
        ([{"x": 1}], {"forward": lambda m, b: m(b["x"])}, "hold tensors, got dict without any"),
        (torch.ones(2, 4), {"forward": "x"}, "forward: expected a function .* got str"),
    ],
)
def test_batches_that_are_no_tensors(x: Any, options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fb.predict(fb.BayesLinear(4, 3), x, 2, **options)


# --- layers without a part ------------------------------------------------------------------------


class Cosine(nn.Module):
    """Reads the weight of a layer, which is its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = wide(fb.BayesLinear(4, 4)), wide(fb.BayesLinear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.body(x)), F.normalize(self.head.weight))


def _attention() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.MultiheadAttention(4, 2, batch_first=True)
            self.body.out_proj = wide(fb.BayesLinear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x, x, x)[0].flatten(1)

    return Attention()


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    layer.linear1 = wide(fb.BayesLinear(4, 8))
    return nn.Sequential(layer, nn.Flatten())


@pytest.mark.parametrize(
    ("make", "name"), [(Cosine, "head"), (_attention, "body.out_proj"), (_encoder, "0.linear1")]
)
def test_layers_that_are_not_called_are_named(make: Callable[[], nn.Module], name: str) -> None:
    """Their variance is 0, which looks like a network that is sure."""
    model = make()
    x = torch.randn(5, 4) if make is Cosine else torch.randn(5, 3, 4)
    with pytest.warns(UserWarning, match=rf"layers were not called, .*: {name};") as found:
        got = fb.predict(model, x, 4)
    assert len(found) == 1
    assert found[0].filename == __file__
    assert bool((got.variance > 0).any()) == (make is Cosine)


@pytest.mark.parametrize("options", [{}, {"samples_per_pass": 1}, {"memory": 1}])
def test_layers_that_are_called_are_not_named(options: dict) -> None:
    layers = (fb.Convolution2DReparameterization(4, 3), fb.ChannelsLast(nn.AvgPool2d(2)))
    tfp = nn.Sequential(*layers, nn.Flatten(), fb.DenseFlipout(3))
    for model in (convolutional(), tfp, nn.Sequential(nn.Flatten(), nn.Linear(192, 3))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fb.predict(
                model, images().mT if model is not tfp else torch.randn(4, 8, 8, 2), 4, **options
            )
            with fb.grouped(model):
                fb.predict(
                    model, images() if model is not tfp else torch.randn(4, 8, 8, 2), 4, **options
                )


def test_compiled_layers_are_not_named() -> None:
    whole = torch.compile(convolutional(), backend="eager")
    part = convolutional()
    part[3] = torch.compile(part[3], backend="eager")
    inside = convolutional()
    inside[3].compile(backend="eager")
    itself = convolutional()
    itself.compile(backend="eager", fullgraph=True)
    for model in (whole, part, inside, itself):
        assert fb.predict(model, images(2), 2).mean.shape == (2, 5)
