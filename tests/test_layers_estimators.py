"""Flipout and local reparameterisation on the torch face."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastbconv as fb
from fastbconv import estimators
from fastbconv.testing import assert_close, assert_same

SEED = torch.tensor([3, 4])
NAMES = tuple(estimators.ESTIMATOR_ID)
AFFINE = NAMES[1:]


def _problems(estimator: str, **options: Any) -> list[tuple[Any, torch.Tensor]]:
    options = {"bayesian_bias": True, "activation": "tanh", **options}
    conv = fb.BayesConv2d(4, 6, 3, padding=1, groups=2, estimator=estimator, **options)
    linear = fb.BayesLinear(5, 4, estimator=estimator, **options)
    return [(conv, torch.randn(4, 4, 6, 5)), (linear, torch.randn(4, 3, 5))]


def _functional(layer: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    tensors = (layer.weight, layer.weight_rho, layer.bias, layer.bias_rho)
    if isinstance(layer, nn.Linear):
        return fb.functional.bayes_linear(x, *tensors, activation="tanh", **options)
    options = {"padding": 1, "groups": 2, "activation": "tanh", **options}
    return fb.functional.bayes_conv2d(x, *tensors, **options)


@pytest.mark.parametrize("estimator", NAMES)
def test_forward_is_the_functional(estimator: str) -> None:
    for layer, x in _problems(estimator):
        for options in ({}, {"num_samples": 2}, {"num_samples": 2, "share_input": True}):
            want = _functional(layer, x, seed=SEED, estimator=estimator, **options)
            assert_same(layer(x, SEED, **options), want)
        assert not torch.equal(layer(x), layer(x))
        want = _functional(layer, x, seed=SEED, estimator="reparameterization")
        assert torch.allclose(layer(x, SEED), want) is (estimator == "reparameterization")


@pytest.mark.parametrize("estimator", AFFINE)
def test_one_draw_of_the_weights_in_fixed_sample(estimator: str) -> None:
    for layer, x in _problems(estimator):
        seed = fb.noise.derive(9, 0)
        with fb.fixed_sample(layer, 9):
            got = layer(x)
            assert_same(got, layer(x))
            assert not torch.allclose(layer(x, seed), got)  # a given seed keeps the estimator
        assert_same(got, _functional(layer, x, seed=seed))
        with fb.mean_weights(layer):
            assert_same(layer(x), layer(x))


@pytest.mark.parametrize("estimator", AFFINE)
def test_kl_and_groups(estimator: str) -> None:
    for prior in ((0.0, 1.0), fb.ScaleMixture(0.5, 1.0, 0.1)):
        for layer, x in _problems(estimator, prior=prior):
            torch.manual_seed(1)
            want = layer(x)
            torch.manual_seed(1)
            with fb.grouped(layer), fb.collect_kl(layer) as kl:
                assert_same(layer(x), want)  # the layer draws for itself
            assert_close(kl.sum(), layer.kl_loss(), 1e-5, 0)


@pytest.mark.parametrize("estimator", AFFINE)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(estimator: str, use_reentrant: bool) -> None:
    for layer, x in _problems(estimator):
        results = []
        for wrapped in (False, True):
            torch.manual_seed(3)
            z = x.clone().requires_grad_()
            if wrapped:
                y = torch.utils.checkpoint.checkpoint(layer, z, use_reentrant=use_reentrant)
            else:
                y = layer(z)
            layer.zero_grad()
            y.square().sum().backward()
            results.append([z.grad, *(parameter.grad for parameter in layer.parameters())])
        for got, want in zip(*results, strict=True):
            assert_close(got, want, 1e-5, 1e-5)


@pytest.mark.parametrize("estimator", AFFINE)
def test_living_with_pytorch(estimator: str) -> None:
    for layer, x in _problems(estimator):
        for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert clone.estimator == estimator
            assert_same(clone(x, SEED), layer(x, SEED))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        parameters = dict(layer.named_parameters())
        seeds = torch.tensor([[1, 0], [2, 0]])
        batched = torch.func.vmap(
            lambda seed, m=layer, p=parameters, x=x: torch.func.functional_call(m, p, (x, seed))
        )(seeds)
        assert_close(batched, torch.stack([layer(x, seed) for seed in seeds]), 1e-5, 1e-5)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.manual_seed(2)
        want = layer(x)
        torch.manual_seed(2)
        assert_close(compiled(x), want, 1e-5, 1e-5)
        moved = copy.deepcopy(layer).to("meta")
        assert moved(x.to("meta")).shape == want.shape


def test_repr_names_another_estimator() -> None:
    assert "estimator" not in repr(fb.BayesLinear(2, 2))
    assert "estimator='flipout'" in repr(fb.BayesLinear(2, 2, estimator="flipout"))
    assert "estimator='local'" in repr(fb.BayesConv2d(2, 2, 1, estimator="local"))


@pytest.mark.parametrize("estimator", ["mean", None, 1])
def test_unknown_estimators(estimator: Any) -> None:
    with pytest.raises(ValueError, match="estimator: expected one of 'reparameterization', 'flip"):
        fb.BayesConv2d(2, 2, 1, estimator=estimator)


@pytest.mark.parametrize("estimator", ["reparameterization", *AFFINE])
@pytest.mark.parametrize("algorithm", ["auto", "library", "reference"])
@pytest.mark.parametrize("rank", [2, 3])
def test_float16_gradients_are_summed_wide(estimator: str, algorithm: str, rank: int) -> None:
    """A sum beyond 65504 is a number: weights are rounded, their gradients are not."""
    x = (torch.randn(2, 8, *[6] * rank) * 300).half()
    w = torch.zeros(4, 8, *[3] * rank, requires_grad=True)
    conv = fb.functional.bayes_conv2d if rank == 2 else fb.functional.bayes_conv3d
    with fb.algorithm(algorithm):
        y = conv(x, w, torch.full_like(w, -3.0), estimator=estimator, seed=1)
    y.float().square().sum().backward()
    assert 65504 < float(w.grad.abs().max()) < 1e9


@pytest.mark.parametrize("estimator", ["reparameterization", *AFFINE])
def test_functions_compile_with_dynamic_shapes(estimator: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        fb.functional.bayes_conv2d, dynamic=True, fullgraph=True, backend="aot_eager"
    )
    w = torch.randn(4, 3, 3, 3)
    for extent in (6, 9):
        x = torch.randn(2, 3, extent, extent)
        got = compiled(x, w, w, seed=1, return_kl=True, estimator=estimator)
        want = fb.functional.bayes_conv2d(x, w, w, seed=1, return_kl=True, estimator=estimator)
        for have, expected in zip(got, want, strict=True):
            assert_close(have, expected, 1e-6, 1e-6)


def test_row_offsets_do_not_recompile() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    w, seed = torch.randn(4, 3, 2, 2, 2), torch.tensor([1, 0])

    @torch.compile(backend=counter, fullgraph=True)
    def conv(x: torch.Tensor) -> torch.Tensor:
        return fb.functional.bayes_conv3d(x, w, w, seed=seed, estimator="local", row_offset=3)

    for extent in (5, 6, 7, 8):
        conv(torch.randn(2, 3, extent, extent, extent))
    assert counter.frame_count <= 2
