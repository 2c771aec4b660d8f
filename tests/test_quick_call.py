"""The short way of a layer's call: what the long way gives, and what is left to that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

import fastbconv as fb
from fastbconv import _quick
from fastbconv.layers import conv, linear

MODULES = (conv, linear)
SEED = torch.tensor([3, 4])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a layer: whether it went the short way."""
    seen: list[bool] = []

    def spy(*arguments: Any) -> Tensor | None:
        output = _quick.quick_call(*arguments)
        seen.append(output is not None)
        return output

    for module in MODULES:
        monkeypatch.setattr(module, "quick_call", spy)
    return seen


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def close() -> None:
        for module in MODULES:
            monkeypatch.setattr(module, "quick_call", lambda *_: None)

    return close


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: fb.BayesConv2d(4, 6, 3), (2, 4, 7, 5)),
    "conv1d": (lambda: fb.BayesConv1d(4, 6, 3, activation="relu"), (2, 4, 9)),
    "conv1d, options": (
        lambda: fb.BayesConv1d(
            *(4, 6, 3), stride=2, padding=((2, 1),), dilation=2, groups=2, bayesian_bias=True
        ),
        (3, 4, 11),
    ),
    "conv1d, same": (lambda: fb.BayesConv1d(1, 5, 4, padding="same", bias=False), (2, 1, 9)),
    "conv1d, pixels": (lambda: fb.BayesConv1d(1, 5, 1), (2, 1, 9)),
    "options": (
        lambda: fb.BayesConv2d(
            *(4, 6, 3),
            stride=2,
            padding=((1, 0), (2, 1)),
            dilation=2,
            groups=2,
            activation="silu",
            bayesian_bias=True,
            prior=(0.1, 0.5),
        ),
        (2, 4, 7, 5),
    ),
    "same": (lambda: fb.BayesConv2d(4, 6, (2, 3), padding="same", bias=False), (2, 4, 7, 5)),
    "leaky": (
        lambda: fb.BayesConv2d(4, 6, 1, activation=nn.LeakyReLU(0.3), prior=None),
        (2, 4, 7, 5),
    ),
    "float64": (lambda: fb.BayesConv2d(4, 6, 3, dtype=torch.float64), (2, 4, 7, 5)),
    "linear": (lambda: fb.BayesLinear(5, 3, activation="relu", bayesian_bias=True), (4, 5)),
    "linear without bias": (lambda: fb.BayesLinear(5, 3, bias=False), (4, 5)),
}


def _step(layer: nn.Module, input: Tensor, seed: Tensor | None, kl: bool) -> list[Tensor]:
    """Output, KL and gradients; and the generator afterwards, which shows what was drawn."""
    layer.zero_grad()
    input = input.clone().requires_grad_()
    torch.manual_seed(1)
    if kl:
        with fb.collect_kl(layer) as collected:
            output = layer(input, seed)
        total = collected.sum()
    else:
        output, total = layer(input, seed), torch.zeros(())
    (output.square().sum() + total).backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [output.detach(), total.detach(), input.grad, *grads, torch.get_rng_state()]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kl", [False, True], ids=["", "kl"])
