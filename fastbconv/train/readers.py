"""Readers of data files: CIFAR-10 (binary, python), IDX, folders of images.

A reader believes nothing: sizes, labels and counts are checked against the file, and what does not
fit raises a TrainError that names the file and says what was expected.
"""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .settings import TrainError

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_IDX_FOLDERS = ("MNIST/raw", "FashionMNIST/raw", "raw")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"} | {
    ".pgm"
}


@dataclass(frozen=True)
class RawData:
    """What a reader found.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, below ``len(classes)``.
        divisor: value of a white pixel.
        test_images: where the data set has test images of its own.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    divisor: float = 255.0
    test_images: np.ndarray | None = None
    test_labels: np.ndarray | None = None


def read_folder(path: Path, image_size: tuple[int, int] | None = None) -> RawData:
    """Recognises what a folder holds by its file names, and reads it.

    Args:
        path: CIFAR-10 in its binary or python layout, IDX files, or a folder of images per class.
        image_size: (height, width) that the images of a folder of images are scaled to.

    Raises:
        TrainError: nothing known there, or a file that is damaged.
    """
    if not path.is_dir():
        kind = "a file" if path.exists() else "nothing there"
        raise TrainError(f"--data {path}: expected 'digits' or a folder, got {kind}")
    for folder in (path, *(path / name for name in _CIFAR_FOLDERS)):
        if (folder / "test_batch.bin").exists() or (folder / "data_batch_1.bin").exists():
            return _cifar(folder, ".bin", _read_cifar_binary)
        if (folder / "test_batch").exists() or (folder / "data_batch_1").exists():
            return _cifar(folder, "", _read_cifar_python)
    for folder in (path, *(path / name for name in _IDX_FOLDERS)):
        if _find_idx(folder, "train-images") or _find_idx(folder, "train-labels"):
            return _idx_data(folder)
    return _image_folders(path, image_size)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except FileNotFoundError:
        raise TrainError(f"{path}: expected this file of the data set, got none") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TrainError(
            f"{path}: expected a whole gzip file, got a damaged one ({error})"
        ) from None
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror or error})") from None


# --- CIFAR-10 -----------------------------------------------------------------------------------


def _cifar(
    folder: Path, suffix: str, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> RawData:
    parts = [read(folder / (name + suffix)) for name in _CIFAR_BATCHES]
    test_images, test_labels = read(folder / f"test_batch{suffix}")
    return RawData(
        name="CIFAR-10",
        images=np.concatenate([images for images, _ in parts]),
        labels=np.concatenate([labels for _, labels in parts]),
        classes=CIFAR_CLASSES,
        test_images=test_images,
        test_labels=test_labels,
    )


def _read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3072 pixel bytes, channel by channel."""
    content = np.frombuffer(_read_bytes(path), dtype=np.uint8)
    record = 1 + int(np.prod(_CIFAR_SHAPE))
    if content.size == 0 or content.size % record != 0:
        raise TrainError(
            f"{path}: expected records of {record} bytes (CIFAR-10, binary), got {content.size} "
            "bytes; the file is cut off or of another kind"
        )
    content = content.reshape(-1, record)
    labels = _checked_labels(path, content[:, 0], len(CIFAR_CLASSES))
    return content[:, 1:].reshape(-1, *_CIFAR_SHAPE).copy(), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, numbers, strings and containers, and nothing else: a pickle can run code."""

    _multiarray = (getattr(np, "_core", None) or np.core).multiarray  # numpy 1 has np.core only
    _NAMES: ClassVar[dict[str, object]] = {
        "_reconstruct": _multiarray._reconstruct,
        "scalar": _multiarray.scalar,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }
    _MODULES = frozenset(
        {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs", "codecs"}
    )

    def find_class(self, module: str, name: str) -> object:
        """The few names that a pickled array needs."""
        if module not in self._MODULES or name not in self._NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._NAMES[name]


def _read_cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict with ``data`` (N, 3072) uint8 and ``labels``, a list of N."""
    content = _read_bytes(path)
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in found.items()}
        pixels, labels = np.asarray(fields["data"]), np.asarray(fields["labels"])
    # A damaged pickle can raise nearly anything while it is read.
    except Exception as error:
        raise TrainError(
            f"{path}: expected a CIFAR-10 batch (a pickled dict with data and labels), got a "
            f"damaged or another file ({type(error).__name__}: {error})"
        ) from None
    width = int(np.prod(_CIFAR_SHAPE))
    if pixels.dtype != np.uint8 or pixels.shape != (labels.size, width) or labels.ndim != 1:
        raise TrainError(
            f"{path}: expected data of shape (N, {width}), uint8, and N labels, got "
            f"{pixels.dtype} {pixels.shape} and {labels.shape} labels"
        )
    if labels.size == 0:
        raise TrainError(f"{path}: expected images, got none")
    labels = _checked_labels(path, labels, len(CIFAR_CLASSES))
    return pixels.reshape(-1, *_CIFAR_SHAPE), labels


