"""Bad input: the exact exception class, and a message that names what was expected and given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import distributions, nn

import fastbconv as fb
from fastbconv import noise

X = torch.zeros(4, 6, 8, 8)
W = torch.zeros(4, 6, 3, 3)
B = torch.zeros(4)


def conv(*arguments: object, **options: object) -> object:
    """bayes_conv2d with good defaults for what is not given."""
    names = ("input", "weight", "weight_rho", "bias", "bias_rho")
    values = {"input": X, "weight": W, "weight_rho": W, **dict(zip(names, arguments, strict=False))}
    return fb.functional.bayes_conv2d(**{**values, **options})


def linear(**options: object) -> object:
    """bayes_linear with good defaults."""
    good = {"input": torch.zeros(4, 6), "weight": torch.zeros(3, 6), "weight_rho": None}
    return fb.functional.bayes_linear(**{**good, **options})


def transposed(**options: object) -> object:
    """bayes_conv_transpose2d with good defaults: 4 channels, 6 filters for each group."""
    good = {"input": X[:, :4], "weight": W, "weight_rho": W}
    return fb.functional.bayes_conv_transpose2d(**{**good, **options})


def direct(call: Callable[[], object]) -> object:
    """A call with our kernels asked for."""
    with fb.algorithm("direct"):
        return call()


def layer(**options: object) -> object:
    """A layer with good defaults."""
    return fb.BayesConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


CASES = {
    "element offset alone": (
        lambda: conv(element_offset=3),
        TypeError,
        ["element_offset", "pair", "int: 3"],
    ),
    "element offset length": (
        lambda: linear(element_offset=(1, 2, 3)),
        ValueError,
        ["element_offset", "pair", "(1, 2, 3)"],
    ),
    "element offset negative": (
        lambda: conv(element_offset=(0, -1)),
        ValueError,
        ["element_offset", "non-negative", "-1"],
    ),
    "element offset of draws": (
        lambda: fb.functional.sample_posterior(B, B, seed=0, element_offset=(0, 1)),
        TypeError,
        ["element_offset", "integer", "(0, 1)"],
    ),
    "sparse input": (
        lambda: linear(input=torch.zeros(4, 6).to_sparse()),
        TypeError,
        ["input", "dense", "torch.sparse_coo", "to_dense"],
    ),
    "sparse input of a layer": (
        lambda: fb.BayesLinear(6, 3)(torch.zeros(4, 6).to_sparse()),
        TypeError,
        ["input", "dense", "torch.sparse_coo", "to_dense"],
    ),
    # shapes
    "input rank": (lambda: conv(X[0, 0]), ValueError, ["input", "(N, C, H, W)", "(8, 8)"]),
    "input channels": (lambda: conv(X[:, :5]), ValueError, ["input", "6 channels", "got 5"]),
    "no channels": (lambda: conv(X[:, :0]), ValueError, ["input", "6 channels", "got 0"]),
    "weight rank": (lambda: conv(X, W[0]), ValueError, ["weight", "(6, 3, 3)"]),
    "empty weight": (
        lambda: conv(X[:, :0], W[:, :0], None),
        ValueError,
        ["weight", "no empty dimension", "(4, 0, 3, 3)"],
    ),
    "rho shape": (
        lambda: conv(X, W, W[:2]),
        ValueError,
        ["weight_rho", "(4, 6, 3, 3)", "(2, 6, 3, 3)"],
    ),
    "bias shape": (lambda: conv(X, W, W, B[:3]), ValueError, ["bias", "(4,)", "(3,)"]),
    "bias rho shape": (lambda: conv(X, W, W, B, B[:3]), ValueError, ["bias_rho", "(4,)", "(3,)"]),
    "bias rho alone": (lambda: conv(X, W, W, None, B), ValueError, ["bias_rho", "None", "tensor"]),
    "input too small": (
        lambda: conv(X[..., :1, :1]),
        ValueError,
        ["input", "at least 2", "got 1"],
    ),
    "linear input": (
        lambda: linear(input=torch.zeros(4, 5)),
        ValueError,
        ["input", "(..., 6)", "(4, 5)"],
    ),
    "linear weight": (lambda: linear(weight=W), ValueError, ["weight", "(4, 6, 3, 3)"]),
    # types and dtypes
    "input list": (lambda: conv([1.0]), TypeError, ["input", "tensor", "list"]),
    "integer input": (lambda: conv(X.long()), TypeError, ["input", "float32", "int64"]),
    "integer weight": (lambda: conv(X, W.int(), None), TypeError, ["weight", "float32", "int32"]),
    "double weight": (
        lambda: conv(X, W.double(), None),
        TypeError,
        ["weight", "float32", "float64", "module.to"],
    ),
    "double input": (
        lambda: conv(X.double()),
        TypeError,
        ["weight", "float64", "got torch.float32"],
    ),
    "rho dtype": (lambda: conv(X, W, W.double()), TypeError, ["weight_rho", "float32", "float64"]),
    "bias dtype": (lambda: conv(X, W, W, B.double()), TypeError, ["bias", "float32", "float64"]),
    "device": (
        lambda: conv(X, W.to("meta"), None),
        ValueError,
        ["weight", "device cpu", "got meta"],
    ),
    # hyperparameters
    "stride zero": (lambda: conv(stride=0), ValueError, ["stride", "positive", "got 0"]),
    "stride float": (lambda: conv(stride=1.5), TypeError, ["stride", "integer", "float", "1.5"]),
    "stride triple": (lambda: conv(stride=(1, 1, 1)), ValueError, ["stride", "pair", "(1, 1, 1)"]),
    "dilation": (lambda: conv(dilation=(1, -2)), ValueError, ["dilation", "positive", "-2"]),
    "padding negative": (lambda: conv(padding=-1), ValueError, ["padding", "non-negative", "-1"]),
    "padding name": (lambda: conv(padding="full"), ValueError, ["padding", "'same'", "'full'"]),
    "padding sides": (
        lambda: conv(padding=((1, 1), (1,))),
        ValueError,
        ["padding", "((top, bottom), (left, right))", "(1,)"],
    ),
    "groups": (lambda: conv(X[:, :3], W[:, :1], None, groups=3), ValueError, ["groups", "4", "3"]),
    "groups zero": (lambda: conv(groups=0), ValueError, ["groups", "positive", "0"]),
    "num_samples": (
        lambda: conv(num_samples=3),
        ValueError,
        ["num_samples", "divisor of the 4", "got 3", "share_input"],
    ),
    "num_samples zero": (lambda: conv(num_samples=0), ValueError, ["num_samples", "positive", "0"]),
    "num_samples without batch": (
        lambda: conv(X[0], num_samples=2),
        ValueError,
        ["num_samples", "expected 1", "2"],
    ),
    "activation name": (
        lambda: conv(activation="rellu"),
        ValueError,
        ["activation", "relu6", "'rellu'"],
    ),
    "activation class": (
        lambda: layer(activation=nn.ReLU),
        TypeError,
        ["activation", "a module", "class ReLU", "give an instance: ReLU()"],
    ),
    "activation class of the TFP face": (
        lambda: fb.DenseReparameterization(3, activation=nn.GELU),
        TypeError,
        ["activation", "a module", "class GELU", "give an instance: GELU()"],
    ),
    "activation type": (lambda: conv(activation=3), TypeError, ["activation", "callable", "int"]),
    "scale floor": (lambda: conv(scale_floor=0.0), ValueError, ["scale_floor", "positive", "0.0"]),
    # seeds
    "seed type": (lambda: conv(seed=1.0), TypeError, ["seed", "int64", "float"]),
    "seed bool": (lambda: conv(seed=True), TypeError, ["seed", "int64", "bool"]),
    "seed dtype": (lambda: conv(seed=torch.zeros(2)), TypeError, ["seed", "int64", "float32"]),
    "seed shape": (
        lambda: conv(seed=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        ["seed", "(2,)", "(3,)"],
    ),
    "seed size": (lambda: conv(seed=2**64), ValueError, ["seed", "64 bits", str(2**64)]),
    "seed and generator": (
        lambda: conv(seed=1, generator=torch.Generator()),
        ValueError,
        ["generator", "None", "a generator"],
    ),
    "derive": (lambda: noise.derive(1, -1), ValueError, ["index", "non-negative", "-1"]),
    "stream": (
        lambda: noise.standard_normal(1, 4, stream="noise"),
        ValueError,
        ["stream", "'weight'", "'noise'"],
    ),
    "counter": (
        lambda: noise.philox4x32_10(torch.zeros(3).long(), torch.zeros(2).long()),
        ValueError,
        ["counter", "(..., 4)", "(3,)"],
    ),
    "key dtype": (
        lambda: noise.philox4x32_10(torch.zeros(4).long(), torch.zeros(2)),
        TypeError,
        ["key", "int64", "float32"],
    ),
    # priors
    "prior type": (lambda: conv(prior=1.0), TypeError, ["prior", "pair", "float"]),
    "prior length": (lambda: conv(prior=(0.0,)), ValueError, ["prior", "pair", "1 values"]),
    "prior scale": (lambda: conv(prior=(0.0, 0.0)), ValueError, ["prior scale", "positive", "0.0"]),
    "prior loc": (
        lambda: conv(prior=(float("nan"), 1.0)),
        ValueError,
        ["prior loc", "finite", "nan"],
    ),
    "prior name": (lambda: conv(prior=("a", 1.0)), TypeError, ["prior loc", "float", "str"]),
    "prior object": (
        lambda: conv(prior=distributions.Normal(0.0, 1.0)),
        TypeError,
        ["prior", "lambda: Normal", "Normal object"],
    ),
    "prior result": (
        lambda: conv(prior=lambda: 3, return_kl=True),
        TypeError,
        ["prior", "Distribution", "int"],
    ),
    "prior shape": (
        lambda: conv(prior=(torch.zeros(5), 1.0), return_kl=True),
        ValueError,
        ["prior loc", "(4, 6, 3, 3)", "(5,)"],
    ),
    "prior integer": (
        lambda: conv(prior=(torch.zeros(1).long(), 1.0)),
        TypeError,
        ["prior loc", "floating-point", "int64"],
    ),
    "mixture": (lambda: fb.ScaleMixture(1.0, 1.0, 0.1), ValueError, ["pi", "between", "1.0"]),
    "mixture scale": (
        lambda: fb.ScaleMixture(0.5, 1.0, 0.0),
        ValueError,
        ["s2", "positive", "0.0"],
    ),
    "mixture infinite": (
        lambda: fb.ScaleMixture(0.5, float("inf"), 1.0),
        ValueError,
        ["s1", "positive finite", "inf"],
    ),
    "mixture trained": (  # it was neither registered, nor moved, nor saved
        lambda: fb.ScaleMixture(0.5, nn.Parameter(torch.ones(())), 1.0),
        TypeError,
        ["s1", "number", "Parameter", "nn.Module"],
    ),
    "closed form": (
        lambda: fb.functional.kl_normal(W, W, fb.ScaleMixture(0.5, 1.0, 0.1)),
        NotImplementedError,
        ["prior", "(loc, scale)", "ScaleMixture", "return_kl"],
    ),
    # layers
    "channels": (lambda: layer(in_channels=0), ValueError, ["in_channels", "positive", "0"]),
    "channels float": (
        lambda: layer(out_channels=4.0),
        TypeError,
        ["out_channels", "integer", "float"],
    ),
    "layer groups": (lambda: layer(groups=3), ValueError, ["groups", "in_channels = 4", "3"]),
    "kernel size": (lambda: layer(kernel_size=0), ValueError, ["kernel_size", "positive", "0"]),
    "padding mode": (
        lambda: layer(padding_mode="edge"),
        ValueError,
        ["padding_mode", "reflect", "'edge'"],
    ),
    "layer dtype": (lambda: layer(dtype=torch.int8), TypeError, ["dtype", "bfloat16", "int8"]),
    "estimator name": (
        lambda: layer(estimator="vi"),
        ValueError,
        ["estimator", "'reparameterization'", "'flipout'", "'local'", "'vi'"],
    ),
    "eval mode": (lambda: layer(eval_mode="map"), ValueError, ["eval_mode", "'mean'", "'map'"]),
    "bayesian bias": (
        lambda: layer(bias=False, bayesian_bias=True),
        ValueError,
        ["bayesian_bias", "False", "True"],
    ),
    "layer activation": (lambda: layer(activation="x"), ValueError, ["activation", "relu", "'x'"]),
    "layer prior": (
        lambda: layer(prior=(0.0, torch.tensor(-1.0))),
        ValueError,
        ["prior scale", "positive", "-1.0"],
    ),
    "layer prior shape": (
        lambda: layer(prior=(torch.zeros(3), 1.0), bayesian_bias=True),
        ValueError,
        ["prior loc", "one element", "(3,)"],
    ),
    "features": (
        lambda: fb.BayesLinear(0, 3),
        ValueError,
        ["in_features", "positive integer", "0"],
    ),
    "layer rank": (
        lambda: fb.BayesConv3d(4, 4, (3, 3)),
        ValueError,
        ["kernel_size", "3 of them", "(3, 3)"],
    ),
    "layer padding sides": (
        lambda: fb.BayesConv1d(4, 4, 3, padding=((1, 0), (1, 0))),
        ValueError,
        ["padding", "((left, right),)", "((1, 0), (1, 0))"],
    ),
    "padded input rank": (
        lambda: fb.BayesConv1d(4, 4, 3, padding=1, padding_mode="reflect")(X),
        ValueError,
        ["input", "(N, C, L) or (C, L)", "(4, 6, 8, 8)"],
    ),
    # transposed convolutions
    "transposed weight rank": (
        lambda: transposed(weight=W[0], weight_rho=None),
        ValueError,
        ["weight", "(C, K / groups, R, S)", "(6, 3, 3)"],
    ),
    "transposed channels": (lambda: transposed(input=X), ValueError, ["input", "4 channels", "6"]),
    "transposed groups": (
        lambda: transposed(groups=3),
        ValueError,
        ["groups", "4 input channels", "3"],
    ),
    "transposed bias": (
        lambda: transposed(bias=B, groups=2),
        ValueError,
        ["bias", "(12,)", "(4,)"],
    ),
    "transposed padding": (
        lambda: transposed(padding="same"),
        TypeError,
        ["padding", "integer", "'same'"],
    ),
    "transposed padding of everything": (
        lambda: transposed(padding=5),
        ValueError,
        ["padding", "leaves an output", "(5, 5)", "(0, 0)"],
    ),
    "output padding": (
        lambda: transposed(stride=2, output_padding=(1, 2)),
        ValueError,
        ["output_padding", "at most 1", "got 2"],
    ),
    "transposed pixels": (
        lambda: transposed(input=X[:, :4, :0]),
        ValueError,
        ["input", "pixels", "(4, 4, 0, 8)"],
    ),
    "transposed padding mode": (
        lambda: fb.BayesConvTranspose2d(4, 4, 3, padding_mode="reflect"),
        ValueError,
        ["padding_mode", "'zeros'", "'reflect'"],
    ),
    "transposed kernel": (
        lambda: direct(transposed),
        NotImplementedError,
        ["algorithm", "'library'", "transposed", "'direct'"],
    ),
    # models
    "beta": (lambda: fb.kl_loss(nn.Linear(1, 1), 1, -1), ValueError, ["beta", "at least 0", "-1"]),
    "beta type": (lambda: fb.kl_loss(nn.Linear(1, 1), 1, "x"), TypeError, ["beta", "number", "x"]),
    "n_data": (lambda: fb.kl_loss(nn.Linear(1, 1), 0), ValueError, ["n_data", "positive", "0"]),
    "build": (lambda: fb.build(nn.Linear(1, 1), (-1, 1)), ValueError, ["input_shape", "(-1, 1)"]),
    "algorithm": (lambda: fb.algorithm("fast"), ValueError, ["algorithm", "winograd2", "'fast'"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    function, kind, fragments = CASES[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011  the exact class is compared below
        function()
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert "expected" in message
    assert "got" in message
    for fragment in fragments:
        assert fragment in message, message


def test_a_generator_under_compile_raises_with_advice() -> None:
    generator = torch.Generator()

    @torch.compile(fullgraph=True, backend="eager")
    def run(x: torch.Tensor) -> torch.Tensor:
        return fb.functional.bayes_conv2d(x, W, W, generator=generator)

    with pytest.raises(Exception, match="draw the seed outside"):  # dynamo wraps it
        run(X)


def test_the_algorithm_survives_an_error() -> None:
    for function, _, _ in CASES.values():
        with pytest.raises((ValueError, TypeError, NotImplementedError)):
            function()
    assert fb.selection.CHOICE.name == "auto"
