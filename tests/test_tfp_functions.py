"""What a user's functions return to a layer of the TFP face, and messages where it is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tfp_layers import AFFINE, NAMES, RANDOM_BIAS, built, make
from torch import Tensor
from torch.distributions import Normal, StudentT

import fastbconv as fb
from fastbconv.layers import tfp

BAD_RESULTS = pytest.mark.parametrize(
    ("result", "kind"),
    [(None, "NoneType"), (torch.zeros(2), "Tensor"), (3, "int"), ((0.0, 1.0), "tuple")],
)


def heavy_tails(dtype: Any, shape: Any, *_: Any) -> StudentT:
    """A prior without a closed-form KL."""
    return StudentT(torch.full(shape, 4.0, dtype=dtype))


# --- distributions --------------------------------------------------------------------------------


@BAD_RESULTS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["kernel_posterior", "bias_posterior", "kernel_prior"])
def test_a_function_that_returns_no_distribution(
    name: str, role: str, result: Any, kind: str
) -> None:
    options = {f"{role}_fn": lambda *_: result}
    if role.endswith("prior") and result is None:
        layer, x = built(name, **options)  # no prior: no loss
        layer(x)
        assert layer.losses == []
        return
    message = rf"{role}_fn: expected .*Distribution.*, got one that returns {kind}; return for"
    with pytest.raises(TypeError, match=message):
        built(name, **options)


def test_a_distribution_of_ones_own_need_not_be_one_of_torch() -> None:
    class Flat:
        def log_prob(self, value: Tensor) -> Tensor:
            return torch.zeros_like(value)

    class Ones:
        def __init__(self, shape: Any) -> None:
            self.shape = shape

        def sample(self) -> Tensor:
            return torch.ones(self.shape)

    layer, x = built(
        "DenseReparameterization",
        kernel_posterior_fn=lambda _, shape, *__: Ones(shape),
        kernel_prior_fn=lambda *_: Flat(),
        kernel_divergence_fn=lambda q, p, w: -p.log_prob(w).sum(),
        bias_posterior_fn=None,
    )
    torch.testing.assert_close(layer(x), x.sum(-1, keepdim=True).expand(3, 4))
    assert layer.losses[0] == 0


@pytest.mark.parametrize("name", AFFINE)
def test_the_posterior_has_to_have_the_kernels_shape(name: str) -> None:
    """Where no kernel sample is formed nothing else would notice."""
    good, x = built(name)
    shape = tuple(good.kernel_posterior_loc.shape)
    for given in ((), (*shape[:-1], 1), (*shape[:-1], 7), (5, *shape[1:]), (1, *shape)):
        normal = Normal(torch.zeros(given), torch.ones(given))
        layer = make(name, kernel_posterior_fn=lambda *_, normal=normal: normal)
        expected = f"expected a distribution of shape {shape}, got Normal of shape {given}; make"
        with pytest.raises(ValueError, match=re.escape(f"kernel_posterior_fn: {expected}")):
            layer(x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_posteriors_of_another_dtype_are_cast(name: str, dtype: torch.dtype) -> None:
    def ones(_: Any, shape: Any, *__: Any) -> Normal:
        return Normal(torch.ones(shape, dtype=dtype), 0.5)

    def same(own: Any, shape: Any, *_: Any) -> Normal:
        return Normal(torch.ones(shape, dtype=own), 0.5)

    for own in ("float32", "float64"):
        options: dict[str, Any] = {"dtype": own, "bias_posterior_fn": None}
        layer, x = built(name, kernel_posterior_fn=ones, **options)
        y = layer(x, seed=1)
        assert y.dtype == layer.dtype
        if name in AFFINE:
            want = make(name, kernel_posterior_fn=same, **options)(x, seed=1)
            torch.testing.assert_close(y, want)
            assert layer.kernel_posterior_affine.stddev.dtype == layer.dtype


# --- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_that_the_message_suggests_works(name: str) -> None:
    """Flipout and local layers have no sample of the kernel: the suggestion draws one."""
    priors = {**RANDOM_BIAS, "kernel_prior_fn": heavy_tails, "bias_prior_fn": heavy_tails}
    layer, x = built(name, **priors)
    layer(x)
    functions = {}
    for part, draws in (("kernel", name in AFFINE), ("bias", False)):
        with pytest.raises(NotImplementedError, match="got Normal and StudentT; pass") as caught:
            layer._divergence(part)
        code = str(caught.value).partition("estimate ")[2]
        assert code.startswith("def fn(q, p, w): w = q.rsample()" if draws else "lambda q, p, w:")
        namespace: dict[str, Any] = {}
        exec(code if draws else f"fn = {code}", namespace)
        functions[f"{part}_divergence_fn"] = namespace["fn"]
    layer = make(name, **priors, **functions)
    layer(x)
    assert all(loss.isfinite() for loss in layer.losses)
    layer.kl_loss().backward()
    assert layer.kernel_posterior_loc.grad.isfinite().all()


# --- activations, regularisers, constraints, initialisers -----------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [tfp.posterior_sample, lambda d: d.sample()])
def test_activations_and_their_penalties(name: str, function: Any) -> None:
    layer, x = built(name, activation=lambda z: None, kernel_posterior_tensor_fn=function)
    with pytest.raises(TypeError, match="activation: expected it to return a tensor, got NoneType"):
        layer(x)
    layer, x = built(name, activity_regularizer=lambda y: None, kernel_posterior_tensor_fn=function)
    with pytest.raises(
        TypeError, match=r"activity_regularizer: expected .* got NoneType; .*l2\(\)"
    ):
        layer(x)


def with_loc(**options: Any) -> Any:
    """A built layer whose kernel's loc has an initialiser, a regulariser or a constraint."""
    layer = make(
        "DenseReparameterization", kernel_posterior_fn=tfp.default_mean_field_normal_fn(**options)
    )
    layer.build((None, 3))
    return layer


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        (None, TypeError, "expected it to return a tensor, got NoneType; an initialiser is"),
        ("zeros", TypeError, "expected it to return a tensor, got str; an initialiser is"),
        (torch.zeros(4, 3), ValueError, r"\(3, 4\), got \(4, 3\); an initialiser is"),
        ([0.0, 1.0], ValueError, r"\(3, 4\), got \(2,\); an initialiser is"),
    ],
)
def test_bad_results_of_initialisers(result: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"initializer of kernel_posterior_loc: .*{message}"):
        with_loc(loc_initializer=lambda shape, dtype: result)
    assert (with_loc(loc_initializer=lambda shape, dtype: 2).kernel_posterior_loc == 2).all()


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda w: None, TypeError, "expected it to return a tensor, got NoneType; a constraint"),
        (lambda w: w[:1], ValueError, r"\(3, 4\), got \(1, 4\); a constraint is"),
    ],
)
def test_bad_results_of_constraints(function: Any, kind: type[Exception], message: str) -> None:
    layer = with_loc(loc_constraint=function)
    with pytest.raises(kind, match=f"constraint of kernel_posterior_loc: .*{message}"):
        fb.apply_constraints(layer)


def test_bad_results_of_regularisers() -> None:
    layer = with_loc(loc_regularizer=lambda w: None)
    with pytest.raises(
        TypeError, match=r"regularizer of kernel_posterior_loc: .*, got NoneType; a"
    ):
        _ = layer.losses
