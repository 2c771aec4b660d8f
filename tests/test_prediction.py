"""``predict``: the right average, the same functions however the work is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from prediction_models import (
    FIELDS,
    assert_same_prediction,
    convolutional,
    images,
    segmentation,
    separately,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastbconv as fb
from fastbconv import models
from fastbconv.testing import assert_close, assert_same

# --- the average ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["direct", "library"])
def test_sample_s_is_the_function_of_fixed_sample(algorithm: str) -> None:
    model, x = convolutional().eval(), images()
    with fb.algorithm(algorithm):
        got = fb.predict(model, x, 32, seed=3, keep_samples=True)
        expected = separately(model, x, 32, seed=3).double().softmax(2)
    if algorithm == "direct":
        assert_same(got.samples, expected)
    assert_close(got.samples, expected, 1e-6, 1e-6)
    assert_close(got.mean, expected.mean(0), 1e-6, 1e-6)


def test_figures_are_those_of_the_definition() -> None:
    model, x = convolutional(), images()
    got = fb.predict(model, x, 32, keep_samples=True)
    p = got.samples
    assert_close(got.mean, p.mean(0), 1e-12, 0)
    assert_close(got.variance, p.var(0, correction=0), 1e-9, 1e-15)
    entropy = -(p.mean(0) * p.mean(0).log()).sum(1)
    expected = -(p * p.log()).sum(2).mean(0)
    assert_close(got.entropy, entropy, 1e-12, 0)
    assert_close(got.expected_entropy, expected, 1e-12, 0)
    assert_close(got.mutual_information, entropy - expected, 1e-9, 1e-12)
    assert bool((got.mutual_information > 0).all())
    assert bool((got.entropy <= math.log(5)).all())
    assert got.aleatoric_variance is None
    assert fb.predict(model, x, 2).samples is None


def test_probabilities_are_averaged_and_never_logits() -> None:
    """The softmax of mean logits is overconfident: two functions that are sure of opposite classes
    make a coin."""
    layer = fb.BayesLinear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight_rho.fill_(50.0)
    got = fb.predict(layer, torch.ones(1, 1), 64)
    logits = separately(layer, torch.ones(1, 1), 64).double()
    assert_close(got.mean, logits.softmax(2).mean(0), 1e-12, 0)
    assert got.entropy.item() > 0.5
    averaged = torch.special.entr(logits.mean(0).softmax(1)).sum()
    assert averaged.item() < 0.5 * got.entropy.item()


def test_segmentation_gives_maps() -> None:
    model, x = segmentation(), images(2)
    got = fb.predict(model, x, 4, keep_samples=True)
    assert got.mean.shape == got.variance.shape == (2, 4, 8, 8)
    assert got.entropy.shape == got.mutual_information.shape == (2, 8, 8)
    assert_close(got.mean.sum(1), torch.ones(2, 8, 8).double(), 1e-12, 0)
    pixel = torch.special.entr(got.mean[1, :, 2, 3]).sum()
    assert_close(got.entropy[1, 2, 3], pixel, 1e-12, 0)


def test_bernoulli() -> None:
    model, x = convolutional(1), images()
    got = fb.predict(model, x, 16, likelihood="bernoulli", keep_samples=True)
    expected = separately(model.eval(), x, 16).double().sigmoid()
    assert_close(got.mean, expected.mean(0), 1e-6, 1e-6)
    two = fb.predict(
        nn.Sequential(model, _WithZero()), x, 16, likelihood="categorical", keep_samples=True
    )
    assert_close(got.entropy[:, 0], two.entropy, 1e-9, 1e-12)
    assert_close(got.mutual_information[:, 0], two.mutual_information, 1e-9, 1e-12)


class _WithZero(nn.Module):
    """A logit as the pair of logits of the same distribution."""

    def forward(self, logit: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(logit), logit], 1)


class _Pair(nn.Module):
    """Mean and variance of a normal target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutional(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.body(x).unbind(1)
        return mean, log_variance.exp()


def test_gaussian_variances_add_up() -> None:
    model, x = _Pair(), images()
    got = fb.predict(model, x, 8, likelihood="gaussian", samples_per_pass=3)
    outputs = separately(model.body.eval(), x, 8).double()
    means, variances = outputs[..., 0], outputs[..., 1].exp()
    assert_close(got.mean, means.mean(0), 1e-5, 1e-6)
    assert_close(got.aleatoric_variance, variances.mean(0), 1e-5, 1e-6)
    assert_close(got.epistemic_variance, means.var(0, correction=0), 1e-5, 1e-6)
    assert_same(got.variance, got.aleatoric_variance + got.epistemic_variance)
    assert got.entropy is None
    assert got.mutual_information is None


def test_a_function_as_likelihood() -> None:
    model, x = convolutional(), images()
    seen = []

    def top(output: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output.argmax(1)

    got = fb.predict(model, x, 6, likelihood=top, samples_per_pass=4)
    votes = separately(model.eval(), x, 6).argmax(2).double()
    assert seen == [(7, 5)] * 6  # one function at a time, whatever shares a pass
    assert_close(got.mean, votes.mean(0), 1e-12, 0)
    assert_close(got.variance, votes.var(0, correction=0), 1e-12, 1e-15)
    assert got.entropy is None


def test_variance_of_close_samples_does_not_cancel() -> None:
    """E[p^2] - E[p]^2 has no digits left where the functions nearly agree."""
    values = iter(1.0 + 1e-9 * s for s in range(4))
    got = fb.predict(
        fb.BayesLinear(1, 1), torch.ones(1, 1), 4, likelihood=lambda _: torch.tensor([next(values)])
    )
    assert got.variance.item() == 0.0  # float32 values: all one
    values = iter(torch.tensor([1.0 + 1e-9 * s], dtype=torch.float64) for s in range(4))
    got = fb.predict(fb.BayesLinear(1, 1), torch.ones(1, 1), 4, likelihood=lambda _: next(values))
    assert got.variance.item() == pytest.approx(1.25e-18, rel=1e-5)


# --- inputs ---------------------------------------------------------------------------------------


def test_batches_are_joined() -> None:
    model, x = convolutional(), images()
    labels = torch.arange(7)
    with fb.algorithm("direct"):
        whole = fb.predict(model, x, 4, keep_samples=True)
        loader = DataLoader(TensorDataset(x, labels), batch_size=3)
        assert_same_prediction(fb.predict(model, loader, 4, keep_samples=True), whole)
        assert_same_prediction(fb.predict(model, list(x.split(2)), 4, keep_samples=True), whole)
        generator = ((part, None) for part in x.split(5))
        assert_same_prediction(fb.predict(model, generator, 4, keep_samples=True), whole)


def test_integers_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), fb.BayesLinear(4, 3), nn.Flatten())
    assert fb.predict(model, torch.arange(6).reshape(3, 2), np.int64(4)).mean.shape == (3, 6)


