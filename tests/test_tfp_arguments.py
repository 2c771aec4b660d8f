"""Arguments and shapes of the TFP face, against what ``tfp.layers`` was recorded to accept."""

from __future__ import annotations

import builtins
import inspect
import json
import re
from typing import Any

import numpy as np
import pytest
import tfp_layers
import torch
from tfp_cases import FOLDER

import fastbconv
from fastbconv.layers import tfp, tfp_arguments

ERRORS = json.loads((FOLDER / "errors.json").read_text())
SHAPES = json.loads((FOLDER / "compute_output_shape.json").read_text())
STAGES = ("constructor", "build", "call", "second call")


def _deviation(row: dict[str, Any]) -> str | None:
    """Recorded behaviour that is deliberately not followed, with the reason."""
    args = row["args"]
    if args.get("filters") == 0:
        return "an empty output is never meant: filters must be positive"
    if args.get("dtype") == "bfloat16":
        return "bfloat16 works here"
    if args.get("dilation_rate") == 2 and "second_input_shape" in row:
        return "the size of the first input is not remembered"
    if row.get("input_shape", [1])[-1] == 0:
        return "a ValueError says more than a ZeroDivisionError"
    return None


def _case_id(row: dict[str, Any]) -> str:
    shapes = [row[key] for key in ("input_shape", "second_input_shape") if key in row]
    return f"{row['args']}-{shapes}-{row.get('input_dtype')}"


def _run(row: dict[str, Any], name: str) -> tuple[str, Exception] | None:
    """The stage of the first error, and the error."""
    stage = "constructor"
    try:
        layer = getattr(tfp, name)(**row["args"])
        if "input_dtype" not in row:
            stage = "build"
            layer.build(row["input_shape"])
            return None
        # An implicit build is part of the call.
        stage = "build" if row.get("stage") == "build" else "call"
        layer(torch.zeros(row["input_shape"], dtype=getattr(torch, row["input_dtype"])))
        if "second_input_shape" in row:
            stage = "second call"
            layer(torch.zeros(row["second_input_shape"]))
    except Exception as error:
        return stage, error
    return None


@pytest.mark.filterwarnings("ignore:training torch.bfloat16")
@pytest.mark.parametrize("estimator", tfp_layers.ESTIMATORS)
@pytest.mark.parametrize("row", ERRORS, ids=_case_id)
def test_recorded_errors(row: dict[str, Any], estimator: str) -> None:
    """The recorded exception class, at the recorded stage or an earlier one."""
    name = row["layer"].replace("Reparameterization", estimator)
    result = _run(row, name)
    if "seed" in row["args"] and estimator == "Flipout":
        assert result is None
        return
    if _deviation(row) is not None:
        assert result is None or isinstance(result[1], ValueError)
        return
    if row["outcome"] == "ok":
        assert result is None
        return
    assert result is not None
    stage, error = result
    assert STAGES.index(stage) <= STAGES.index(row["stage"])
    # TensorFlow's own classes derive from Exception only.
    assert isinstance(error, getattr(builtins, row["exception"], Exception))
    if "missing 1 required" not in str(error):
        assert "expected" in str(error)
        assert "got" in str(error) or "keywords" in str(error)


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "-".join(map(str, row.values())))
def test_recorded_output_shapes(row: dict[str, Any]) -> None:
    row = dict(row)
    expected, error = row.pop("output_shape", None), row.pop("error", None)
    input_shape = row.pop("input_shape")
    for estimator in tfp_layers.ESTIMATORS:
        layer = getattr(tfp, f"Convolution2D{estimator}")(**row)
        if error is not None:
            with pytest.raises(getattr(builtins, error), match="input_shape: expected"):
                layer.compute_output_shape(input_shape)
            continue
        for given in (input_shape, tuple(input_shape)):
            assert layer.compute_output_shape(given) == tuple(expected)
        if None not in input_shape:
            assert tuple(layer(torch.zeros(input_shape)).shape) == tuple(expected)


