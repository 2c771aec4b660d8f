"""What kind of file is it? By its first bytes, not by its name."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from .checkpoint import find_prefix, read_checkpoint
from .contents import KerasWeights, KerasWeightsError, read_npz
from .hdf5 import read_archive, read_hdf5

_HDF5 = b"\x89HDF\r\n\x1a\n"
_FORMATS = (
    "an HDF5 file (.h5, .weights.h5), a .keras archive, a SavedModel folder, a TensorFlow "
    "checkpoint or an .npz of KerasWeights.save"
)
# What else may lie there: first bytes, and what to say.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with 'git lfs pull'"),
    (b"\x80", "a pickle, which is not read because it can run code; save the weights in Keras"),
    (b"\x93NUMPY", "a single NumPy array"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
)


def read_keras_weights(path: str | os.PathLike[str]) -> KerasWeights:
    """Reads the weights that Keras or TensorFlow saved.

    Args:
        path: an HDF5 file of Keras 2 or 3 (weights or whole model), a ``.keras`` archive, a
            SavedModel folder, the prefix of a TensorFlow checkpoint, or an ``.npz`` that
            ``KerasWeights.save`` wrote. HDF5 needs h5py, the TensorFlow formats need tensorflow.

    Returns:
        A mapping from layer names to lists of arrays, in the order of ``get_weights()``.
        Variables of optimisers and metrics are left out.

    Raises:
        FileNotFoundError: nothing there.
        KerasWeightsError: a ValueError; another kind of file, or a damaged one.
        ModuleNotFoundError: h5py or tensorflow is needed and not installed.

    Example:
        >>> import tempfile, numpy as np
        >>> from fastbconv.keras_weights import LayerWeights
        >>> layer = LayerWeights("conv", (np.zeros((5, 5, 3, 64)),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     KerasWeights("x", "made by hand", [layer]).save(f"{folder}/model.npz")
        ...     weights = read_keras_weights(f"{folder}/model.npz")
        >>> {name: [a.shape for a in arrays] for name, arrays in weights.items()}
        {'conv': [(5, 5, 3, 64)]}
    """
    path = Path(path)
    checkpoint = find_prefix(path)
    if checkpoint is not None:
        return read_checkpoint(path, *checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"path: expected {_FORMATS}, got {str(path)!r}, where nothing is")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise KerasWeightsError(f"{path}: expected a file that can be read, got {error}") from None
    if start.startswith(_HDF5):
        return read_hdf5(path)
    if start.startswith(b"PK"):
        return read_npz(path) if _is_npz(path) else read_archive(path)
    kind = next((text for magic, text in _OTHERS if start.startswith(magic)), None)
    if path.name == "saved_model.pb":
        kind = "the program of a SavedModel; give the folder that it lies in"
    if kind is None:
        kind = f"a file that starts with {start[:8]!r}" if start else "an empty file"
    raise KerasWeightsError(f"{path}: expected {_FORMATS}, got {kind}")


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False  # the reader of archives will say what is wrong
