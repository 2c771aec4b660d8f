"""Weights of Keras files in models: what belongs to what, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras_files
import numpy as np
import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv.keras_weights import KerasWeights, LayerWeights, LoadReport, load_keras_weights

DENSE = "dense_reparameterization"
# The variational layers of the recorded model, in order; what else is in it.
CNN = ["features", "more", f"inner/{DENSE}_2", "inner/hidden", f"{DENSE}_3"]
OTHERS = {"norm": 4 * ((3,),), "plain": ((3, 4), (4,))}


def frozen_prior(dtype: Any, shape: Any, name: Any, trainable: Any, add: Any) -> Any:
    """Variables that are not trainable: not in the order of creation in ``get_weights()``."""
    return fb.default_mean_field_normal_fn()(dtype, shape, name, False, add)


def cnn(named: bool = True, units: int = 2) -> nn.Sequential:
    """The recorded model ``cnn``, with its names or with automatic ones."""

    def name(text: str) -> dict[str, Any]:
        return {"name": text} if named else {}

    model = nn.Sequential(
        fb.Convolution2DReparameterization(3, 3, kernel_prior_fn=frozen_prior, **name("features")),
        fb.ChannelsLast(nn.BatchNorm2d(3)),
        fb.Convolution2DReparameterization(3, 3, **name("more")),
        nn.Flatten(),
        nn.Sequential(
            fb.DenseReparameterization(4), fb.DenseReparameterization(3, **name("hidden"))
        ),
        nn.Linear(3, 4),
        fb.DenseReparameterization(units),
    )
    return fb.build(model, (None, 6, 6, 2))


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "get_weights")]


def assert_loaded(model: nn.Module, report: LoadReport) -> None:
    truth = keras_files.truth("cnn")
    layers = layers_of(model)
    assert [one.name for one in report.loaded] == [layer.name for layer in layers]
    for layer, name in zip(layers, CNN, strict=True):
        for array, expected in zip(layer.get_weights(), truth[name].values(), strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "file",
    [
        *("cnn.h5", "cnn-whole.h5", "cnn.keras", "cnn.weights.h5"),
        *("cnn-tf2.12.keras", "cnn-tf2.12.weights.h5"),
    ],
)
def test_every_format(file: str, named: bool, tmp_path: Path) -> None:
    model = cnn(named)
    report = load_keras_weights(model, keras_files.unpacked(file, tmp_path))
    assert_loaded(model, report)
    numbered = "weights" in file
    left = {"batch_normalization": OTHERS["norm"], "dense": OTHERS["plain"]}
    assert report.left_over == (left if numbered else OTHERS)
    by_name = {one.source for one in report.loaded if one.by == "name"}
    assert by_name == ({"features", "more", "inner/hidden"} if named and not numbered else set())


@pytest.mark.parametrize("kind", ["checkpoint", "savedmodel"])
def test_checkpoints(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables go by their names: a checkpoint has them in the order of creation."""
    reader = keras_files.Reader(f"cnn-{kind}")
    monkeypatch.setitem(sys.modules, "tensorflow", keras_files.fake_tensorflow(reader, []))
    (tmp_path / "m.index").touch()
    model = cnn()
    report = load_keras_weights(model, tmp_path / "m")
    assert_loaded(model, report)
    assert report.left_over == OTHERS


def test_every_class_that_exists(tmp_path: Path) -> None:
    """All layers of the recorded model that this library has: set_weights takes the arrays."""
    ranks = {"conv1d": (None, 9), "conv2d": (None, 9, 9), "conv3d": (None, 9, 9, 9)}
    weights = keras_files.truth("siblings")
    kinds = {"zeta": "conv1d_reparameterization", "alpha": "conv2d_reparameterization"}
    kinds["last"] = "conv3d_flipout"
    found = 0
    for name, variables in weights.items():
        kind = kinds.get(name, name.removesuffix("_1"))
        spelling = {"dense": "Dense"} | {f"conv{n}d": f"Convolution{n}D" for n in "123"}
        words = kind.split("_")
        class_name = spelling[words[0]] + "".join(word.capitalize() for word in words[1:])
        if not hasattr(fb, class_name):
            continue
        found += 1
        shape = variables["kernel_posterior_loc"].shape
        window = () if words[0] == "dense" else (shape[:-2],)
        options: dict[str, Any] = {"name": name}
        random = fb.default_mean_field_normal_fn()
        frozen = list(variables)[-1].startswith("kernel_prior")
        if "kernel_prior_loc" in variables:
            options["kernel_prior_fn"] = frozen_prior if frozen else random
        for role in ("bias_posterior", "bias_prior"):
            if f"{role}_untransformed_scale" in variables:
                options[f"{role}_fn"] = random
        if "bias_posterior_loc" not in variables:
            options["bias_posterior_fn"] = None
        layer = getattr(fb, class_name)(shape[-1], *window, **options)
        layer.build((*ranks.get(words[0], (None,)), shape[-2]))
        layer.set_weights(list(variables.values()))
        for array, expected in zip(layer.get_weights(), variables.values(), strict=True):
            np.testing.assert_array_equal(array, expected)
        path = keras_files.unpacked("siblings.h5", tmp_path)
        report = load_keras_weights(layer, path, {name: name})
        assert [one.source for one in report.loaded] == [name]
        assert len(report.left_over) == len(weights) - 1
    assert found >= 4