@pytest.mark.parametrize("name", ["Convolution1D", "Convolution3D"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_output_shapes_of_other_ranks(name: str, padding: str, strides: int, dilation: int) -> None:
    options = {"strides": strides, "padding": padding, "dilation_rate": dilation}
    for estimator in tfp_layers.ESTIMATORS:
        layer = getattr(tfp, name + estimator)(4, 2, **options)
        shape = (2, *(5, 6, 7)[: layer.rank], 3)
        out = [tfp_arguments.output_size(n, 2, strides, padding, dilation) for n in shape[1:-1]]
        assert layer.compute_output_shape(shape) == (2, *out, 4)
        assert layer(torch.zeros(shape)).shape == (2, *out, 4)
        assert layer.compute_output_shape((None, None, *shape[2:])) == (None, None, *out[1:], 4)
        with pytest.raises(IndexError, match=f"{layer.rank + 2} dimensions"):
            layer.compute_output_shape((1, *shape))


def test_output_shape_of_a_wrong_rank() -> None:
    layer = tfp.Convolution2DReparameterization(4, 3)
    with pytest.raises(ValueError, match="known rank"):
        layer.compute_output_shape(None)
    with pytest.raises(IndexError, match="4 dimensions, got 5"):
        layer.compute_output_shape((1, 2, 3, 4, 5))
    dense = tfp.DenseReparameterization(4)
    assert dense.compute_output_shape((None, 7, 3)) == (None, 7, 4)
    with pytest.raises(ValueError, match="known last entry"):
        dense.compute_output_shape((2, None))


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_documented_order_and_defaults(name: str) -> None:
    layer_class = getattr(tfp, name)
    parameters = inspect.signature(layer_class).parameters
    convolution = ["strides", "padding", "data_format", "dilation_rate"]
    names = ["units", "activation", "activity_regularizer", "trainable"]
    if layer_class.rank:
        names = ["filters", "kernel_size", *convolution, "activation", "activity_regularizer"]
    names += [
        "kernel_posterior_fn",
        "kernel_posterior_tensor_fn",
        "kernel_prior_fn",
        "kernel_divergence_fn",
        "bias_posterior_fn",
        "bias_posterior_tensor_fn",
        "bias_prior_fn",
        "bias_divergence_fn",
    ]
    seed = ["seed"] if name.endswith("Flipout") else []
    assert list(parameters) == [*names, *seed, "kwargs"]
    defaults = {name: p.default for name, p in parameters.items()}
    if layer_class.rank:
        ones = (1,) * layer_class.rank if layer_class.rank > 1 else 1
        assert [defaults[key] for key in convolution] == [ones, "valid", "channels_last", ones]
    else:
        assert defaults["trainable"] is True
    assert defaults["activation"] is defaults["activity_regularizer"] is None
    for part in ("kernel", "bias"):
        assert defaults[f"{part}_posterior_fn"].is_singular == (part == "bias")
        assert defaults[f"{part}_posterior_tensor_fn"] is tfp.posterior_sample
        assert defaults[f"{part}_divergence_fn"] is tfp.kl_divergence
    assert defaults["kernel_prior_fn"] is tfp.default_multivariate_normal_fn
    assert defaults["bias_prior_fn"] is None
    assert defaults.get("seed") is None
    values = [4, *[2] * (layer_class.rank > 0)]
    values += [defaults[key] for key in names[len(values) :]]
    layer = layer_class(*values, *([7] if seed else []))  # all of them by position
    assert getattr(layer, "seed", 7) == 7
    assert layer.get_config().keys() == tfp_layers.make(name).get_config().keys()


def test_a_subclass_has_its_own_signature() -> None:
    class Narrow(tfp.Convolution2DFlipout):
        def __init__(self, filters: int, **kwargs: Any) -> None:
            super().__init__(filters, 3, **kwargs)

    class Named(Narrow):
        """Inherits the constructor."""

    for layer_class in (Narrow, Named):
        assert list(inspect.signature(layer_class).parameters) == ["filters", "kwargs"]
        assert layer_class(2, seed=1).kernel_size == (3, 3)


def test_any_integral_type_is_accepted() -> None:
    layer = tfp.Convolution2DReparameterization(
        np.int64(4), np.array([3, 5]), strides=torch.tensor([1, 2]), dilation_rate=np.int32(1)
    )
    assert (layer.filters, layer.kernel_size, layer.strides) == (4, (3, 5), (1, 2))
    with pytest.raises(TypeError, match="bool"):
        tfp.Convolution2DReparameterization(4, True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, torch.float32),
        ("float64", torch.float64),
        (torch.float16, torch.float16),
        (np.float64, torch.float64),
        (np.dtype("float32"), torch.float32),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(given: Any, expected: torch.dtype) -> None:
    layer = tfp.Convolution2DReparameterization(2, 1, dtype=given)
    layer.build((None, 4, 4, 3))
    assert layer.dtype == expected
    assert {weight.dtype for weight in layer.weights} == {expected}


def test_default_dtype_is_the_global_one() -> None:
    torch.set_default_dtype(torch.float64)
    assert tfp.DenseReparameterization(2).dtype == torch.float64


def test_inputs_are_cast_and_arrays_accepted() -> None:
    layer = tfp.DenseReparameterization(2, dtype="float64")
    assert layer(torch.ones(3, 4, dtype=torch.float16)).dtype == torch.float64
    assert layer(np.ones((3, 4), np.float32)).dtype == torch.float64
    with pytest.raises(TypeError, match="array, got list"):
        layer([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="floating-point dtype"):
        layer(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="got none"):
        layer()
    with pytest.raises(TypeError, match="mask"):
        layer(torch.ones(3, 4), mask=None)
    assert layer(torch.ones(3, 4), training=True).shape == (3, 2)


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_unknown_keywords_of_a_call(name: str) -> None:
    layer, x = tfp_layers.built(name)
    for key, instead in (
        ("num_samples", "; call the layer once for each draw"),
        ("mask", "; the layer does not support masking"),
        ("sed", "$"),
    ):
        with pytest.raises(
            TypeError, match=f"^{key}: expected one of the keywords seed, training{instead}"
        ):
            layer(x, **{key: None})


def test_keyword_options() -> None:
    layer = tfp.DenseReparameterization(2, name="head", dynamic=True, input_dim=3, batch_size=5)
    assert (layer.name, layer.dynamic) == ("head", True)
    assert layer.get_config()["batch_input_shape"] == (5, 3)
    values = [np.full((3, 2), 0.5), np.full((3, 2), -2.0), np.array([1.0, 2.0])]
    layer = tfp.DenseReparameterization(2, weights=values)
    layer.build((None, 3))
    for got, want in zip(layer.get_weights(), values, strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_generated_names_are_numbered(name: str) -> None:
    first, second = (tfp_layers.make(name).name for _ in range(2))
    stem, number = second.rsplit("_", 1)
    assert first in (stem, f"{stem}_{int(number) - 1}")
    words = re.findall("[A-Z][a-z]+|[0-9]D", name)
    assert stem == "_".join(words).lower().replace("convolution_", "conv")


def test_a_subclass_is_named_after_itself() -> None:

    class MyConv(tfp.Convolution2DReparameterization):
        pass

    assert MyConv(2, 1).name.startswith("my_conv")


def test_an_upper_case_argument_is_stored_in_lower_case() -> None:
    layer = tfp.Convolution2DReparameterization(2, 1, padding="SAME", data_format="Channels_First")
    assert (layer.padding, layer.data_format) == ("same", "channels_first")


def test_public_names() -> None:
    for name in (
        *tfp_layers.NAMES,
        "ChannelsLast",
        "apply_constraints",
        "constraints",
        "default_loc_scale_fn",
        "default_mean_field_normal_fn",
        "default_multivariate_normal_fn",
        "initializers",
        "posterior_mean",
        "posterior_sample",
        "regularizers",
    ):
        assert hasattr(fastbconv, name), name


@pytest.mark.parametrize("name", ["constraints", "initializers", "noise", "regularizers"])
def test_modules_list_their_public_names(name: str) -> None:
    """help() and its like show what a module defines, and nothing that it imports."""
    module = getattr(fastbconv, name)
    listed = {
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
    }
    assert listed <= set(module.__all__)
    assert all(hasattr(module, key) for key in module.__all__)
    assert not {"torch", "Tensor", "Any", "annotations"} & set(module.__all__)
