"""Configurations, and the documented Keras properties and methods."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tfp_layers
import torch
import torch.nn.functional as F
from tfp_cases import FOLDER
from torch import nn

from fastbconv import regularizers
from fastbconv.initializers import RandomNormal
from fastbconv.layers import tfp

CONFIGS = json.loads((FOLDER / "get_config.json").read_text())
BEHAVIOUR = json.loads((FOLDER / "property_behaviour.json").read_text())


def named_prior(dtype: torch.dtype, shape: tuple[int, ...], *_: Any) -> torch.distributions.Normal:
    return torch.distributions.Normal(torch.zeros(shape, dtype=dtype), 2.0)


@tfp.register_function("tests.doubled_kl")
def doubled_kl(q: Any, p: Any, sample: Any) -> torch.Tensor:
    return 2 * tfp.kl_divergence(q, p, sample)


LAYERS = {
    0: lambda: tfp.Convolution2DReparameterization(4, 3),
    1: lambda: tfp.Convolution2DReparameterization(
        8,
        (3, 5),
        strides=[2, 1],
        padding="SAME",
        activation="relu",
        activity_regularizer=regularizers.l2(0.5),
        trainable=False,
        dtype="float64",
    ),
    2: lambda: tfp.Convolution2DReparameterization(
        4,
        3,
        kernel_prior_fn=None,
        bias_posterior_fn=None,
        dilation_rate=2,
        data_format="Channels_First",
        activation=F.relu,
    ),
    3: lambda: tfp.Convolution2DReparameterization(
        4,
        3,
        bias_posterior_fn=tfp.default_mean_field_normal_fn(),
        bias_prior_fn=tfp.default_multivariate_normal_fn,
        input_shape=(9, 10, 3),
    ),
    4: lambda: tfp.Convolution2DFlipout(4, 3, seed=7),
    5: lambda: tfp.Convolution1DReparameterization(4, 3),
    6: lambda: tfp.Convolution3DReparameterization(4, 3),
    7: lambda: tfp.DenseReparameterization(4, activation="tanh"),
    8: lambda: tfp.DenseFlipout(4, seed=7),
}


def _plain(value: Any) -> Any:
    """A recorded value: tuples are written as {"tuple": [...]}."""
    return tuple(value["tuple"]) if isinstance(value, dict) and "tuple" in value else value


@pytest.mark.parametrize("index", LAYERS)
def test_recorded_configurations(index: int) -> None:
    """Keys, their order, and every value that is no function."""
    recorded = CONFIGS[index]
    config = LAYERS[index]().get_config()
    assert list(config) == recorded["keys_in_order"]
    for key, value in recorded["config"].items():
        if key in ("name", "activity_regularizer") or key.endswith(("_fn", "_fn_type")):
            assert (config[key] is None) == (value is None)
        else:
            assert config[key] == _plain(value)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "name": {"name": "head"},
    "frozen": {"trainable": False},
    "dtype": {"dtype": torch.float64},
    "activation name": {"activation": "leaky_relu"},
    "activation function": {"activation": F.leaky_relu},
    "activation softmax": {"activation": "softmax"},
    "activation of torch": {"activation": torch.atan},
    "regularizer name": {"activity_regularizer": "l1_l2"},
    "regularizer object": {"activity_regularizer": regularizers.l1(0.25)},
    "regularizer configuration": {
        "activity_regularizer": {"class_name": "L2", "config": {"l2": 0.5}}
    },
    "regularizer function": {"activity_regularizer": torch.sum},
    "kernel_posterior_fn": {
        "kernel_posterior_fn": tfp.default_mean_field_normal_fn(
            loc_initializer=RandomNormal(0.5, 0.1), loc_regularizer=regularizers.l2(0.5)
        )
    },
    "kernel_posterior_fn with names": {
        "kernel_posterior_fn": tfp.default_mean_field_normal_fn(
            loc_initializer="he_normal",
            untransformed_scale_initializer={"class_name": "Constant", "config": {"value": -4}},
            loc_regularizer="l2",
            loc_constraint="max_norm",
            untransformed_scale_constraint="NonNeg",
        )
    },
    "kernel_posterior_tensor_fn": {"kernel_posterior_tensor_fn": tfp.posterior_mean},
    "kernel_prior_fn": {"kernel_prior_fn": named_prior},
    "kernel_divergence_fn": {"kernel_divergence_fn": doubled_kl},
    "trainable prior": {"kernel_prior_fn": tfp.default_mean_field_normal_fn()},
    "no losses": {"kernel_prior_fn": None, "kernel_divergence_fn": None},
    "bias": {
        "bias_posterior_fn": tfp.default_mean_field_normal_fn(),
        "bias_posterior_tensor_fn": tfp.posterior_mean,
        "bias_prior_fn": tfp.default_multivariate_normal_fn,
        "bias_divergence_fn": doubled_kl,
    },
    "no bias": {"bias_posterior_fn": None, "bias_posterior_tensor_fn": None},
    "seed": {"seed": 7},
    "padding": {"padding": "SAME"},
    "channels first": {"data_format": "channels_first"},
    "strides": {"strides": 2},
    "dilation": {"dilation_rate": 2},
}
_OF_CONVOLUTIONS = ("padding", "channels first", "strides", "dilation")


def _arguments_of(name: str) -> list[str]:
    return [
        key
        for key in ARGUMENTS
        if (key not in _OF_CONVOLUTIONS or not name.startswith("Dense"))
        and (key != "seed" or name.endswith("Flipout"))
    ]


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_round_trip_of_every_argument(name: str) -> None:
    for key in _arguments_of(name):
        _check_round_trip(tfp_layers.make(name, **ARGUMENTS[key]))
    space = tfp_layers.SPACES[tfp_layers.stem_of(name)]
    layer = tfp_layers.make(name, input_shape=(*space, 3), batch_size=2)
    assert layer.get_config()["batch_input_shape"] == (2, *space, 3)
    _check_round_trip(layer)


@pytest.mark.parametrize("index", LAYERS)
def test_round_trip_through_json(index: int) -> None:
    _check_round_trip(LAYERS[index]())


def _check_round_trip(layer: Any) -> None:
    config = layer.get_config()
    text = json.dumps(config)
    again = type(layer).from_config(json.loads(text))
    assert json.dumps(again.get_config()) == text
    assert config == layer.get_config()
    x = torch.ones([1, *[9, 10, 8][: layer.rank], 3], dtype=layer.dtype)
    x = x.movedim(-1, 1) if getattr(layer, "data_format", "") == "channels_first" else x
    layer.build(tuple(x.shape))
    again.build(tuple(x.shape))
    again.set_weights(layer.get_weights())
    assert torch.equal(again(x, seed=1), layer(x, seed=1))
    assert [v.item() for v in again.losses] == [v.item() for v in layer.losses]


def test_user_functions_round_trip_by_name() -> None:
    layer = tfp.DenseReparameterization(
        2,
        activation=torch.atan,
        kernel_posterior_fn=tfp.default_mean_field_normal_fn(
            loc_regularizer=regularizers.l1_l2(0.1, 0.2), loc_constraint=torch.relu
        ),
        kernel_posterior_tensor_fn=tfp.posterior_mean,
        kernel_prior_fn=named_prior,
        kernel_divergence_fn=doubled_kl,
    )
    config = json.loads(json.dumps(layer.get_config()))
    again = tfp.DenseReparameterization.from_config(config)
    assert again.kernel_prior_fn is named_prior
    assert again.kernel_divergence_fn is doubled_kl
    assert again.kernel_posterior_tensor_fn is tfp.posterior_mean
    assert again.kernel_posterior_fn.loc_regularizer == regularizers.l1_l2(0.1, 0.2)
    assert again.kernel_posterior_fn.loc_constraint is torch.relu
    assert again.activation is torch.atan


def test_a_torch_activation_keeps_its_constants() -> None:
    """F.leaky_relu has slope 0.01 and Keras's name 0.2: the name must not replace the function."""
    layer = tfp.DenseReparameterization(2, activation=F.leaky_relu)
    again = tfp.DenseReparameterization.from_config(json.loads(json.dumps(layer.get_config())))
    z = torch.tensor([-1.0])
    assert float(again.activation(z)) == float(layer.activation(z)) == pytest.approx(-0.01)
    named = tfp.DenseReparameterization(2, activation="leaky_relu")
    assert float(named.activation(z)) == pytest.approx(-0.2)