def _checked_labels(path: Path, labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        got = f"{labels.min()} to {labels.max()}" if labels.dtype.kind in "iu" else labels.dtype
        raise TrainError(f"{path}: expected labels from 0 to {classes - 1}, got {got}")
    return labels.astype(np.int64)


# --- IDX: (Fashion-)MNIST -----------------------------------------------------------------------


def _find_idx(folder: Path, stem: str) -> Path | None:
    """``train-images-idx3-ubyte``, ``train-images.idx3-ubyte``, each also with .gz."""
    rank = 3 if stem.endswith("images") else 1
    names = [f"{stem}{dot}idx{rank}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).exists()), None)


def _idx_data(folder: Path) -> RawData:
    arrays = []
    for stem in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        rank = 3 if stem.endswith("images") else 1
        path = _find_idx(folder, stem)
        if path is None:
            raise TrainError(
                f"{folder}: expected {stem}-idx{rank}-ubyte (or with .gz) beside the others, "
                "got no such file"
            )
        arrays.append(_read_idx(path, rank))
    images, labels, test_images, test_labels = arrays
    for kind, pictures, names in (("train", images, labels), ("t10k", test_images, test_labels)):
        if len(pictures) != len(names) or len(names) == 0:
            raise TrainError(
                f"{folder}: expected as many labels as images in the {kind} files, "
                f"got {len(names)} and {len(pictures)}"
            )
    if images.shape[1:] != test_images.shape[1:] or 0 in images.shape:
        raise TrainError(
            f"{folder}: expected training and test images of one size, "
            f"got {images.shape[1:]} and {test_images.shape[1:]}"
        )
    classes = int(labels.max()) + 1
    return RawData(
        name=f"IDX files in {folder.resolve().name}",
        images=images[:, None],
        labels=labels.astype(np.int64),
        classes=tuple(map(str, range(classes))),
        test_images=test_images[:, None],
        test_labels=_checked_labels(folder / "t10k labels", test_labels, classes),
    )


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """Big-endian: two zero bytes, type 8 (uint8), rank, one uint32 per dimension, the values."""
    content = _read_bytes(path)
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes((0, 0, 8, rank)):
        raise TrainError(
            f"{path}: expected an IDX file of {rank} dimension(s) of bytes (magic number "
            f"0000080{rank}), got {content[:4].hex() or 'an empty file'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=rank, offset=4))
    count = 1
    for size in shape:
        count *= size
    if len(content) - header != count:
        raise TrainError(
            f"{path}: expected {count} values for the shape {shape} of its header, got "
            f"{len(content) - header}; the file is cut off or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


# --- Folders of images --------------------------------------------------------------------------


def _image_folders(path: Path, image_size: tuple[int, int] | None) -> RawData:
    train = path / "train" if (path / "train").is_dir() else path
    classes = _class_folders(train)
    if not classes:
        raise TrainError(
            f"--data {path}: expected CIFAR-10 batches, IDX files or a folder of images per "
            "class, got none of them"
        )
    test = next((path / n for n in ("test", "val") if train != path and (path / n).is_dir()), None)
    if test is not None and _class_folders(test) != classes:
        raise TrainError(f"{test}: expected the classes of {train}, got {_class_folders(test)}")
    labelled = [_labelled_files(folder, classes) for folder in (train, test) if folder is not None]
    images = _read_images([file for files, _ in labelled for file in files], image_size)
    count = len(labelled[0][0])
    return RawData(
        name=f"images in {path.resolve().name}",
        images=images[:count],
        labels=labelled[0][1],
        classes=tuple(classes),
        test_images=images[count:] if test is not None else None,
        test_labels=labelled[1][1] if test is not None else None,
    )


def _class_folders(path: Path) -> list[str]:
    return sorted(
        folder.name for folder in path.iterdir() if folder.is_dir() and _image_files(folder)
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)


def _labelled_files(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    files = [_image_files(folder / name) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
    return [file for found in files for file in found], labels


def _read_images(files: list[Path], image_size: tuple[int, int] | None) -> np.ndarray:
    """(N, 1, H, W) where all are grey, else (N, 3, H, W)."""
    from PIL import Image

    pictures, grey = [], True
    for file in files:
        try:
            with Image.open(file) as image:
                grey = grey and image.mode in ("1", "L")
                image = image.convert("RGB")
                if image_size is not None and image.size != image_size[::-1]:
                    image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
                pictures.append(np.asarray(image, dtype=np.uint8))
        # PIL raises many classes for a file that is none of its formats.
        except Exception as error:
            raise TrainError(
                f"{file}: expected an image, got a damaged or another file ({type(error).__name__})"
            ) from None
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{p.shape[0]}x{p.shape[1]}" for p in (pictures[0], pictures[-1])]
            raise TrainError(
                f"{file}: expected {sizes[0]} pixels as the first image has, got {sizes[1]}; "
                "give --image-size to scale all of them"
            )
    stacked = np.stack(pictures).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked[:, :1] if grey else stacked)
