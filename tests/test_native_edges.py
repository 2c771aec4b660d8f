"""Corners of the native operators that once went wrong: each test failed before its fix."""

from __future__ import annotations

import pytest
import torch

import fastbconv as fb
from fastbconv import functional, ops


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_prior_scale_that_is_not_positive_shows_in_the_kl(scale: float) -> None:
    """Bit arithmetic on a negative ratio used to give a finite divergence."""
    loc, rho = torch.zeros(4, 3, 3, 3), torch.zeros(4, 3, 3, 3)
    kl = ops.kl_normal(loc, rho, None, torch.full((1,), scale), prior=(0.0, 1.0), scale_floor=1e-7)
    assert torch.isnan(kl)


def gradients(threads: int, prior_scale: torch.Tensor | None, frozen: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x = torch.randn(8, 5, 9, 7)
    loc = torch.randn(100, 5, 3, 3).requires_grad_(not frozen)
    rho = torch.randn(100, 5, 3, 3).requires_grad_(not frozen)
    bias = torch.randn(100, requires_grad=True)
    prior = (0.0, 1.0 if prior_scale is None else prior_scale)
    with fb.algorithm("direct"):
        y, kl = functional.bayes_conv2d(x, loc, rho, bias, prior=prior, seed=1, return_kl=True)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + kl
    wanted = [bias] if prior_scale is None else [bias, prior_scale]
    return list(torch.autograd.grad(loss, wanted))


def test_bias_alone_has_the_same_bits_for_any_threads() -> None:
    """With frozen weights the bias gradient was left to the library's sums."""
    one, three = (gradients(threads, None, frozen=True) for threads in (1, 3))
    assert torch.equal(one[0], three[0])


def test_broadcast_prior_has_the_same_bits_for_any_threads() -> None:
    results = []
    for threads in (1, 7):
        scale = torch.linspace(0.5, 2, 5).view(1, 5, 1, 1).requires_grad_()
        results.append(gradients(threads, scale, frozen=False))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_library_is_refused_once_deterministic_algorithms_are_asked_for() -> None:
    x, loc = torch.randn(1, 3, 5, 5), torch.zeros(2, 3, 3, 3)
    with fb.algorithm("library"):
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(NotImplementedError, match="deterministic"):
                functional.bayes_conv2d(x, loc, loc, seed=0)
        finally:
            torch.use_deterministic_algorithms(False)


def test_float16_subnormals_survive_flushing() -> None:
    """They used to pass through float32 subnormals, which a processor may flush to zero."""
    x = torch.full((1, 1, 1, 1), 6e-6, dtype=torch.float16)
    loc = torch.full((1, 1, 1, 1), 1000.0)
    torch.set_flush_denormal(True)
    try:
        with fb.algorithm("direct"):
            y = functional.bayes_conv2d(x, loc, None)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(y.float(), x.float() * 1000, rtol=1e-3, atol=0)


def test_absurd_padding_is_refused() -> None:
    x, loc = torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    with pytest.raises(NotImplementedError, match="padding: expected at most"):
        functional.bayes_conv2d(x, loc, loc, padding=10**9, dilation=10**9, seed=0)


@pytest.mark.parametrize("activation", ["softmax", "log_softmax"])
def test_softmax_of_an_unbatched_image_runs_over_channels(activation: str) -> None:
    x, loc = torch.randn(3, 6, 5), torch.randn(4, 3, 3, 3)
    one = functional.bayes_conv2d(x, loc, loc, activation=activation, seed=0)
    batch = functional.bayes_conv2d(x[None], loc, loc, activation=activation, seed=0)
    torch.testing.assert_close(one, batch[0])


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_keep_channels_last(mode: str) -> None:
    layer = fb.BayesConv2d(3, 4, 3, padding=1, padding_mode=mode)
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_explain_refuses_no_draws() -> None:
    """It used to divide by zero and end the process."""
    with pytest.raises(ValueError, match="num_samples: expected"):
        fb.explain(torch.zeros(1, 64, 8, 8), torch.zeros(64, 64, 3, 3), padding=1, num_samples=0)
