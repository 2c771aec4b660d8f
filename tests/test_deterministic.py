"""to_deterministic: the inverse of convert, and activations that layers have fused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import resnet18, small
from torch import nn

import fastbconv as fb
from fastbconv.testing import assert_close, assert_same


def test_resnet18_round_trip_is_bit_for_bit() -> None:
    model, x = resnet18(), torch.randn(2, 3, 32, 32)
    back = fb.to_deterministic(fb.convert(model, init="moped", bayesian_bias=True))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert repr(back) == repr(model)
    with torch.no_grad():
        assert_same(back(x), model(x))
    assert list(back.state_dict()) == list(model.state_dict())
    back.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(back.state_dict(), strict=True)
    for one, other in zip(back.modules(), model.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()


def test_in_place_and_as_a_copy() -> None:
    model = fb.convert(small())
    back = fb.to_deterministic(model)
    assert type(model[0]) is fb.BayesConv2d
    assert type(back[0]) is nn.Conv2d
    layer = model[0]
    assert fb.to_deterministic(model, inplace=True) is model
    assert model[0] is layer
    assert type(layer) is nn.Conv2d


def test_a_trained_model_exports_its_means() -> None:
    model, x = fb.convert(small()), torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    (model(x).square().mean() + fb.kl_loss(model, 100)).backward()
    optimizer.step()
    model.eval()
    back = fb.to_deterministic(model)
    with torch.no_grad(), fb.mean_weights(model):
        assert_close(back(x), model(x), 1e-5, 1e-5)
    program = torch.export.export(back, (x,))
    assert_close(program.module()(x), back(x), 1e-6, 1e-6)
    assert not any("fastbconv" in str(node.target) for node in program.graph.nodes)


def test_priors_options_and_contexts_are_gone() -> None:
    scale = nn.Parameter(torch.ones(()))
    layer = fb.BayesLinear(4, 3, prior=(torch.zeros(3, 4), scale), estimator="local")
    back = fb.to_deterministic(layer)
    assert set(back.state_dict()) == {"weight", "bias"}
    assert vars(back).keys() == vars(nn.Linear(4, 3)).keys()

    class Prior(nn.Module):
        def forward(self) -> torch.distributions.Distribution:
            return torch.distributions.Normal(0.0, 1.0)

    back = fb.to_deterministic(fb.BayesConv2d(3, 4, 3, prior=Prior()))
    assert list(back.children()) == []
    assert vars(back).keys() == vars(nn.Conv2d(3, 4, 3)).keys()


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu", nn.ReLU()),
        ("relu6", nn.ReLU6()),
        ("leaky_relu", nn.LeakyReLU(0.01)),
        (nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
        ("elu", nn.ELU()),
        ("selu", nn.SELU()),
        ("sigmoid", nn.Sigmoid()),
        (torch.tanh, nn.Tanh()),
        ("softplus", nn.Softplus()),
        ("softsign", nn.Softsign()),
        ("hard_sigmoid", nn.Hardsigmoid()),
        ("swish", nn.SiLU()),
        ("mish", nn.Mish()),
        (F.gelu, nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("softmax", nn.Softmax(-3)),
        ("log_softmax", nn.LogSoftmax(-3)),
        (nn.PReLU(4), nn.PReLU(4)),
    ],
)
def test_a_fused_activation_becomes_a_module(activation, expected: nn.Module) -> None:
    model = nn.Sequential(fb.BayesConv2d(3, 4, 3, activation=activation), nn.Flatten()).eval()
    x = torch.randn(2, 3, 5, 5)
    back = fb.to_deterministic(model)
    assert [type(m) for m in back[0]] == [nn.Conv2d, type(expected)]
    assert repr(back[0][1]) == repr(expected)
    assert not back[0].training
    assert sorted(back.state_dict())[:2] == ["0.0.bias", "0.0.weight"]
    with torch.no_grad(), fb.mean_weights(model):
        assert_close(back(x), model(x), 1e-5, 1e-5)


def test_a_shared_layer_with_an_activation_stays_shared() -> None:
    layer = fb.BayesLinear(4, 4, activation="relu")
    back = fb.to_deterministic(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Tanh())}))
    assert back["a"] is back["b"][0]
    single = fb.to_deterministic(layer, inplace=True)
    assert single is layer
    assert [type(m) for m in single] == [nn.Linear, nn.ReLU]
    assert list(single.state_dict()) == ["0.weight", "0.bias"]


class Ordered(nn.Module):
    """Calls its layers through a list that registers nothing, and one of them through a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a = fb.BayesConv2d(3, 3, 3, padding=1, activation="relu")
        self.b = fb.BayesConv2d(3, 3, 3, padding=1, activation=nn.PReLU(3))
        self.order, self.last = [self.a, self.b], (self.a,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            x = layer(x)
        return self.last[0](x)


@pytest.mark.parametrize("inplace", [False, True])
def test_references_that_no_module_knows_have_the_activation(inplace: bool) -> None:
    model, x = Ordered(), torch.randn(2, 3, 5, 5)
    with torch.no_grad(), fb.mean_weights(model):
        expected = model(x)
    assert (expected == 0).any()  # relu is the last of them
    back = fb.to_deterministic(model, inplace=inplace)
    assert back.order == [back.a, back.b]
    assert back.last == (back.a,)
    assert list(back.state_dict()) == [
        *("a.0.weight", "a.0.bias", "b.0.weight", "b.0.bias", "b.1.weight")
    ]
    with torch.no_grad():
        assert_close(back(x), expected, 1e-5, 1e-5)
    assert vars(back.a).keys() == vars(nn.Sequential(nn.ReLU())).keys()
    assert vars(back.a[0]).keys() == vars(nn.Conv2d(3, 3, 3)).keys()


def test_what_belongs_to_a_layer_goes_inside() -> None:
    layer, x = fb.BayesLinear(3, 3, activation="relu").eval(), torch.randn(4, 3)
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer.tag = "of the user"
    weight = layer.weight
    fb.to_deterministic(layer, inplace=True)
    inner = layer[0]
    assert (inner.weight is weight, inner.tag) == (True, "of the user")
    assert not any(module.training for module in layer.modules())
    output = layer(x)
    assert (seen[0] < 0).any()  # before the activation
    assert torch.equal(seen.pop(0).relu(), output)
    layer.load_state_dict(layer.state_dict())
    assert seen.pop() is inner
    handle.remove()
    layer(x)
    assert seen == []
    assert repr(copy.deepcopy(layer)) == repr(layer)


def test_a_compiled_layer_stays_compiled() -> None:
    layer, x = fb.BayesLinear(3, 3, activation="relu"), torch.randn(4, 3)
    layer.compile(backend="eager")
    assert type(copy.deepcopy(layer)) is fb.BayesLinear  # without what is compiled
    with fb.mean_weights(layer):
        expected = layer(x)
    fb.to_deterministic(layer, inplace=True)
    assert_close(layer(x), expected, 1e-5, 1e-5)


def test_a_linear_activation_is_none() -> None:
    assert type(fb.to_deterministic(fb.BayesLinear(4, 4, activation="linear"))) is nn.Linear


class OwnLinear(fb.BayesLinear):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: fb.BayesConv2d(3, 4, 3, padding=((1, 0), (1, 1))),
            ValueError,
            r"padding: expected equal sides, .* got \(\(1, 0\), \(1, 1\)\) in '1'",
        ),
        (
            lambda: fb.BayesConv2d(3, 4, 3, padding="same", stride=2),
            ValueError,
            r"padding='same' is not supported for strided convolutions \(in torch.nn, for '1'\)",
        ),
        (
            lambda: fb.BayesLinear(3, 4, activation=lambda z: z * 2),
            ValueError,
            r"activation: expected one that torch.nn has .* in '1'; give the layer a module",
        ),
        (lambda: fb.BayesLinear(3, 4, activation="exponential"), ValueError, "got 'exponential'"),
        (lambda: OwnLinear(3, 4), NotImplementedError, r"got '1' \(OwnLinear\).*mean_weights"),
        (
            lambda: fb.build(fb.Convolution2DReparameterization(4, 3), (1, 4, 4, 3)),
            NotImplementedError,
            r"got '1' \(Convolution2DReparameterization\)",
        ),
        (
            lambda: fb.Convolution2DReparameterization(4, 3),
            ValueError,
            r"expected initialised parameters, got '1' .* call fastbconv.build",
        ),
    ],
)
def test_what_torch_nn_cannot_express_is_refused(make, error, message: str) -> None:
    model = nn.Sequential(fb.BayesLinear(3, 3), make())
    with pytest.raises(error, match=message):
        fb.to_deterministic(model, inplace=True)
    assert type(model[0]) is fb.BayesLinear


def test_other_models_come_back_as_they_are() -> None:
    model = small()
    assert repr(fb.to_deterministic(model)) == repr(model)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType"):
        fb.to_deterministic(None)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own modules
def test_onnx(tmp_path: Path) -> None:
    """The means leave PyTorch: the exported file computes what the model computes."""
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model = nn.Sequential(
        fb.BayesConv2d(3, 4, 3, stride=2, padding=1, activation="relu"),
        nn.Flatten(),
        fb.BayesLinear(64, 5, bayesian_bias=True),
    )
    plain, images = fb.to_deterministic(model).eval(), torch.randn(2, 3, 8, 8)
    path = tmp_path / "model.onnx"
    torch.onnx.export(plain, (images,), path, dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(load(path))
    (got,) = evaluator.run(None, {evaluator.input_names[0]: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), plain(images))
