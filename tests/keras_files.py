"""The recorded weight files of tests/data/keras, and a stand-in for TensorFlow's reader."""

from __future__ import annotations

import gzip
import types
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent / "data" / "keras"


def unpacked(name: str, folder: Path) -> Path:
    """One recorded HDF5 file or archive, under its own name."""
    path = folder / name
    path.write_bytes(gzip.decompress((FOLDER / f"{name}.gz").read_bytes()))
    return path


def truth(model: str) -> dict[str, dict[str, np.ndarray]]:
    """layer -> variable -> array, in the order of get_weights()."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FOLDER / f"{model}.npz") as file:
        for key in file.files:
            layer, _, variable = key.rpartition("/")
            layers.setdefault(layer, {})[variable] = file[key]
    return layers


class Reader:
    """What ``tf.train.load_checkpoint`` returns, from its recorded answers."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.values: dict[str, Any] = {key: file[key] for key in file.files}
        graph = self.values.get("_CHECKPOINTABLE_OBJECT_GRAPH")
        if graph is not None:
            self.values["_CHECKPOINTABLE_OBJECT_GRAPH"] = graph.tobytes()

    def get_variable_to_shape_map(self) -> dict[str, Any]:
        return {key: list(getattr(value, "shape", [])) for key, value in self.values.items()}

    def get_tensor(self, key: str) -> Any:
        return self.values[key]


def fake_tensorflow(reader: Any, asked: list[str]) -> types.ModuleType:
    """A module with the one function that is used; ``asked`` collects the prefixes."""

    def load_checkpoint(prefix: str) -> Any:
        asked.append(prefix)
        if isinstance(reader, Exception):
            raise reader
        return reader

    module = types.ModuleType("tensorflow")
    module.train = types.SimpleNamespace(load_checkpoint=load_checkpoint)
    return module