# --- what decides ---------------------------------------------------------------------------------


def made(ordered: bool = True, **layers: Any) -> KerasWeights:
    """A file of dense layers: name -> (in, out), or a whole record."""
    records = []
    for number, (name, shape) in enumerate(layers.items()):
        if not isinstance(shape, LayerWeights):
            arrays = [np.full(s, number + 1.0) for s in (shape, shape, shape[1:])]
            names = ("kernel_posterior_loc", "kernel_posterior_untransformed_scale")
            shape = LayerWeights(name, tuple(arrays), (*names, "bias_posterior_loc"))
        records.append(shape)
    return KerasWeights("made.h5", "made by hand", records, ordered)


def pair(first: str | None = None, second: str | None = None) -> nn.Sequential:
    layers = [fb.DenseReparameterization(3, name=name) for name in (first, second)]
    return fb.build(nn.Sequential(*layers), (None, 3))


def sources(model: nn.Module, weights: KerasWeights, mapping: Any = None) -> list[str]:
    report = load_keras_weights(model, weights, mapping)
    layers = layers_of(model)
    for one, layer in zip(report.loaded, layers, strict=False):
        if len(report.loaded) == len(layers):
            np.testing.assert_array_equal(layer.get_weights()[0], weights[one.source][0])
    return [f"{one.source} by {one.by}" for one in report.loaded]


def test_given_names_come_before_order() -> None:
    weights = made(b=(3, 3), a=(3, 3))
    assert sources(pair("a", "b"), weights) == ["a by name", "b by name"]
    assert sources(pair(None, "b"), weights) == ["a by order", "b by name"]
    assert sources(pair("x", "y"), weights) == ["b by order", "a by order"]


def test_automatic_names_count_layers_and_say_nothing_else() -> None:
    """``dense_reparameterization_1`` may be the file's second layer and the model's first."""
    model = pair(f"{DENSE}_1", f"{DENSE}_2")
    weights = made(**{DENSE: (3, 3), f"{DENSE}_1": (3, 3)})
    assert sources(model, weights) == [f"{DENSE} by order", f"{DENSE}_1 by order"]
    # The very names of the file are no accident.
    weights = made(**{f"{DENSE}_2": (3, 3), f"{DENSE}_1": (3, 3)})
    assert sources(model, weights) == [f"{DENSE}_1 by name", f"{DENSE}_2 by name"]


def test_attributes_of_a_model_are_names() -> None:
    model = nn.Module()
    model.first, model.second = fb.DenseReparameterization(3), fb.DenseReparameterization(3)
    model.first.build((None, 3))
    model.second.build((None, 3))
    weights = made(second=(3, 3), first=(3, 3))
    assert sources(model, weights) == ["first by name", "second by name"]


def test_mapping() -> None:
    weights = made(b=(3, 3), a=(3, 3), c=(3, 3))
    model = pair("a", "b")
    assert sources(model, weights, {"a": "c", "1": "a"}) == ["c by mapping", "a by mapping"]
    before = model[1].get_weights()
    report = load_keras_weights(model, weights, {"b": None})
    assert [one.source for one in report.loaded] == ["a"]
    assert set(report.left_over) == {"b", "c"}
    assert str(report).splitlines()[:2] == [
        "0 <- a (by name)",
        "left over: b [(3, 3), (3, 3), (3,)]",
    ]
    for array, expected in zip(model[1].get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)
    with pytest.raises(ValueError, match=r"mapping: expected a path .*\['0', '1'\], got 'z'"):
        load_keras_weights(model, weights, {"z": "a"})
    with pytest.raises(ValueError, match=r"mapping\['a'\]: expected a layer of the file.*got 'z'"):
        load_keras_weights(model, weights, {"a": "z"})


def numbered(name: str, shape: tuple[int, int]) -> LayerWeights:
    arrays = tuple(np.full(s, shape[0] * 1.0) for s in (shape, shape, shape[1:]))
    return LayerWeights(name, arrays, None, DENSE, named=False)


