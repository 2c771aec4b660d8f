"""Files that are no weight files, or no longer: a clear error, and nothing is ever run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras_files
import numpy as np
import pytest

from fastbconv.keras_weights import KerasWeightsError, read_keras_weights


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"some text", "starts with b'some tex'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*git lfs pull"),
        (b"\x80\x04\x95 pickled", "got a pickle, which is not read because it can run code"),
        (b"\x93NUMPY\x01", "a single NumPy array"),
        (b"\x1f\x8b\x08 gzip", "unpack it first"),
        (b"\x89HDF\r\n\x1a\n and nothing", "expected an HDF5 file, whole and undamaged"),
        (b"PK\x03\x04 and nothing", "expected a .keras archive or an .npz, whole and undamaged"),
        (zipped(a=b"1"), r"with model\.weights\.h5, got a zip file with \['a'\]"),
        (zipped(model__weights__h5=b"no HDF5"), r"model\.weights\.h5: expected an HDF5 file"),
        (zipped(a__npy=b"no array"), r"got one with \['a'\]"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    path.write_bytes(content)
    with pytest.raises(KerasWeightsError, match=message):
        read_keras_weights(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="where nothing is"):
        read_keras_weights(tmp_path / "none")
    with pytest.raises(KerasWeightsError, match="got a folder with neither"):
        read_keras_weights(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(KerasWeightsError, match="give the folder"):
        read_keras_weights(tmp_path / "saved_model.pb")


@pytest.mark.parametrize(
    "file", ["cnn.h5", "cnn.weights.h5", "cnn.keras", "sub.weights.h5", "cnn-whole.h5"]
)
def test_cut_off_anywhere(file: str, tmp_path: Path) -> None:
    path = keras_files.unpacked(file, tmp_path)
    content = path.read_bytes()
    for length in [*range(0, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(KerasWeightsError):
            read_keras_weights(path)


def test_damaged_npz(tmp_path: Path) -> None:
    path = keras_files.unpacked("sub.h5", tmp_path)
    weights, saved = read_keras_weights(path), tmp_path / "weights.npz"
    weights.save(saved)
    content = saved.read_bytes()
    for length in range(100, len(content), len(content) // 30):
        saved.write_bytes(content[:length])
        with pytest.raises(KerasWeightsError):
            read_keras_weights(saved)


def test_pickled_arrays_are_not_unpickled(tmp_path: Path) -> None:
    path, made = tmp_path / "weights.npz", tmp_path / "made"
    trap = np.empty(1, object)
    trap[0] = Trap(made)
    np.savez(path, fastbconv_keras_weights=trap)
    with pytest.raises(KerasWeightsError, match="allow_pickle=False"):
        read_keras_weights(path)
    path.write_bytes(pickle.dumps(Trap(made)))
    with pytest.raises(KerasWeightsError, match="got a pickle"):
        read_keras_weights(path)
    assert not made.exists()


def write_hdf5(path: Path, fill: Callable[[Any], None]) -> Path:
    with h5py.File(path, "w") as file:
        fill(file.create_group("layers/dense/vars"))
    return path


def strings(group: Any) -> None:
    group["0"] = ["text", "more"]


def raw(group: Any) -> None:
    group["0"] = np.zeros(3, "V2")


def gap(group: Any) -> None:
    group["0"], group["2"] = np.zeros(1), np.zeros(1)


def nested(group: Any) -> None:
    group.create_group("0")


def outside(group: Any) -> None:
    group["0"] = h5py.ExternalLink("other.h5", "/secret")


def soft(group: Any) -> None:
    group["0"] = h5py.SoftLink("/layers")


def unwritten(group: Any) -> None:
    group.create_dataset("0", (10**12,), "f4")


def unwritten_chunks(group: Any) -> None:
    group.create_dataset("0", (10**12,), "f4", chunks=(1000,), compression="gzip")


def file_outside(group: Any) -> None:
    group.create_dataset("0", (4,), "u1", external=[("secret", 0, 4)])


def virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    group.create_virtual_dataset("0", layout)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (strings, "vars/0: expected an array of numbers, got dtype object; it is not read"),
        (raw, r"got dtype \|V2"),
        (gap, r"expected variables 0 to 1 in /layers/dense/vars, got \['0', '2'\]"),
        (nested, "expected an array, got a group"),
        (outside, "got a link to elsewhere; it is not followed"),
        (soft, "got a link to elsewhere; it is not followed"),
        (unwritten, "expected 4000000000000 bytes .* got 0"),
        (unwritten_chunks, "expected 4000000000000 bytes .* got 0"),
        (file_outside, "numbers in the file, got a link to elsewhere"),
        (virtual, "numbers in the file, got a link to elsewhere"),
    ],
)
def test_hdf5_with_other_contents(
    fill: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(KerasWeightsError, match=message):
        read_keras_weights(write_hdf5(tmp_path / "w.h5", fill))


def test_compressed_hdf5_is_read(tmp_path: Path) -> None:
    def fill(group: Any) -> None:
        group.create_dataset("0", data=np.ones((64, 64)), compression="gzip")

    weights = read_keras_weights(write_hdf5(tmp_path / "w.h5", fill))
    assert weights["dense"][0].sum() == 64 * 64


def test_groups_in_a_circle(tmp_path: Path) -> None:
    def fill(group: Any) -> None:
        group["0"] = np.ones(2)
        group.file["layers/again"] = group.file["layers"]

    assert list(read_keras_weights(write_hdf5(tmp_path / "w.h5", fill))) == ["dense"]


def test_hdf5_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(KerasWeightsError, match=r"attribute layer_names.*got .*\['data'\]"):
        read_keras_weights(path)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"gone"]
    with pytest.raises(KerasWeightsError, match="expected 'gone' in /, got none"):
        read_keras_weights(path)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"bare"]
        file.create_group("bare")
    with pytest.raises(KerasWeightsError, match="expected the attribute weight_names on /bare"):
        read_keras_weights(path)
    with h5py.File(path, "w") as file:
        file.create_group("layers/flatten/vars")
    with pytest.raises(KerasWeightsError, match="expected the weights of a Keras model"):
        read_keras_weights(path)
