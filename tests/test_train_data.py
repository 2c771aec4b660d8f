"""Readers of data files and the split: small files written here, whole and damaged."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fastbconv.train import cli, data, readers
from fastbconv.train.settings import TrainError

RNG = np.random.default_rng(0)


def cifar_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 10
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def write_cifar_binary(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        pixels, labels = written[name] = cifar_arrays(20)
        records = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return written


def write_cifar_python(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        pixels, labels = written[name] = cifar_arrays(20)
        # Keys and protocol as in the published files, which Python 2 wrote.
        content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"one of five"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return written


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, compress: bool = False) -> dict[str, np.ndarray]:
    written = {}
    for stem, count in (("train", 60), ("t10k", 20)):
        written[f"{stem}-images-idx3"] = RNG.integers(0, 256, (count, 9, 7), dtype=np.uint8)
        written[f"{stem}-labels-idx1"] = np.arange(count, dtype=np.uint8) % 5
    for name, array in written.items():
        path = folder / f"{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return written


def write_images(folder: Path, mode: str = "RGB", count: int = 8) -> dict[str, np.ndarray]:
    written = {}
    for label in ("cat", "dog", "emu"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            shape = (6, 5, 3) if mode == "RGB" else (6, 5)
            picture = RNG.integers(0, 256, shape, dtype=np.uint8)
            name = f"{label}/{number:02d}.png"
            Image.fromarray(picture).save(folder / name)
            written[name] = picture
    return written


# --- What is whole -------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_cifar_binary, write_cifar_python])
@pytest.mark.parametrize("nested", [False, True])
def test_cifar(tmp_path: Path, write: Callable, nested: bool) -> None:
    name = "cifar-10-batches-bin" if write is write_cifar_binary else "cifar-10-batches-py"
    folder = tmp_path / name if nested else tmp_path
    folder.mkdir(exist_ok=True)
    written = write(folder)
    raw = readers.read_folder(tmp_path)
    assert raw.images.shape == (100, 3, 32, 32)
    assert raw.classes[3] == "cat"
    pixels, labels = written["data_batch_2"]
    np.testing.assert_array_equal(raw.images[20:40].reshape(20, -1), pixels)
    np.testing.assert_array_equal(raw.labels[20:40], labels)
    np.testing.assert_array_equal(
        raw.test_images[5, 2].ravel(), written["test_batch"][0][5, 2048:]
    )  # the third channel is blue


@pytest.mark.parametrize("compress", [False, True])
def test_idx(tmp_path: Path, compress: bool) -> None:
    written = write_idx(tmp_path, compress)
    raw = readers.read_folder(tmp_path)
    np.testing.assert_array_equal(raw.images[:, 0], written["train-images-idx3"])
    np.testing.assert_array_equal(raw.test_labels, written["t10k-labels-idx1"])
    assert raw.images.shape == (60, 1, 9, 7)
    found = data.load(str(tmp_path))
    assert len(found.train) + len(found.validation) == 60
    assert len(found.test) == 20
    assert found.image_shape == (1, 9, 7)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folder_of_images(tmp_path: Path, mode: str, channels: int) -> None:
    written = write_images(tmp_path, mode)
    raw = readers.read_folder(tmp_path)
    assert raw.classes == ("cat", "dog", "emu")
    assert raw.images.shape == (24, channels, 6, 5)
    picture = written["dog/03.png"].reshape(6, 5, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(raw.images[11], picture)
    assert raw.labels[11] == 1
    assert raw.test_images is None
    assert len(data.load(str(tmp_path)).test) == 6


def test_folder_of_images_with_a_test_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", count=3)
    found = data.load(str(tmp_path), image_size=(10, 12))
    assert (len(found.test), found.image_shape) == (9, (3, 10, 12))


def test_digits_are_split_once_and_for_all() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert (len(first.train), len(first.validation), len(first.test)) == (1144, 203, 450)
    assert torch.equal(first.test.images, second.test.images)
    images, labels = first.train.batch(slice(0, 10))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    whole, _ = first.train.batch(slice(None))
    assert (whole.min(), whole.max()) == (0.0, 1.0)
    shares = torch.bincount(first.test.labels, minlength=10) / len(first.test)
    assert (shares - 0.1).abs().max() < 0.01
    seen = [part.images.flatten(1) for part in (first.train, first.validation, first.test)]
    every = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    for ours, theirs in zip(
        torch.cat(seen).unique(dim=0, return_counts=True),
        every.unique(dim=0, return_counts=True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)  # each image once, in one part


def test_held_out_classes_leave_training_and_validation_only() -> None:
    found = data.load("digits")
    without = found.without_held_out()
    assert found.held_out == (8, 9)
    assert set(without.train.labels.tolist()) == set(range(8))
    assert set(without.validation.labels.tolist()) == set(range(8))
    assert len(without.test) == len(found.test)


def test_three_classes_hold_nothing_out(tmp_path: Path) -> None:
    write_images(tmp_path)
    assert data.load(str(tmp_path)).held_out == ()


# --- What is not ---------------------------------------------------------------------------------


def cut(path: Path, size: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-size])


class Evil:
    """A pickle that runs a command when it is loaded by the ordinary unpickler."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo ran > /dev/null",)


