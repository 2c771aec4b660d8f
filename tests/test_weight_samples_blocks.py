"""Blocks of ``weight_samples``: what belongs to one, and what does not."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import contexts, models
from fastbconv.testing import assert_same

DRAWS = 3
MODULE = importlib.import_module("fastbconv.weight_samples")  # fb.weight_samples is the function


class Block(nn.Module):
    """A forward of one's own, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = fb.BayesConv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = fb.BayesLinear(3, 4, bayesian_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.norm(self.body(x))).mean((2, 3)))


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _settings(model: nn.Module) -> list[object]:
    hooks = [module._forward_pre_hooks for module in model.modules()]
    return [layer._fb_context for layer in models.bayesian_layers(model)] + [*filter(None, hooks)]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "prune": lambda model: fb.prune(model, 0.0)[0],
    "to_deterministic": fb.to_deterministic,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_made_inside_a_block_belongs_to_none(name: str) -> None:
    """Copied hooks repeated rows, and refused batch norm that trains, for ever."""
    model, x = Block().eval(), _image()
    with fb.weight_samples(model, DRAWS):
        made = COPIES[name](model)
        assert made(x).shape == (2, 4)
        assert model(x).shape == (2 * DRAWS, 4)
    assert made.train()(x).shape == (2, 4)
    if name != "to_deterministic":
        with fb.weight_samples(made.eval(), DRAWS):
            assert made(x).shape == (2 * DRAWS, 4)


def test_of_two_threads_one_gets_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked before either had put its frames there."""
    model = Block()
    locked: list[bool] = []
    outcomes: list[str] = []
    looks, barrier = MODULE._num_samples, threading.Barrier(2, timeout=60)

    def look(layer: nn.Module) -> int | None:
        locked.append(contexts._LOCK.locked())
        return looks(layer)

    def work() -> None:
        barrier.wait()
        try:
            with fb.weight_samples(model, DRAWS):
                outcomes.append("block")
                barrier.wait()
        except ValueError:
            outcomes.append("error")
            barrier.wait()

    monkeypatch.setattr(MODULE, "_num_samples", look)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["block", "error"]
    assert locked
    assert all(locked)
    assert _settings(model) == [None, None]


def test_the_module_before_which_rows_are_repeated_repeats_them_by_itself() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), Block()).eval(), _image()
    with torch.no_grad(), fb.fixed_sample(model, 1), fb.weight_samples(model, DRAWS):
        assert_same(model[1](model[0](x)), model(x))
