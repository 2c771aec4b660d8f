"""grouped: weights that a pass has drawn and not used, and when a pass is over."""

from __future__ import annotations

import threading

import pytest
import torch
from grouped_cases import (  # noqa: F401  fixtures too
    assert_gradients,
    each_backend,
    gradients,
    group_module,
    make_image,
    make_model,
    passes,
)
from torch import nn

import fastbconv as fb
from fastbconv import noise
from fastbconv.testing import assert_same

# ruff: noqa: F811  a fixture is named where it is imported and where it is used


class Skipping(nn.Module):
    """Leaves out a layer, as stochastic depth does, and has one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = fb.BayesLinear(4, 4), fb.BayesLinear(4, 4)
        self.last, self.unused = fb.BayesLinear(4, 2), fb.BayesLinear(2, 2)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        x = self.first(x)
        return self.last(x if skip else self.second(x))


@pytest.mark.parametrize("fused", [False, True])
def test_training_a_model_that_leaves_out_layers(fused: bool, passes) -> None:
    model, x = Skipping(), torch.eye(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
    with fb.grouped(model):
        for skip in (True, False, True, False):
            optimizer.zero_grad()
            model(x, skip).square().sum().backward()
            assert (model.second.weight.grad is None) == skip
            assert model.unused.weight.grad is None
            optimizer.step()
    assert passes == [4] * 4


def test_parts_of_a_model_that_are_trained_by_turns() -> None:
    model, x = nn.ModuleList([fb.BayesLinear(4, 4), fb.BayesLinear(4, 1)]), torch.eye(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fb.grouped(model):
        for part in (0, 1, 1, 0, 1):
            optimizer.zero_grad()
            model[part](x).square().sum().backward()
            optimizer.step()
            assert model[part].weight.grad is not None
            assert model[1 - part].weight.grad is None


def test_passes_of_which_one_fails_and_passes_without_a_graph(passes) -> None:
    model, x = Skipping(), torch.eye(4)
    with fb.grouped(model):
        model.first(x)
        with pytest.raises(ValueError, match="input: expected"):
            model.second(torch.ones(1, 3))
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
            model(x)
    assert passes == [4] * 4


def test_several_passes_before_backward() -> None:
    model, x = Skipping(), torch.eye(4)
    torch.manual_seed(1)
    with fb.grouped(model):
        losses = [model(x, skip).square().sum() for skip in (False, True, False)]
    got = gradients(model, sum(losses))
    model.zero_grad()
    torch.manual_seed(1)
    with fb.grouped(model):
        for skip in (False, True, False):
            model(x, skip).square().sum().backward()
    assert_gradients(got, [p.grad for p in model.parameters()])


def test_backward_twice() -> None:
    model, x = Skipping(), torch.eye(4)
    with fb.grouped(model):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        once = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        loss.backward()
    assert_gradients(
        [p.grad for p in model.parameters()], [None if g is None else 2 * g for g in once]
    )


def test_a_layer_that_opens_a_pass_and_runs_again_at_once(passes) -> None:
    model, x = Skipping(), torch.eye(4)
    with fb.grouped(model):
        for _ in range(2):
            model(model.first(model.first(x))).sum().backward()
    assert passes == [4] * 2


def test_parameters_changed_between_draw_and_call() -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=1):
        hidden = model[0](x)
        with torch.no_grad():
            model[1].weight.add_(1.0)
        got = model[1](hidden)
    assert_same(got, model[1](hidden, seed=noise.derive(1, 1)))


def test_drawn_in_inference_mode_used_outside() -> None:
    model, x = make_model().requires_grad_(False), make_image()
    with fb.grouped(model, seed=1):
        with torch.inference_mode():
            hidden = model[0](x)
        leaf = hidden.clone().requires_grad_()
        model[1](leaf).sum().backward()
    assert leaf.grad is not None


def test_another_stream_draws_for_itself(passes, monkeypatch) -> None:
    model, x = make_model(), make_image()
    streams = iter([1, 2, 1, 1])
    monkeypatch.setattr(group_module, "_stream", lambda device: next(streams))
    with fb.grouped(model, seed=1):
        hidden = model[0](x)
        got = model[1](hidden)  # nobody has made stream 2 wait for the draw
        model[4](model[3](got.flatten(1)))
    assert passes == [6]
    assert_same(got, model[1](hidden, seed=noise.derive(1, 1)))


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_frozen_or_trained_between_draw_and_call(trained: bool) -> None:
    model, x = make_model(), make_image()
    model[1].requires_grad_(not trained)
    with fb.grouped(model):
        hidden = model[0](x)
        model[1].requires_grad_(trained)
        model[1](hidden).sum().backward()
    assert all((p.grad is not None) == trained for p in model[1].parameters())


def test_threads_pass_each_by_itself() -> None:
    model, x = Skipping(), torch.eye(4)
    failures = []

    def train() -> None:
        try:
            for _ in range(40):
                model(x).sum().backward()
        except RuntimeError as error:
            failures.append(error)

    with fb.grouped(model):
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_losses_of_their_own_have_backward_passes_of_their_own() -> None:
    """Two heads of one group: the second backward comes to a node that has been there before."""
    torch.manual_seed(0)
    model, x = nn.ModuleList([fb.BayesLinear(4, 4), fb.BayesLinear(4, 1)]), torch.eye(4)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        for loss in [head(x).square().sum() for head in model]:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with fb.fixed_sample(model, 5):
        alone = run()
    with fb.grouped(model, seed=5):
        together = run()
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_step_between_the_draw_and_its_backward_is_refused() -> None:
    model, x = nn.ModuleList([fb.BayesLinear(4, 4), fb.BayesLinear(4, 1)]), torch.eye(4)
    with fb.grouped(model, seed=5):
        loss = sum(head(x).square().sum() for head in model)
    with torch.no_grad():
        model[0].weight_rho.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()
