"""What the output of a model means, against values computed by hand and by torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch import distributions

from fastbconv import likelihoods
from fastbconv.testing import assert_close

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 4


def test_categorical_is_the_distribution_of_that_name() -> None:
    moments = likelihoods.Categorical().moments(LOGITS)
    expected = distributions.Categorical(logits=LOGITS.double())
    assert_close(moments.mean, expected.probs, 1e-12, 0)
    assert_close(moments.entropy, expected.entropy(), 1e-12, 1e-12)
    assert moments.variance is None


def test_categorical_of_maps() -> None:
    logits = torch.randn(2, 5, 3, 4)
    moments = likelihoods.Categorical().moments(logits)
    assert_close(moments.mean, logits.double().softmax(1), 1e-12, 0)
    one = likelihoods.Categorical().moments(logits[:1, :, 2, 1])
    assert_close(moments.entropy[0, 2, 1], one.entropy[0], 1e-12, 0)


def test_bernoulli_is_the_distribution_of_that_name() -> None:
    likelihood = likelihoods.Bernoulli()
    moments = likelihood.moments(LOGITS)
    expected = distributions.Bernoulli(logits=LOGITS.double())
    assert_close(moments.mean, expected.probs, 1e-12, 0)
    assert_close(moments.entropy, expected.entropy(), 1e-10, 1e-12)
    assert likelihood.entropy(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_certain_logits_have_no_entropy_and_no_nan() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for likelihood in (likelihoods.Categorical(), likelihoods.Bernoulli()):
        moments = likelihood.moments(logits)
        assert bool(moments.mean.isfinite().all())
        assert bool(moments.entropy.isfinite().all())
    assert likelihoods.Categorical().moments(logits).entropy.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_are_formed_in_float64(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    mean = likelihoods.Categorical().moments(logits).mean
    assert mean.dtype == torch.float64
    assert_close(mean.sum(1), torch.ones(6).double(), 1e-14, 0)


def test_gaussian_takes_what_gaussian_nll_loss_takes() -> None:
    mean, variance = torch.randn(4, 2), torch.rand(4, 2)
    moments = likelihoods.Gaussian().moments((mean, variance))
    assert_close(moments.mean, mean, 0, 0)
    assert_close(moments.variance, variance, 0, 0)
    logs = likelihoods.Gaussian(log_variance=True).moments((mean, variance.log()))
    assert_close(logs.variance, variance, 1e-6, 0)
    known = likelihoods.Gaussian(variance=0.25).moments(mean)
    assert known.variance.unique().tolist() == [0.25]


def test_resolve() -> None:
    own = likelihoods.Gaussian(log_variance=True)
    assert likelihoods.resolve(own) is own
    assert isinstance(likelihoods.resolve("categorical"), likelihoods.Categorical)
    function = likelihoods.resolve(lambda output: output["logits"].abs())
    assert function.moments({"logits": -torch.ones(2)}).mean.tolist() == [1.0, 1.0]
    assert function.entropy(torch.ones(2)) is None


@pytest.mark.parametrize(
    ("likelihood", "error", "message"),
    [
        ("softmax", ValueError, "likelihood: expected 'categorical', .* got 'softmax'"),
        (3, TypeError, "likelihood: expected .* got 3"),
        (likelihoods.Gaussian, TypeError, "likelihood: expected .* got <class"),
    ],
)
def test_what_is_no_likelihood(likelihood, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        likelihoods.resolve(likelihood)


@pytest.mark.parametrize(
    ("likelihood", "output", "error", "message"),
    [
        ("categorical", torch.zeros(3), ValueError, "likelihood='bernoulli'"),
        ("categorical", (torch.zeros(3, 2), 1), TypeError, "expected a tensor .* got 2 values"),
        ("bernoulli", {"logits": 1}, TypeError, "expected a tensor .* got dict"),
        ("gaussian", torch.zeros(3), TypeError, r"Gaussian\(variance=\.\.\.\)"),
        ("gaussian", (torch.zeros(3), torch.zeros(3, 1)), ValueError, r"of shape \(3,\), like"),
        ("gaussian", (torch.zeros(3), -torch.ones(3)), ValueError, r"log_variance=True"),
        (lambda output: 3, torch.zeros(3), TypeError, "expected a tensor .* got int"),
    ],
)
def test_outputs_that_do_not_fit(likelihood, output, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        likelihoods.resolve(likelihood).moments(output)


def test_a_negative_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match="variance: expected a non-negative number, got -1"):
        likelihoods.Gaussian(variance=-1.0)


def test_a_function_has_real_values_for_each_row() -> None:
    output = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"a value for each row, got a single number"):
        likelihoods.Function(lambda value: value.mean()).moments(output)
    with pytest.raises(TypeError, match=r"expected real values from the function, got"):
        likelihoods.Function(torch.fft.fft).moments(output)