def case(name: str, write: Callable, damage: Callable[[Path], object], says: str):
    return pytest.param(write, damage, says, id=name)


def relabel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] = 77
    path.write_bytes(bytes(content))


BAD = [
    case(
        "binary cut", write_cifar_binary, lambda p: cut(p / "data_batch_3.bin"), "records of 3073"
    ),
    case(
        "binary empty",
        write_cifar_binary,
        lambda p: (p / "test_batch.bin").write_bytes(b""),
        "got 0",
    ),
    case(
        "binary absent", write_cifar_binary, lambda p: (p / "data_batch_4.bin").unlink(), "got none"
    ),
    case("binary label", write_cifar_binary, lambda p: relabel(p / "data_batch_1.bin"), "0 to 9"),
    case("pickle cut", write_cifar_python, lambda p: cut(p / "data_batch_2"), "damaged or another"),
    case(
        "pickle code",
        write_cifar_python,
        lambda p: (p / "data_batch_2").write_bytes(pickle.dumps(Evil())),
        "it asks for",
    ),
    case(
        "pickle of a list",
        write_cifar_python,
        lambda p: (p / "test_batch").write_bytes(pickle.dumps([1, 2])),
        "pickled dict",
    ),
    case(
        "pickle of another shape",
        write_cifar_python,
        lambda p: (p / "test_batch").write_bytes(
            pickle.dumps({"data": np.zeros((4, 3), np.uint8), "labels": [0] * 4})
        ),
        "shape (N, 3072)",
    ),
    case("idx cut", write_idx, lambda p: cut(p / "train-images-idx3-ubyte"), "cut off or damaged"),
    case(
        "idx header",
        write_idx,
        lambda p: (p / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\7"),
        "magic number 00000801",
    ),
    case(
        "idx swapped",
        write_idx,
        lambda p: (p / "train-images-idx3-ubyte").write_bytes(idx(np.zeros(60, np.uint8))),
        "magic number 00000803",
    ),
    case("idx absent", write_idx, lambda p: (p / "t10k-labels-idx1-ubyte").unlink(), "t10k-labels"),
    case(
        "idx counts",
        write_idx,
        lambda p: (p / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8))),
        "as many labels as images",
    ),
    case(
        "gzip cut",
        lambda p: write_idx(p, compress=True),
        lambda p: cut(p / "train-images-idx3-ubyte.gz"),
        "whole gzip file",
    ),
    case(
        "gzip that is none",
        lambda p: write_idx(p, compress=True),
        lambda p: (p / "train-images-idx3-ubyte.gz").write_bytes(b"hello"),
        "whole gzip file",
    ),
    case("image cut", write_images, lambda p: cut(p / "dog" / "01.png", 60), "expected an image"),
    case(
        "image of text",
        write_images,
        lambda p: (p / "cat" / "00.png").write_text("no"),
        "expected an image",
    ),
    case(
        "image size",
        write_images,
        lambda p: Image.new("RGB", (9, 9)).save(p / "cat" / "05.png"),
        "--image-size",
    ),
    case("few images", lambda p: write_images(p, count=2), lambda _: None, "5 training images"),
    case("empty folder", lambda _: None, lambda _: None, "got none of them"),
]


@pytest.mark.parametrize(("write", "damage", "says"), BAD)
def test_damaged_files_get_one_sentence(
    write: Callable, damage: Callable, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    damage(folder)
    status = cli.main(["--data", str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert status == 2
    assert says in printed.err
    assert printed.err.startswith("fastbconv train: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()  # nothing is begun with data that cannot be read


@pytest.mark.parametrize("there", [False, True])
def test_data_that_is_no_folder(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    if there:
        path.write_bytes(b"x")
    with pytest.raises(TrainError, match="expected 'digits' or a folder, got"):
        data.load(str(path))
