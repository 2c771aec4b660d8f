"""The reader of Keras weight files, on files that the real libraries wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import keras_files
import numpy as np
import pytest

from fastbconv import __main__ as commands
from fastbconv.keras_weights import (
    KerasWeights,
    KerasWeightsError,
    LayerWeights,
    MissingPackageError,
    cli,
    read_keras_weights,
)

NAMED = [
    *("siblings.h5", "cnn.h5", "cnn-whole.h5", "cnn.keras", "cnn-tf2.12.keras", "sub.h5"),
    *("keras3.weights.h5", "keras3.keras", "keras3-whole.h5"),
]
CONV, DENSE = "conv2d_reparameterization", "dense_reparameterization"
# File -> the name that it has for a layer -> the layer's own name.
NUMBERED: dict[str, dict[str, str]] = {
    "cnn.weights.h5": {
        "batch_normalization": "norm",
        CONV: "features",
        f"{CONV}_1": "more",
        "dense": "plain",
        DENSE: f"{DENSE}_3",
        f"sequential/{DENSE}": f"inner/{DENSE}_2",
        f"sequential/{DENSE}_1": "inner/hidden",
    },
    "sub.weights.h5": {
        CONV: f"{CONV}_1",
        "dense_flipout": "dense_flipout_1",
        "dense_flipout_1": "dense_flipout_2",
        "output_layer": "out",
    },
    "sub-tf2.12.weights.h5": {
        "blocks/dense_flipout": "dense_flipout_1",
        "blocks/dense_flipout_1": "dense_flipout_2",
        "conv1": f"{CONV}_1",
        DENSE: "out",
    },
    "siblings.weights.h5": {
        "conv1d_flipout": "conv1d_flipout",
        "conv1d_reparameterization": "zeta",
        "conv2d_flipout": "conv2d_flipout",
        CONV: CONV,
        f"{CONV}_1": "alpha",
        "conv3d_flipout": "last",
        "conv3d_reparameterization": "conv3d_reparameterization",
        "dense_flipout": "dense_flipout",
        "dense_local_reparameterization": "dense_local_reparameterization",
        DENSE: DENSE,
        f"{DENSE}_1": f"{DENSE}_1",
    },
}
# TensorFlow 2.12 counted each layer twice.
for _name in ("cnn", "siblings"):
    NUMBERED[f"{_name}-tf2.12.weights.h5"] = {
        key.replace("tion_1", "tion_2"): value
        for key, value in NUMBERED[f"{_name}.weights.h5"].items()
    }


def model_of(file: str) -> str:
    return file.split(".")[0].split("-")[0]


def assert_same(arrays: list[np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for array, wanted in zip(arrays, expected.values(), strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


# --- HDF5 and archives ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", NAMED)
def test_files_with_layer_names(file: str, tmp_path: Path) -> None:
    weights = read_keras_weights(keras_files.unpacked(file, tmp_path))
    truth = keras_files.truth(model_of(file))
    assert weights.ordered == (file != "keras3.weights.h5")
    assert (list if weights.ordered else set)(weights) == (list if weights.ordered else set)(truth)
    for name, arrays in weights.items():
        assert_same(arrays, truth[name])
        record = weights.record(name)
        assert record.named
        assert record.is_bayesian == any("posterior" in variable for variable in truth[name])
        if record.variables is not None:
            assert list(record.variables) == list(truth[name])
    has_names = "keras3" not in file and file != "cnn.keras"
    assert all((layer.variables is not None) >= has_names for layer in weights.layers)


@pytest.mark.parametrize("file", sorted(NUMBERED))
def test_files_without_layer_names(file: str, tmp_path: Path) -> None:
    """Layers are numbered per class; the variables are in the order of get_weights()."""
    weights = read_keras_weights(keras_files.unpacked(file, tmp_path))
    truth = keras_files.truth(model_of(file))
    assert set(weights) == set(NUMBERED[file])
    assert not weights.ordered
    for name, real in NUMBERED[file].items():
        record = weights.record(name)
        assert_same(weights[name], truth[real])
        assert (record.named, record.variables) == (False, None)
        assert record.is_bayesian == any("posterior" in variable for variable in truth[real])


def test_an_archive_of_a_subclassed_model_keeps_its_numbers(tmp_path: Path) -> None:
    weights = read_keras_weights(keras_files.unpacked("sub.keras", tmp_path))
    assert set(weights) == set(NUMBERED["sub.weights.h5"])
    assert not any(layer.named for layer in weights.layers)


def test_a_variable_that_is_not_trainable_comes_last(tmp_path: Path) -> None:
    weights = read_keras_weights(keras_files.unpacked("cnn.h5", tmp_path))
    assert weights.record("features").variables == (
        *("kernel_posterior_loc", "kernel_posterior_untransformed_scale", "bias_posterior_loc"),
        *("kernel_prior_loc", "kernel_prior_untransformed_scale"),
    )


def test_more_than_ten_variables_and_names_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "w.weights.h5"
    with h5py.File(path, "w") as file:
        for layer in ("layers\\dense_10", "layers\\dense_9"):
            group = file.create_group(layer).create_group("vars")
            for number in range(12):
                group[str(number)] = np.full(1, number, ">f4")
    weights = read_keras_weights(path)
    assert list(weights) == ["dense_9", "dense_10"]
    assert [int(array[0]) for array in weights["dense_10"]] == list(range(12))
    assert weights["dense_10"][0].dtype == np.float32


def test_names_in_several_attributes_and_unusual_scopes(tmp_path: Path) -> None:
    """Keras splits long lists; TensorFlow 1 made scopes unique; explicit builds have none."""
    path = tmp_path / "w.h5"
    layers = {
        "plain": [b"kernel_posterior_loc:0", b"bias_posterior_loc:0"],
        "again": [b"model/again_1/kernel:0"],
        "block/conv": [b"block/conv/kernel:0"],
        "twins": [b"a/x/kernel:0", b"b/x/kernel:0"],
        "both": [b"both/forward/cell/kernel:0", b"both/backward/cell/kernel:0"],
    }
    with h5py.File(path, "w") as file:
        names = [name.encode() for name in layers]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:2], names[2:]
        for number, (layer, variables) in enumerate(layers.items()):
            group = file.create_group(layer)
            group.attrs["weight_names"] = variables
            for name in variables:
                group[name.decode()] = np.full(2, number, np.float64)
    weights = read_keras_weights(path)
    assert list(weights) == [
        *("plain", "again", "block/conv", "twins/a/x", "twins/b/x"),
        *("both/forward/cell", "both/backward/cell"),
    ]
    assert weights.record("plain").variables == ("kernel_posterior_loc", "bias_posterior_loc")
    assert weights.record("plain").is_bayesian
    assert not weights.record("again").is_bayesian


# --- checkpoints ----------------------------------------------------------------------------------


def read_checkpoint(
    recorded: str, folder: Path, patch: pytest.MonkeyPatch, asked: list[str] | None = None
) -> KerasWeights:
    reader, asked = keras_files.Reader(recorded), [] if asked is None else asked
    patch.setitem(sys.modules, "tensorflow", keras_files.fake_tensorflow(reader, asked))
    if recorded.endswith("savedmodel"):
        (folder / "variables").mkdir()
        (folder / "variables" / "variables.index").touch()
        return read_keras_weights(folder)
    (folder / "model.ckpt-1.index").touch()
    return read_keras_weights(folder / "model.ckpt-1")


@pytest.mark.parametrize("kind", ["savedmodel", "checkpoint"])
@pytest.mark.parametrize("model", ["siblings", "cnn", "sub"])
def test_checkpoints(
    model: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    weights = read_checkpoint(f"{model}-{kind}", tmp_path, monkeypatch, asked)
    prefix = "variables/variables" if kind == "savedmodel" else "model.ckpt-1"
    assert asked == [str(tmp_path / prefix)]
    truth = {name.rsplit("/", 1)[-1]: value for name, value in keras_files.truth(model).items()}
    assert set(weights) == set(truth)
    if model == "cnn":
        assert list(weights) == list(truth)
    for name, arrays in weights.items():
        names = weights.record(name).variables
        assert names is not None
        # A checkpoint keeps the order of creation; a SavedModel lists that of get_weights().
        assert (list if kind == "savedmodel" else set)(names) == (
            list if kind == "savedmodel" else set
        )(truth[name])
        assert_same(arrays, {variable: truth[name][variable] for variable in names})


def test_a_checkpoint_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = read_checkpoint("names-checkpoint", tmp_path, monkeypatch)
    assert set(weights) == {"features", DENSE}
    assert not weights.ordered
    names = ("kernel_posterior_loc", "kernel_posterior_untransformed_scale", "bias_posterior_loc")
    assert all(layer.variables == names for layer in weights.layers)
    reader = keras_files.Reader("names-checkpoint")
    for name, array in zip(names, weights["features"], strict=True):
        np.testing.assert_array_equal(array, reader.get_tensor(f"features/{name}"))


@pytest.mark.parametrize("name", ["m.index", "m.data-00000-of-00001", "m", ""])
def test_ways_to_name_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    module = keras_files.fake_tensorflow(keras_files.Reader("sub-checkpoint"), asked)
    monkeypatch.setitem(sys.modules, "tensorflow", module)
    (tmp_path / "m.index").touch()
    (tmp_path / "m.data-00000-of-00001").touch()
    read_keras_weights(tmp_path / name)
    assert asked == [str(tmp_path / "m")]
    (tmp_path / "checkpoint").touch()
    read_keras_weights(tmp_path)
    assert asked[1:] == [str(tmp_path)]


def test_damaged_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.index").touch()
    module = keras_files.fake_tensorflow(RuntimeError("checksum does not match"), [])
    monkeypatch.setitem(sys.modules, "tensorflow", module)
    with pytest.raises(KerasWeightsError, match=r"undamaged, got an error .*checksum"):
        read_keras_weights(tmp_path / "m")
    reader = keras_files.Reader("cnn-checkpoint")
    monkeypatch.setitem(sys.modules, "tensorflow", keras_files.fake_tensorflow(reader, []))
    graph = reader.values["_CHECKPOINTABLE_OBJECT_GRAPH"]
    for length in range(0, len(graph), 211):
        reader.values["_CHECKPOINTABLE_OBJECT_GRAPH"] = graph[:length]
        with pytest.raises(KerasWeightsError):
            read_keras_weights(tmp_path / "m")
    (tmp_path / "n.index").touch()
    with pytest.raises(KerasWeightsError, match=r"one checkpoint, got .*m\.index.*n\.index"):
        read_keras_weights(tmp_path)


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["cnn.h5", "cnn.keras"])
def test_without_h5py(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keras_files.unpacked(file, tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        MissingPackageError, match=r"h5py: expected.*HDF5.*pip install h5py"
    ) as info:
        read_keras_weights(path)
    assert isinstance(info.value, ModuleNotFoundError)
    assert info.value.name == "h5py"


def test_without_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "variables.index").touch()
    with pytest.raises(
        ModuleNotFoundError, match=r"tensorflow: expected.*a SavedModel.*pip install tensorflow"
    ):
        read_keras_weights(tmp_path)


# --- .npz and the command -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["cnn.weights.h5", "siblings.h5", "cnn.keras"])
def test_npz_says_all_that_the_file_said(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = read_keras_weights(keras_files.unpacked(file, tmp_path))
    weights.save(tmp_path / "weights")
    monkeypatch.setitem(sys.modules, "h5py", None)
    again = read_keras_weights(tmp_path / "weights")
    assert (again.format, again.ordered) == (weights.format, weights.ordered)
    for ours, theirs in zip(again.layers, weights.layers, strict=True):
        assert [vars(layer) | {"arrays": None} for layer in (ours,)] == [
            vars(layer) | {"arrays": None} for layer in (theirs,)
        ]
        assert_same(list(ours.arrays), dict(enumerate(theirs.arrays)))  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = keras_files.unpacked("cnn.h5", tmp_path), tmp_path / "weights.npz"
    assert commands.main(["keras-weights", str(path), "--output", str(output)]) == 0
    listed = capsys.readouterr().out
    assert "features  Bayesian, 219 values" in listed
    assert "    kernel_posterior_loc                  float32 (3, 3, 2, 3)" in listed
    assert "plain  other, 16 values" in listed
    assert list(read_keras_weights(output)) == list(read_keras_weights(path))
    numbered = keras_files.unpacked("cnn.weights.h5", tmp_path)
    assert commands.main(["keras-weights", str(numbered)]) == 0
    assert "does not tell the order" in capsys.readouterr().out
    assert commands.main(["keras-weights", str(tmp_path / "none.h5")]) == 1
    assert "none.h5', where nothing is" in capsys.readouterr().err
    output.write_bytes(output.read_bytes()[:2000])
    assert commands.main(["keras-weights", str(output)]) == 1
    assert "undamaged" in capsys.readouterr().err


def test_a_result_is_a_mapping() -> None:
    one = LayerWeights("a", (np.zeros(2), np.zeros((3, 1))))
    weights = KerasWeights("here", "made by hand", [one])
    assert weights["a"][1].shape == (3, 1)
    assert dict(weights).keys() == {"a"}
    assert "here" in repr(weights)
    with pytest.raises(KeyError, match="expected one of"):
        weights.record("b")
    with pytest.raises(KerasWeightsError, match="got none"):
        KerasWeights("here", "made by hand", [])
    with pytest.raises(KerasWeightsError, match="distinct"):
        KerasWeights("here", "made by hand", [one, one])


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys) -> None:
    """The model became an .npz of its Bayesian weights, and was gone."""
    path = keras_files.unpacked("cnn.h5", tmp_path)
    before = path.read_bytes()
    link = tmp_path / "link.h5"
    link.symlink_to(path)
    for output in (path, link, tmp_path / "." / path.name):
        assert commands.main(["keras-weights", str(path), "--output", str(output)]) == 1
        assert "--output" in (error := capsys.readouterr().err)
        assert "expected another file than the one that is read" in error
    assert path.read_bytes() == before


def test_the_files_of_a_checkpoint_are_not_written_over(tmp_path: Path) -> None:
    """Given by its prefix, which is no file; what lies beside it may be written."""
    prefix, beside = tmp_path / "model", tmp_path / "out.npz"
    files = [tmp_path / "model.index", tmp_path / "model.data-00000-of-00001"]
    for path in (*files, beside):
        path.write_bytes(b"")
    for path in files:
        for source in (prefix, tmp_path):
            with pytest.raises(KerasWeightsError, match="expected another file"):
                cli._check_output(source, path)
    for source in (prefix, tmp_path):
        cli._check_output(source, beside)
