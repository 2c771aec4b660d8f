"""What the tests of ``grouped`` share: a model, fixtures, comparisons."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv import contexts, ops, reference
from fastbconv.testing import assert_close

group_module = sys.modules["fastbconv.grouped"]  # in the package the name is the function's


@pytest.fixture(params=["auto", "reference"], autouse=True)
def each_backend(request):
    with fb.algorithm(request.param):
        yield request.param


def make_model(**options) -> nn.Sequential:
    return nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu", **options),
        fb.BayesConv2d(4, 4, 3, bayesian_bias=True, groups=2, **options),
        nn.Flatten(),
        fb.BayesLinear(64, 5, bayesian_bias=True, **options),
        fb.BayesLinear(5, 2, bias=False, **options),
    )


def make_image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many posteriors each pass draws."""
    seen: list[int] = []
    for module in (ops, reference):
        draw = module.sample_posterior_list

        def counted(loc, *rest, draw=draw, **options):
            seen.append(len(loc))
            return draw(loc, *rest, **options)

        monkeypatch.setattr(module, "sample_posterior_list", counted)
    return seen


@pytest.fixture
def taken(monkeypatch) -> list[tuple[nn.Module, torch.Tensor]]:
    """What the groups hand out: layer and weight."""
    seen = []
    take = group_module._Group.take

    def spy(self, layer, *rest):
        found = take(self, layer, *rest)
        if isinstance(found, contexts.Sampled):
            seen.append((layer, found.weight))
        return found

    monkeypatch.setattr(group_module._Group, "take", spy)
    return seen


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_gradients(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, 1e-4, 1e-5)
