"""One battery for every layer of both faces: gradients, operators, threads, copies, state, compile.

What is asked here of one layer is asked of all; what is particular to a layer has its own file.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tfp_layers
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastbconv as fb
from fastbconv import estimators

SEED = torch.tensor([0x243F6A8885A308D3, 7])
Made = tuple[nn.Module, Tensor]


# Arguments and shape of the input.
SAME = {"kernel_size": 2, "padding": "same", "stride": 2}
TORCH_FACE: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "BayesLinear": ({}, (5, 3)),
    "BayesConv1d": (SAME, (3, 3, 7)),
    "BayesConv2d": (SAME, (3, 3, 6, 5)),
    "BayesConv3d": (SAME, (2, 3, 4, 3, 5)),
    "BayesConvTranspose2d": (
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        (3, 3, 4, 3),
    ),
}


def _tfp_layer(name: str, dtype: torch.dtype, activation: str) -> Made:
    return tfp_layers.built(name, dtype=dtype, activation=activation, **tfp_layers.RANDOM_BIAS)


def _torch_layer(kind: str, estimator: str, dtype: torch.dtype, activation: str) -> Made:
    options = {"bayesian_bias": True, "activation": activation, "dtype": dtype}
    arguments, shape = TORCH_FACE[kind]
    layer = getattr(fb, kind)(3, 4, estimator=estimator, **arguments, **options)
    return layer, torch.randn(shape, dtype=dtype)


def _makers() -> dict[str, Callable[[torch.dtype, str], Made]]:
    made: dict[str, Callable[[torch.dtype, str], Made]] = {}
    for name in tfp_layers.NAMES:
        made[name] = functools.partial(_tfp_layer, name)
    for kind in TORCH_FACE:
        for estimator in estimators.ESTIMATOR_ID:
            made[f"{kind}-{estimator}"] = functools.partial(_torch_layer, kind, estimator)
    return made


MAKERS = _makers()
# Layers whose convolution is the library's.
COMPOSED = {name for name in MAKERS if "3d" in name.lower() or "Transpose" in name}
each_layer = pytest.mark.parametrize("name", MAKERS)


def make(name: str, dtype: torch.dtype = torch.float32, activation: str = "relu") -> Made:
    """A layer whose noise matters, and an input."""
    torch.manual_seed(1)
    layer, x = MAKERS[name](dtype, activation)
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith(("rho", "untransformed_scale")):
                parameter.add_(1.5)
    return layer, x


def step(layer: nn.Module, x: Tensor, seed: Tensor = SEED) -> dict[str, Tensor]:
    """Output, KL and every gradient of one training step."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    output, kl = layer(x, seed=seed), layer.kl_loss()
    (output.square().sum() + 0.1 * kl).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"output": output.detach(), "kl": kl.detach(), "input": x.grad, **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


@each_layer
def test_gradcheck(name: str) -> None:
    """Every derivative of output and KL, of the whole layer, in float64."""
    torch.set_num_threads(1)
    layer, x = make(name, torch.float64, "tanh")
    names = [parameter_name for parameter_name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def function(image: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(names, parameters, strict=True))
        output = torch.func.functional_call(layer, own, (image,), {"seed": SEED})
        with torch.nn.utils.stateless._reparametrize_module(layer, own):
            return output, layer.kl_loss()

    assert gradcheck(function, (x.requires_grad_(), *values))


class _Recorder(TorchDispatchMode):
    """The calls of our operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastbconv":
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@each_layer
def test_opcheck_of_its_operators(name: str) -> None:
    layer, x = make(name)
    with _Recorder() as recorder:
        step(layer, x)
    used = {func.__name__.split(".")[0] for func, _, _ in recorder.calls}
    assert used, "a layer without an operator of ours"
    for func, args, kwargs in recorder.calls:
        # Leaves; a backward operator has no derivative of its own.
        trained = not func.__name__.split(".")[0].endswith("_backward")
        args, kwargs = tree_map_only(
            Tensor,
            lambda t, on=trained: t.detach().requires_grad_(on and t.requires_grad),
            (args, kwargs),
        )
        torch.library.opcheck(func, args, kwargs)


@each_layer
def test_same_bits_for_any_number_of_threads_and_twice(name: str) -> None:
    """By our kernels; the library's convolution promises the same bits twice."""
    layer, x = make(name)
    with fb.algorithm("auto" if name in COMPOSED else "direct"):
        torch.set_num_threads(1)
        want = step(layer, x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = step(layer, x)
            assert_same(step(layer, x), got)
            if name not in COMPOSED:
                assert_same(got, want)


@each_layer
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name: str, how: str) -> None:
    layer, x = make(name)
    want = step(layer, x)  # also after a forward and a backward pass
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert_same(step(other, x), want)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert_same(step(layer, x), want)  # nothing is shared


@each_layer
def test_state_dict_round_trip(name: str) -> None:
    layer, x = make(name)
    want = step(layer, x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other, _ = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other.load_state_dict(state).missing_keys
    assert_same(step(other, x), want)
    keys = set(state)
    assert keys == {parameter_name for parameter_name, _ in layer.named_parameters()}


@each_layer
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()  # other tests have compiled the same forward for other layers
    layer, x = make(name)
    compiled = torch.compile(layer, fullgraph=True)
    for seed in (SEED, SEED + 1):
        got, drawn = compiled(x, seed=seed), layer(x, seed=seed)
        # The compiler may contract what is composed of PyTorch's operators.
        bound = 1e-6 if name in COMPOSED else 0.0
        assert (got - drawn).abs().max() <= bound * drawn.abs().max()
    want = step(layer, x)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    output = compiled(x, seed=SEED)
    (output.square().sum() + 0.1 * layer.kl_loss()).backward()
    for parameter_name, parameter in layer.named_parameters():
        error = (parameter.grad - want[parameter_name]).abs().max()
        assert error <= 1e-5 * want[parameter_name].abs().max(), parameter_name
    torch.manual_seed(3)
    drawn = layer(x)
    torch.manual_seed(3)
    assert torch.allclose(compiled(x), drawn, rtol=1e-5, atol=1e-6)  # the eager draw
