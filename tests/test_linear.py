"""The functional linear layer: shapes, samples, priors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastbconv as fb
from fastbconv.testing import assert_close

bayes_linear = fb.functional.bayes_linear


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 3, 2, 6)])
@pytest.mark.parametrize("activation", [None, "gelu", "softmax"])
def test_linear_is_the_matrix_product(shape, activation) -> None:
    x, w, rho, b = torch.randn(shape), torch.randn(5, 6), torch.randn(5, 6), torch.randn(5)
    y, kl = bayes_linear(x, w, rho, b, seed=3, activation=activation, return_kl=True)
    sample = w + (F.softplus(rho) + 2.0**-23) * fb.noise.weight_eps(3, (5, 6))
    z = F.linear(x, sample, b)
    expected = {None: lambda: z, "gelu": lambda: F.gelu(z), "softmax": lambda: z.softmax(-1)}
    assert_close(y, expected[activation](), 1e-5, 1e-5)
    assert_close(kl, fb.functional.kl_normal(w, rho), 1e-6, 0)


def test_linear_samples_and_prior_tensors() -> None:
    x, w, rho = torch.randn(4, 3, 6), torch.randn(5, 6), torch.randn(5, 6)
    prior = (torch.randn(6), torch.rand(5, 1) + 0.5)
    y, kl = bayes_linear(x, w, rho, seed=3, num_samples=2, prior=prior, return_kl=True)
    for s in (0, 1):
        part = bayes_linear(x[2 * s : 2 * s + 2], w, rho, seed=torch.tensor([3, s]))
        assert_close(y[2 * s : 2 * s + 2], part, 1e-5, 1e-5)
    assert_close(kl, fb.functional.kl_normal(w, rho, prior), 1e-6, 0)
    shared = bayes_linear(x, w, rho, seed=3, num_samples=2, share_input=True)
    assert shared.shape == (8, 3, 5)
