"""The figures of the report against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv.train import data, evaluate, plots, steptime
from fastbconv.train.model import ConvNet
from fastbconv.train.settings import NOISE_STRENGTHS, Settings

# Two samples of three images with two classes.
PROBABILITIES = torch.tensor(
    [
        [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]],
        [[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 1])


class Recorded(nn.Module):
    """Returns the log probabilities of one sample after the other."""

    is_bayesian = True
    _fb_context = None

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.samples = iter(probabilities.log())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return next(self.samples)


def predicted(probabilities: torch.Tensor) -> fb.Prediction:
    """The prediction of functions with these probabilities, (samples, N, classes)."""
    images = torch.zeros(probabilities.shape[1], 1)
    options = {"batch_size": len(images), "samples_per_pass": 1}
    return fb.predict(Recorded(probabilities), images, len(probabilities), **options)


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.fixture
def part() -> data.Part:
    images = torch.arange(5 * 64).reshape(5, 1, 8, 8).remainder(17).to(torch.uint8)
    return data.Part(images, torch.tensor([0, 1, 2, 3, 0]), 16.0)


def network(kind: str = "bayesian") -> ConvNet:
    return ConvNet(kind, (1, 8, 8), 4, Settings(channels=(3, 4), hidden=5))


def test_accuracy_and_nll_are_of_the_mean_probability() -> None:
    mean = predicted(PROBABILITIES).mean.log()
    torch.testing.assert_close(mean.exp(), PROBABILITIES.mean(dim=0))
    # The mean probabilities of the right classes are 0.8, 0.4 and 0.5; argmax: 0, 1, 0.
    assert evaluate.accuracy(mean, LABELS) == pytest.approx(1 / 3)
    by_hand = -(math.log(0.8) + math.log(0.4) + math.log(0.5)) / 3
    assert evaluate.nll(mean, LABELS) == pytest.approx(by_hand)


def test_entropies_separate_data_from_weights() -> None:
    prediction = predicted(PROBABILITIES)
    by_hand = [binary_entropy(0.8), binary_entropy(0.4), math.log(2)]
    expected = [
        (binary_entropy(0.9) + binary_entropy(0.7)) / 2,
        (binary_entropy(0.6) + binary_entropy(0.2)) / 2,
        math.log(2),
    ]
    information = np.subtract(by_hand, expected)
    np.testing.assert_allclose(prediction.entropy, by_hand, rtol=1e-12)
    np.testing.assert_allclose(prediction.mutual_information, information, atol=1e-12)


def test_entropies_stay_finite_where_a_probability_is_zero() -> None:
    prediction = predicted(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))
    assert (prediction.entropy.item(), prediction.mutual_information.item()) == (0.0, 0.0)


def test_calibration_error_weighs_bins_by_their_images() -> None:
    # Three images at confidence 0.9, two of them right; one at 0.55, right.
    probability = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.55, 0.45]]).double()
    labels = torch.tensor([0, 1, 1, 0])
    by_hand = 0.75 * abs(0.9 - 2 / 3) + 0.25 * abs(0.55 - 1.0)
    assert evaluate.calibration_error(probability.log(), labels) == pytest.approx(by_hand, abs=1e-6)
    confidence, accuracy, count = plots.reliability_bins(probability.log(), labels)
    np.testing.assert_allclose(confidence, [0.55, 0.9])
    np.testing.assert_allclose(accuracy, [1.0, 2 / 3])
    np.testing.assert_array_equal(count, [1, 3])


def test_auroc_counts_pairs() -> None:
    known, unknown = torch.tensor([0.1, 2.0, 3.0]), torch.tensor([2.5, 2.0])
    # Of six pairs: 0.1 is below both, 2.0 below one and tied with one, 3.0 below none.
    assert evaluate.auroc(known, unknown) == pytest.approx((2 + 1.5 + 0) / 6)
    tiny = torch.tensor([1e-12, 2e-12])
    assert evaluate.auroc(tiny, tiny * 10) == 1.0  # close scores are not rounded together


def test_measure_fills_every_figure() -> None:
    metrics = evaluate.measure(predicted(PROBABILITIES), LABELS, torch.zeros(3))
    assert metrics.accuracy == pytest.approx(1 / 3)
    assert metrics.auroc_noise == 1.0
    assert set(metrics.to_dict()) == {
        *("accuracy", "nll", "calibration_error", "entropy", "mutual_information", "auroc_noise")
    }


def test_rejecting_the_uncertain_first() -> None:
    log_probability = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.5, 0.5]]).log()
    entropy = torch.tensor([0.3, 0.67, 0.5, 0.69])
    kept = plots.kept_accuracy(log_probability, entropy, torch.tensor([0, 0, 0, 0]))
    # From the most certain on: right, right, wrong, right.
    np.testing.assert_allclose(kept, [1.0, 1.0, 2 / 3, 3 / 4])


def test_predict_is_the_mean_of_one_set_of_functions(part: data.Part) -> None:
    model = network()
    before = torch.get_rng_state()
    prediction = evaluate.predict(model, part, 3, seed=7)
    assert torch.equal(torch.get_rng_state(), before)  # evaluating does not move the training
    images, _ = part.batch(slice(None))
    model.eval()
    probabilities = []
    for sample in range(3):
        with torch.no_grad(), fb.fixed_sample(model, 7, sample=sample):
            probabilities.append(model(images).double().softmax(1))
    torch.testing.assert_close(
        prediction.mean, torch.stack(probabilities).mean(0), rtol=1e-5, atol=1e-6
    )
    few = evaluate.predict(model, data.Part(part.images[:2], part.labels[:2], 16.0), 3, seed=7)
    torch.testing.assert_close(few.mean, prediction.mean[:2], rtol=1e-5, atol=1e-6)


def test_a_deterministic_network_is_one_sample(part: data.Part) -> None:
    prediction = evaluate.predict(network("deterministic"), part, 8, seed=0)
    assert prediction.variance.abs().max().item() == 0.0
    assert evaluate.measure(prediction, part.labels).mutual_information == 0.0


def test_noise_is_one_draw_times_its_strength() -> None:
    images = torch.full((2, 1, 64, 64), 0.5)
    weak, strong = (evaluate.add_noise(images, strength) - images for strength in (0.1, 0.4))
    torch.testing.assert_close(strong, 4 * weak, rtol=1e-4, atol=1e-5)
    assert strong.std().item() == pytest.approx(0.4, rel=0.03)
    assert strong.max() > 0.5  # nothing is clipped at white
    assert 0.4 in NOISE_STRENGTHS
    assert len(NOISE_STRENGTHS) == 5


def test_held_out_classes_count_as_unknown(part: data.Part) -> None:
    found = evaluate.evaluate_held_out(network(), part, (2, 3), 3, seed=0)
    assert (len(found.entropy_known), len(found.entropy_unknown)) == (3, 2)
    assert 0 <= found.entropy_auroc <= 1
    assert found.information_auroc is not None
    plain = evaluate.evaluate_held_out(network("deterministic"), part, (2, 3), 3, seed=0)
    assert plain.information_auroc is None


def test_quartiles() -> None:
    assert steptime.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def test_the_kinds_start_from_the_same_means() -> None:
    parameters = {}
    for kind in ("bayesian", "deterministic", "unfused"):
        torch.manual_seed(3)
        parameters[kind] = dict(network(kind).named_parameters())
    for name, value in parameters["deterministic"].items():
        assert torch.equal(parameters["bayesian"][name], value), name
        assert torch.equal(parameters["unfused"][name], value), name
    for name in parameters["bayesian"].keys() - parameters["deterministic"].keys():
        torch.testing.assert_close(parameters["bayesian"][name], parameters["unfused"][name])


def test_the_hand_written_layer_is_the_same_model(part: data.Part) -> None:
    """The comparison of step times compares like with like: same KL, same output without noise."""
    from fastbconv.train.model import unfused_kl

    ours, theirs = network("bayesian"), network("unfused")
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(unfused_kl(theirs), fb.kl_loss(ours), rtol=1e-5, atol=0)
    for module in theirs.modules():
        if isinstance(getattr(module, "weight_rho", None), nn.Parameter):
            nn.init.constant_(module.weight_rho, -40.0)
    images, _ = part.batch(slice(None))
    with fb.mean_weights(ours):
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)