def test_without_names_and_order_shapes_have_to_decide() -> None:
    model = fb.build(
        nn.Sequential(fb.DenseReparameterization(4), fb.DenseReparameterization(3)), (None, 3)
    )
    inner, outer = numbered("sequential/x", (4, 3)), numbered("x", (3, 4))
    found = sources(model, made(False, inner=inner, outer=outer))
    assert found == ["x by order", "sequential/x by order"]
    twins = made(False, inner=numbered("sequential/x", (3, 3)), outer=numbered("x", (3, 3)))
    with pytest.raises(ValueError, match=r"expected one layer of class dense.*for 2 layer\(s\)"):
        load_keras_weights(pair(), twins)
    mapping = {"0": "x", "1": "sequential/x"}
    assert sources(pair(), twins, mapping) == ["x by mapping", "sequential/x by mapping"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_nothing_changes_where_one_thing_does_not_fit(named: bool, tmp_path: Path) -> None:
    model = cnn(named, units=5)
    before = [array for layer in layers_of(model) for array in layer.get_weights()]
    path = keras_files.unpacked("cnn.h5", tmp_path)
    message = (
        rf"layer '{DENSE}.*' at '6': expected shapes \[\(4, 5\), \(4, 5\), \(5,\)\], got "
        rf"\[\(4, 2\), \(4, 2\), \(2,\)\] from layer '{DENSE}_3' of the file"
    )
    with pytest.raises(ValueError, match=message) as info:
        load_keras_weights(model, path)
    assert "nothing was changed" in str(info.value)
    after = [array for layer in layers_of(model) for array in layer.get_weights()]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_number_of_layers() -> None:
    with pytest.raises(ValueError, match=r"expected 2 Bayesian layers, for \['0', '1'\], got 1:"):
        load_keras_weights(pair(), made(a=(3, 3)))
    with pytest.raises(ValueError, match=r"expected 2 Bayesian layers, .*got 3:"):
        load_keras_weights(pair(), made(a=(3, 3), b=(3, 3), c=(3, 3)))


def test_another_number_of_variables() -> None:
    layer = fb.DenseReparameterization(3, bias_posterior_fn=None, name="a")
    layer.build((None, 3))
    with pytest.raises(
        ValueError,
        match=r"layer 'a': expected shapes \[\(3, 3\), \(3, 3\)\], got .*\(3,\)\] .*by name",
    ):
        load_keras_weights(layer, made(a=(3, 3)))


def test_names_that_occur_twice() -> None:
    weights = made(**{"one/a": (3, 3), "two/a": (3, 3)})
    twice = [LayerWeights(r.name, r.arrays, r.variables, aliases=("a",)) for r in weights.layers]
    weights = KerasWeights("made.h5", "made by hand", twice)
    with pytest.raises(ValueError, match=r"one layer of that name, got \['one/a', 'two/a'"):
        load_keras_weights(pair("a", "b"), weights)
    same = pair("a", "a")  # two layers of one name: order decides
    assert sources(same, made(a=(3, 3), b=(3, 3))) == ["a by order", "b by order"]
    with pytest.raises(ValueError, match="mapping: expected a path or the name of one layer"):
        load_keras_weights(same, made(a=(3, 3)), {"a": "a"})
    model = nn.ModuleDict({"x": fb.DenseReparameterization(3, name="y")})
    model["y"] = fb.DenseReparameterization(3, name="z")
    for layer in model.values():
        layer.build((None, 3))
    with pytest.raises(ValueError, match="expected one layer for each name of the file"):
        load_keras_weights(model, made(y=(3, 3), b=(3, 3)))


def test_models_that_cannot_take_weights() -> None:
    weights = made(a=(3, 3))
    with pytest.raises(ValueError, match="layer 'a' at '0': expected a built layer"):
        load_keras_weights(nn.Sequential(fb.DenseReparameterization(3, name="a")), weights)
    with pytest.raises(ValueError, match="expected layers of the TFP face"):
        load_keras_weights(nn.Sequential(nn.Linear(3, 3), fb.BayesLinear(3, 3)), weights)
    with pytest.raises(TypeError, match="expected a torch"):
        load_keras_weights([fb.DenseReparameterization(3)], weights)  # type: ignore[arg-type]


def test_layers_of_another_dtype_and_subclasses() -> None:
    class Own(fb.DenseReparameterization):
        pass

    layer = Own(3, dtype="float64")
    layer.build((None, 3))
    weights = made(False, x=numbered("x", (3, 3)))
    assert sources(layer, weights) == ["x by order"]
    assert layer.kernel_posterior_loc.dtype == torch.float64