def test_no_rows() -> None:
    got = fb.predict(convolutional(), images(0), 4)
    assert got.mean.shape == (0, 5)
    assert got.entropy.shape == (0,)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([], {}, ValueError, "x: expected at least one batch, got none"),
        ("images", {}, TypeError, "x: expected a tensor, or an iterable .* got str"),
        (3, {}, TypeError, "x: expected a tensor, or an iterable .* got int"),
        ([{"image": 1}], {}, TypeError, "got dict in it"),
        (torch.tensor(1.0), {}, ValueError, "x: expected rows"),
        ([torch.ones(2, 4)], {"batch_size": 2}, ValueError, "batch_size: expected None"),
        (torch.ones(2, 4), {"batch_size": 0}, ValueError, "batch_size: expected"),
        (torch.ones(2, 4), {"num_samples": 0}, ValueError, "num_samples: expected"),
        (torch.ones(2, 4), {"samples_per_pass": -1}, ValueError, "samples_per_pass: expected"),
        (torch.ones(2, 4), {"memory": 0}, ValueError, "memory: expected"),
        (torch.ones(2, 4), {"likelihood": "normal"}, ValueError, "likelihood: expected"),
        (torch.ones(2, 4), {"seed": 1.5}, TypeError, "seed: expected an int"),
    ],
)
def test_what_does_not_fit(x, options: dict, error: type[Exception], message: str) -> None:
    model = fb.BayesLinear(4, 3)
    with pytest.raises(error, match=message):
        fb.predict(model, x, **options)
    assert model.training


def test_a_model_that_mixes_rows_is_told_so() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True)

    model = nn.Sequential(fb.BayesLinear(4, 3), Sum())
    with pytest.raises(ValueError, match=r"got .* of shape \(1, 3\) instead of 4 rows.*or None"):
        fb.predict(model, torch.ones(2, 4), 2, samples_per_pass=2)
    assert fb.predict(model, torch.ones(2, 4), 2).mean.shape == (1, 3)  # a pass for each


# --- the model is left as it was ------------------------------------------------------------------


def _flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_training_flag_is_put_back() -> None:
    """A model left in eval() trains on without dropout; one left in train() predicts with it."""
    model, x = convolutional(), images()
    model[1].eval()  # frozen statistics in a model that trains
    before = _flags(model)
    inside = []
    model.register_forward_hook(lambda *_: inside.append(any(_flags(model))))
    fb.predict(model, x, 3)
    assert _flags(model) == before
    with pytest.raises(RuntimeError, match="broken"):
        fb.predict(model, x, 3, likelihood=_broken)
    assert _flags(model) == before
    assert not any(inside)
    assert [layer._fb_context for layer in models.bayesian_layers(model)] == [None] * 3
    assert not any(module._forward_pre_hooks for module in model.modules())


def _broken(output: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_batch_norm_is_not_updated() -> None:
    """Predicting in train() moves the running statistics."""
    model = convolutional()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fb.predict(model, images(), 8)
    for name, value in model.state_dict().items():
        assert_same(value, before[name], name)


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), fb.BayesLinear(4, 3))
    x = torch.ones(2, 4)
    assert_same_prediction(fb.predict(model, x, 4), fb.predict(model[1], x, 4))


def test_eval_mode_mean_does_not_take_the_noise_away() -> None:
    layer = fb.BayesLinear(4, 3, eval_mode="mean")
    assert bool((fb.predict(layer, torch.ones(2, 4), 8).variance > 0).all())


def test_no_graph_is_kept() -> None:
    x = images().requires_grad_()
    got = fb.predict(convolutional(), x, 4, keep_samples=True)
    assert not any(getattr(got, name).requires_grad for name in FIELDS)
    assert torch.is_grad_enabled()


def test_a_deterministic_model_is_one_function() -> None:
    calls = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.register_forward_hook(lambda *_: calls.append(1))
    got = fb.predict(model, images(), 32, keep_samples=True, batch_size=7, samples_per_pass=32)
    assert len(calls) == 1
    assert got.samples.shape == (1, 7, 3)
    assert got.variance.abs().max().item() == 0.0
    assert got.mutual_information.abs().max().item() == 0.0


def test_inside_other_contexts() -> None:
    model, x = convolutional(), images()
    expected = fb.predict(model, x, 4)
    with fb.mean_weights(model), fb.grouped(model):
        assert_same_prediction(fb.predict(model, x, 4), expected)
    with fb.weight_samples(model, 2), pytest.raises(ValueError, match="outside any other"):
        fb.predict(model, x, 4)
