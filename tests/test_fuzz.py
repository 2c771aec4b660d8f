"""Random shapes and arguments against the definition in plain PyTorch."""

from __future__ import annotations

import torch
from cases import Problem, call
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import fastbconv as fb
from fastbconv.testing import (
    FORWARD_FACTOR,
    ConvArguments,
    assert_close,
    assert_ratio,
    plain_bconv2d,
)

EXTENTS = st.sampled_from([1, 2, 3, 5, 7, 8, 11, 15, 16, 17, 23])
SMALL = st.integers(1, 3)
PADDING = st.one_of(
    st.just("same"),
    st.integers(0, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 3))] * 2),
)
SMOOTH = [n for n in fb.activations.names() if n not in ("relu6", "hard_sigmoid", "hardsigmoid")]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any legal convolution with less than about a million multiplications per sample."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    samples = draw(st.sampled_from([1, 1, 2, 3]))
    share = draw(st.booleans())
    widths = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 33] if groups == 1 else [1, 2, 5, 8])
    problem = Problem(
        N=draw(st.integers(0, 3)) * (1 if share else samples),
        C=groups * draw(widths),
        H=draw(EXTENTS),
        W=draw(EXTENTS),
        K=groups * draw(widths),
        R=draw(st.sampled_from([1, 2, 3, 3, 3, 5])),
        S=draw(st.sampled_from([1, 2, 3, 3, 3, 5])),
        stride=(draw(SMALL), draw(SMALL)),
        padding=draw(PADDING),
        dilation=(draw(SMALL), draw(SMALL)),
        groups=groups,
        num_samples=samples,
        share_input=share,
        bias=draw(st.sampled_from(["none", "point", "bayes"])),
        activation=draw(st.sampled_from(SMOOTH)),
        channels_last=draw(st.booleans()),
    )
    top, bottom, left, right = problem.pads()
    assume(problem.H + top + bottom >= (problem.R - 1) * problem.dilation[0] + 1)
    assume(problem.W + left + right >= (problem.S - 1) * problem.dilation[1] + 1)
    return problem


def _run(a: ConvArguments, function):
    """Output, and the gradients of its product with fixed numbers by every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in a.leaves().items()}
    output = function(leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(cotangent.to(output.dtype))
    return output.detach(), {name: t.grad for name, t in leaves.items()}


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
@example(Problem(1, 1, 1, 1, 1, 1, 1), torch.float32)
@example(Problem(2, 17, 5, 5, 33, 3, 3, padding="same", channels_last=True), torch.float32)
def test_any_convolution(problem: Problem, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)  # the problems are smaller than the cost of a thread
    a = problem.arguments(dtype)
    wanted, gradients = _run(a, lambda t: plain_bconv2d(a, torch.float64, t))
    got, ours = _run(a, lambda t: call(type(a)(**{**vars(a), **t})))
    if dtype == torch.bfloat16:  # its gradients are judged in test_functional.py
        assert_ratio(got, plain_bconv2d(a, dtype), wanted, FORWARD_FACTOR, f"output of {problem}")
        return
    scale = 1.0 + (wanted.abs().max().item() if wanted.numel() else 0.0)
    assert_close(got, wanted, 0.0, 2e-5 * scale, f"output of {problem}")
    for name, expected in gradients.items():
        if expected is None:
            assert ours[name] is None
            continue
        scale = 1.0 + (expected.abs().max().item() if expected.numel() else 0.0)
        assert_close(ours[name], expected, 0.0, 5e-5 * scale, f"{name} of {problem}")


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(SMALL, SMALL, st.integers(1, 20)),
    features=st.integers(1, 20),
    loc=st.floats(-2, 2),
    scale=st.floats(0.01, 10),
    rho=st.floats(-200, 200),
)
def test_any_linear_layer_and_prior(shape, features, loc, scale, rho) -> None:
    x, w = torch.randn(shape), torch.randn(features, shape[-1])
    raw = torch.full_like(w, rho)
    y, kl = fb.functional.bayes_linear(x, w, raw, seed=3, prior=(loc, scale), return_kl=True)
    posterior = torch.logaddexp(raw.double(), torch.zeros(()).double()) + 2.0**-23
    sample = w.double() + posterior * fb.noise.weight_eps(3, w.shape)
    expected = x.double() @ sample.T
    assert_close(y, expected, 0.0, 1e-5 * (1 + expected.abs().max().item()))
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(w.double(), posterior), torch.distributions.Normal(loc, scale)
    ).sum()
    assert_close(kl, divergence, 2e-6, 1e-6)