def test_a_lambda_is_refused_or_kept_by_reference() -> None:
    layer = tfp.DenseReparameterization(2, kernel_divergence_fn=lambda q, p, w: q.loc.sum())
    with pytest.raises(ValueError, match="kernel_divergence_fn: expected a function"):
        layer.get_config()
    clone = tfp.DenseReparameterization.from_config(layer.get_config(by_reference=True))
    assert clone.kernel_divergence_fn is layer.kernel_divergence_fn


def test_bad_configurations() -> None:
    config = tfp.DenseReparameterization(2).get_config()
    missing = {key: value for key, value in config.items() if key != "bias_prior_fn"}
    with pytest.raises(KeyError):
        tfp.DenseReparameterization.from_config(missing)
    with pytest.raises(TypeError, match="kernel_prior_fn_type: expected"):
        tfp.DenseReparameterization.from_config({**config, "kernel_prior_fn_type": "code"})
    unknown = {**config, "kernel_prior_fn": "no_module:f", "kernel_prior_fn_type": "module"}
    with pytest.raises(ValueError, match="import no_module first"):
        tfp.DenseReparameterization.from_config(unknown)


PROPERTIES = [key for key in BEHAVIOUR["unbuilt"] if "(" not in key and not key.startswith("get_")]


@pytest.mark.parametrize("state", ["unbuilt", "after_eager_call"])
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("estimator", tfp_layers.ESTIMATORS)
def test_recorded_properties(state: str, name: str, estimator: str) -> None:
    layer = getattr(tfp, f"Convolution2D{estimator}")(4, 3, name="layer")
    if state == "after_eager_call":
        layer(torch.ones(2, 5, 6, 3))
    recorded = BEHAVIOUR[state][name]
    if "exception" in recorded:
        for kind in (AttributeError, RuntimeError):
            with pytest.raises(kind, match=f"{name}: expected .*; "):
                getattr(layer, name)
        assert not hasattr(layer, name)
        return
    got, value = getattr(layer, name), recorded["value"]
    if isinstance(value, dict):
        (kind, entries), *_ = value.items()
        # TFP lists its distributions among the submodules; here they are no modules.
        assert len(got) == (0 if name == "submodules" else len(entries))
        assert isinstance(got, tuple if kind == "tuple" else list)
    elif name == "name_scope":
        assert (got.name, got(), str(got.__enter__())) == ("layer/",) * 3
    elif name == "input_spec":
        axes = {} if state == "unbuilt" else {-1: 3}
        assert (got.ndim, got.axes) == (4, axes)
    elif name == "dtype":
        assert got == torch.float32
    else:
        assert got == value


