"""``predict`` leaves a training step, other threads and copies of the model alone."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from prediction_models import assert_same_prediction, convolutional, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import fastbconv as fb
from fastbconv import models
from fastbconv.testing import assert_close, assert_same

MIXTURE = fb.ScaleMixture(0.5, 1.0, 0.1)


def _mixture() -> nn.Sequential:
    return nn.Sequential(
        fb.BayesConv2d(3, 4, 3, prior=MIXTURE), nn.Flatten(), fb.BayesLinear(144, 5)
    )


@pytest.mark.parametrize("make", [convolutional, _mixture])
def test_the_kl_of_a_training_step_is_left_alone(make) -> None:
    """Figures of validation inside the block of a step replaced its KL by one without gradient."""
    model, x = make(), images()
    with fb.collect_kl(model) as kl:
        model(x)
        terms = dict(kl.terms)
        fb.predict(model, x, 4)
    assert kl.terms.keys() == terms.keys()
    assert all(kl.terms[position] is term for position, term in terms.items())
    assert kl.sum().requires_grad


def test_a_monte_carlo_kl_is_that_of_the_last_training_step() -> None:
    model, x = _mixture(), images()
    model(x)
    expected = fb.kl_loss(model)
    fb.predict(model, x, 4)
    assert_same(fb.kl_loss(model), expected)
    with pytest.raises(RuntimeError, match="broken"):
        fb.predict(model, x, 4, likelihood=_broken)
    assert_same(fb.kl_loss(model), expected)


def _broken(output: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_losses_of_the_other_face_are_those_of_the_last_training_step() -> None:
    layer = fb.DenseReparameterization(
        3,
        kernel_divergence_fn=lambda posterior, prior, sample: sample.square().sum(),
        activity_regularizer=lambda output: output.sum(),
    )
    x = torch.randn(4, 2)
    layer(x)
    expected = layer.losses
    fb.predict(layer, torch.randn(5, 2), 4)
    for one, other in zip(layer.losses, expected, strict=True):
        assert_same(one, other)


def test_a_collector_inside_of_the_model_still_collects() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = fb.BayesLinear(4, 3)
            self.found: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            with fb.collect_kl(self.body) as kl:
                y = self.body(x)
            self.found.append(kl.sum())
            return y

    model = Reads()
    fb.predict(model, torch.randn(5, 4), 2, samples_per_pass=1)
    assert_close(model.found[-1], fb.kl_loss(model).detach(), 1e-6, 0)


def test_threads_wait_for_each_other() -> None:
    """They found each other's frames in the layers, and left training=False behind."""
    model, x = convolutional(), images(3)
    compiled = torch.compile(model, backend="eager")
    expected = fb.predict(model, x, 6)
    fb.predict(compiled, x, 6)
    problems: list[BaseException] = []

    def work(given: nn.Module) -> None:
        try:
            for _ in range(10):
                assert_same_prediction(fb.predict(given, x, 6), expected)
        except BaseException as error:
            problems.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=work, args=(m,)) for m in (model, model, model, compiled)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []
    assert all(module.training for module in model.modules())
    assert [layer._fb_context for layer in models.bayesian_layers(model)] == [None] * 3


def test_a_prediction_inside_of_a_prediction() -> None:
    """A thread does not wait for itself."""
    model, x = convolutional(), images(3)
    inner = []

    def likelihood(output: Tensor) -> Tensor:
        inner.append(fb.predict(model, x, 2))
        return output.softmax(1)

    got = fb.predict(model, x, 4, likelihood=likelihood)
    assert_close(got.mean, fb.predict(model, x, 4).mean, 1e-6, 1e-6)
    assert_same_prediction(inner[0], fb.predict(model, x, 2))


class _Stream(IterableDataset):
    def __iter__(self):
        yield from torch.ones(4, 4)


def test_a_stream_has_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its DataLoader has ``__len__``, which raises."""
    totals = []

    class Bar:
        def __init__(self, total: int | None, **options: object) -> None:
            totals.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    got = fb.predict(fb.BayesLinear(4, 3), DataLoader(_Stream(), batch_size=3), 2)
    assert got.mean.shape == (4, 3)
    assert totals == [None]