@pytest.mark.parametrize("seed", [None, SEED], ids=["drawn", "given"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways_have_the_same_bits(
    name: str, seed: Tensor | None, kl: bool, autocast: bool, taken, long_way
) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    input = torch.randn(shape, dtype=layer.weight.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = _step(layer, input, seed, kl)
        long_way()
        expected = _step(layer, input, seed, kl)
    assert taken == [not (kl and layer.prior is None)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("choice", ["auto", "direct", "winograd2", "winograd2x4", "library"])
@pytest.mark.parametrize("keep_weight", [False, True])
def test_the_algorithm_is_obeyed(choice: str, keep_weight: bool, taken, long_way) -> None:
    layer, input = fb.BayesConv2d(16, 16, 3, padding=1), torch.randn(2, 16, 8, 8)
    with fb.algorithm(choice, keep_weight=keep_weight):
        got = _step(layer, input, SEED, False)
        long_way()
        expected = _step(layer, input, SEED, False)
    assert taken == [True]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_memory_formats(taken) -> None:
    layer = fb.BayesConv2d(4, 6, 3).to(memory_format=torch.channels_last)
    input = torch.randn(2, 4, 7, 5).to(memory_format=torch.channels_last)
    assert layer(input).is_contiguous(memory_format=torch.channels_last)
    assert layer(input.contiguous()).is_contiguous()
    assert layer(input[:, :, ::2]).shape == (2, 6, 2, 3)
    assert taken == [True] * 3


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.fixture
def layer() -> fb.BayesConv2d:
    torch.manual_seed(0)
    return fb.BayesConv2d(4, 6, 3)


INPUT = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))

LONG: dict[str, Callable[[fb.BayesConv2d], Tensor]] = {
    "an integer seed": lambda layer: layer(INPUT, 3),
    "a generator": lambda layer: layer(INPUT, generator=torch.Generator()),
    "several draws": lambda layer: layer(INPUT, num_samples=2),
    "a shared input": lambda layer: layer(INPUT, num_samples=2, share_input=True),
    "no batch": lambda layer: layer(INPUT[0]),
    "a subclass": lambda layer: layer(INPUT.as_subclass(Subclass)),
    "low precision": lambda layer: layer(INPUT.bfloat16()),
    "vmap": lambda layer: torch.vmap(layer, randomness="different")(INPUT[None]),
}


@pytest.mark.parametrize("name", LONG)
def test_other_calls_go_the_long_way(name: str, layer: fb.BayesConv2d, taken) -> None:
    assert torch.isfinite(LONG[name](layer)).all()
    assert not any(taken)


def _contexts(layer: nn.Module) -> Iterator[Any]:
    yield fb.mean_weights(layer)
    yield fb.fixed_sample(layer, 3)
    yield fb.grouped(layer)
    yield fb.algorithm("reference")
    yield Mode()


def test_contexts_go_the_long_way(layer: fb.BayesConv2d, taken) -> None:
    for context in _contexts(layer):
        with context:
            layer(INPUT)
    with fb.mean_weights(layer), fb.collect_kl(layer) as kl:
        layer(INPUT)
    assert torch.isfinite(kl.sum())
    assert taken == [False] * 6


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "channels": (torch.zeros(2, 3, 7, 5), ValueError, "input"),
    "dtype": (torch.zeros(2, 4, 7, 5, dtype=torch.float64), TypeError, "float"),
    "integers": (torch.zeros(2, 4, 7, 5, dtype=torch.int64), TypeError, "input"),
    "no tensor": ([[1.0]], TypeError, "input"),
    "dimensions": (torch.zeros(4, 7), ValueError, "input"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_the_long_way(name: str, layer, taken) -> None:
    input, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        layer(input)
    assert taken == [False]


@pytest.mark.parametrize("seed", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_a_seed_that_is_none(layer: fb.BayesConv2d, seed: Tensor, taken) -> None:
    with pytest.raises((ValueError, TypeError), match="seed"):
        layer(INPUT, seed)
    assert taken == [False]


def test_an_empty_output_is_the_long_ways(layer: fb.BayesConv2d, taken) -> None:
    assert layer(INPUT[:0]).shape == (0, 6, 5, 3)
    layer.dilation = (3, 3)
    layer(torch.zeros(1, 4, 7, 7))
    assert taken == [True, True]


def test_arguments_changed_after_a_call(layer: fb.BayesConv2d, taken, long_way) -> None:
    changes: list[Callable[[], Any]] = [
        lambda: setattr(layer, "stride", (2, 1)),
        lambda: setattr(layer, "padding", (1, 2)),
        lambda: setattr(layer, "activation", "relu"),
        lambda: setattr(layer, "dilation", (1, 2)),
        lambda: setattr(layer, "estimator", "flipout"),
        lambda: setattr(layer, "estimator", "reparameterization"),
        lambda: layer.double(),
        lambda: setattr(layer, "padding_mode", "reflect"),
    ]
    layer(INPUT, SEED)
    got = []
    for change in changes:
        change()
        got.append(layer(INPUT.to(layer.weight.dtype), SEED))
    assert taken == [True] * 5 + [False, True, True]  # reflected padding does not ask at all
    again = fb.BayesConv2d(4, 6, 3)
    again.load_state_dict(layer.state_dict())
    long_way()
    layer.padding_mode = "zeros"
    assert torch.equal(layer(INPUT.double(), SEED), got[-2])


def _doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2.0 * output


# Activation, what is done to it after a call, and whether the short way still serves it.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], bool]] = {
    "slope": (nn.LeakyReLU, lambda m: setattr(m, "negative_slope", 0.9), True),
    "alpha": (nn.ELU, lambda m: setattr(m, "alpha", 0.3), True),
    "approximate": (nn.GELU, lambda m: setattr(m, "approximate", "tanh"), True),
    "beta": (nn.Softplus, lambda m: setattr(m, "beta", 2), False),
    "hook": (nn.ReLU, lambda m: m.register_forward_hook(_doubled), False),
    "hook before": (nn.ReLU, lambda m: m.register_forward_pre_hook(lambda m, x: -x[0]), False),
    "hook of gradients": (
        nn.ReLU,
        lambda m: m.register_full_backward_pre_hook(lambda m, grads: [2.0 * g for g in grads]),
        False,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_changed_after_a_call(name: str, taken, long_way) -> None:
    make, change, still = CHANGES[name]
    layer = fb.BayesConv2d(4, 6, 3, activation=make())
    before = _step(layer, INPUT, SEED, False)
    change(layer.activation)
    got = _step(layer, INPUT, SEED, False)
    assert taken == [True, still]
    assert not torch.equal(got[2], before[2])
    long_way()
    for one, other in zip(got, _step(layer, INPUT, SEED, False), strict=True):
        assert torch.equal(one, other)


def test_parametrized_and_pruned_parameters(layer: fb.BayesConv2d, taken) -> None:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 0.5 * value

    expected = fb.functional.bayes_conv2d(
        INPUT, 0.5 * layer.weight, layer.weight_rho, layer.bias, seed=SEED
    )
    parametrize.register_parametrization(layer, "weight", Half())
    assert torch.equal(layer(INPUT, SEED), expected)
    parametrize.remove_parametrizations(layer, "weight")
    prune.l1_unstructured(layer, "bias", 0.5)
    masked = fb.functional.bayes_conv2d(
        INPUT, layer.weight, layer.weight_rho, layer.bias_orig * layer.bias_mask, seed=SEED
    )
    assert torch.equal(layer(INPUT, SEED), masked)
    assert taken == [False, False]


def test_other_priors(taken) -> None:
    """Their KL is the long way's; without a KL a prior does not matter."""
    for prior, expected in (
        ((torch.zeros(1), 1.0), [True, False]),
        (fb.ScaleMixture(0.5, 1.0, 0.1), [False, False]),
        (lambda: torch.distributions.Normal(0.0, 1.0), [False, False]),
    ):
        taken.clear()
        layer = fb.BayesConv2d(4, 6, 3, prior=prior)
        layer(INPUT)
        with fb.collect_kl(layer) as kl:
            layer(INPUT)
        assert torch.isfinite(kl.sum())
        assert taken == expected


def test_copies_after_a_call(layer: fb.BayesConv2d) -> None:
    expected = layer(INPUT, SEED)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(INPUT, SEED), expected)


def test_functional_call_takes_the_given_parameters(layer: fb.BayesConv2d, taken) -> None:
    doubled = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    got = torch.func.functional_call(layer, doubled, (INPUT, SEED))
    expected = fb.functional.bayes_conv2d(INPUT, *map(doubled.get, PARAMETERS), seed=SEED)
    assert torch.equal(got, expected)
    assert taken == [True]


PARAMETERS = ("weight", "weight_rho", "bias")


@pytest.mark.parametrize("change", ["weight_norm", "own"])
def test_a_layer_that_was_called_is_copied_whatever_its_class_does(change: str) -> None:
    """Parametrized, or with a __getstate__ of its own, it held a function that cannot be copied."""

    class Own(fb.BayesConv2d):
        def __getstate__(self) -> dict:
            return self.__dict__.copy()

    layer, x = Own(3, 4, 3), torch.randn(2, 3, 8, 8)
    seed = torch.tensor([3, 0])
    expected = layer(x, seed=seed)
    if change == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(layer)
        expected = layer(x, seed=seed)
    for found in (copy.deepcopy(layer), torch.optim.swa_utils.AveragedModel(layer).module):
        assert torch.equal(found(x, seed=seed), expected)
    assert pickle.loads(pickle.dumps(layer._prepared)) is None