@pytest.mark.parametrize("name", tfp_layers.NAMES)
def test_methods_of_an_eager_layer(name: str) -> None:
    layer = tfp_layers.make(name)
    for kind in ("input", "output", "input_mask", "output_mask", "input_shape", "output_shape"):
        with pytest.raises(RuntimeError, match=f"get_{kind}_at: expected .* node 0"):
            getattr(layer, f"get_{kind}_at")(0)
    x = tfp_layers.image(name)
    assert layer.get_weights() == []
    layer.set_weights([])
    with pytest.raises(ValueError, match="expected 0 arrays"):
        layer.set_weights([x.numpy()])
    with pytest.raises(ValueError, match="count_params"):
        layer.count_params()
    layer(x, training=True)
    assert layer.count_params() == sum(weight.size for weight in layer.get_weights())
    with pytest.raises(ValueError, match="expected 3 arrays"):
        layer.set_weights([])
    with pytest.raises(TypeError, match="mask"):
        layer(x, mask=None)
    with pytest.raises(ValueError, match="got none"):
        layer()
    assert layer.compute_mask(x) is None
    with pytest.raises(TypeError, match="does not support masking"):
        layer.compute_mask(x, x)
    assert layer.get_updates_for(x) == layer.updates == []


def test_messages_survive_module_getattr() -> None:
    layer = tfp.Convolution2DReparameterization(4, 3)
    for name in ("kernel_posterior", "kernel_prior", "bias_posterior", "bias_prior"):
        with pytest.raises(AttributeError, match=f"{name}: expected a built layer"):
            getattr(layer, name)
    with pytest.raises(AttributeError, match="has been called"):
        _ = layer.kernel_posterior_tensor
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = layer.nonsense


def test_name_scope_wrapper_and_submodules() -> None:
    class Scoped(tfp.DenseReparameterization):
        @tfp.DenseReparameterization.with_name_scope
        def twice(self, x: int) -> int:
            """Doubles."""
            return 2 * x

    layer = Scoped(2, activation=nn.PReLU())
    assert (layer.twice(3), layer.twice.__doc__) == (6, "Doubles.")
    assert [type(module) for module in layer.submodules] == [nn.PReLU]
    assert layer(torch.ones(1, 3)).shape == (1, 2)


def test_losses_for_inputs() -> None:
    layer = tfp.DenseReparameterization(
        2,
        activity_regularizer="l2",
        kernel_posterior_fn=tfp.default_mean_field_normal_fn(loc_regularizer=regularizers.l2()),
    )
    x, other = torch.ones(3, 4), torch.ones(3, 4)
    assert layer.get_losses_for(None) == layer.get_losses_for(x) == []
    layer(x)
    assert len(layer.get_losses_for(None)) == 2
    assert [v.item() for v in layer.get_losses_for(x)] == [layer.losses[1].item()]
    assert layer.get_losses_for(other) == []
