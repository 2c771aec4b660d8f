"""What a weight file holds, whatever its format: layers in order, each with its arrays."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]

_BAYESIAN_KIND = re.compile(
    r"conv[123]d_(reparameterization|flipout)"
    r"|dense_(reparameterization|local_reparameterization|flipout)"
)
# A key that no variable can have: those contain a slash.
_INDEX = "fastbconv_keras_weights"


class KerasWeightsError(ValueError):
    """A weight file that cannot be read, or that is no weight file."""


class MissingPackageError(ModuleNotFoundError):
    """A format that needs a package which is not installed; ``name`` says which."""

    def __init__(self, path: Any, what: str, package: str, error: ImportError) -> None:
        super().__init__(
            f"{package}: expected this package, since {path} is {what}, got {error}; "
            f"pip install {package}",
            name=package,
        )


def snake_case(name: str) -> str:
    """A class name as Keras writes it into names: ``Conv2DFlipout`` -> ``conv2d_flipout``."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def is_bayesian_kind(kind: str) -> bool:
    """Whether ``snake_case`` of a variational layer's class is this."""
    return _BAYESIAN_KIND.fullmatch(kind) is not None


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key by which ``dense_10`` follows ``dense_9``, and ``dense`` comes first."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


@dataclass(frozen=True)
class LayerWeights:
    """The variables of one layer, in the order of its ``get_weights()``.

    Attributes:
        name: unique in the file; with slashes for layers inside a nested model.
        arrays: NumPy arrays, trainable variables first.
        variables: their names (``kernel_posterior_loc``), or None where the format has none.
        kind: the class in Keras's spelling (``conv2d_flipout``), or None where unknown.
        named: False where the file does not know the layer's name; ``name`` is then its class and
            a number, or the attribute that held it.
        aliases: further names of it.

    Example:
        >>> layer = LayerWeights("head", (np.zeros((3, 2)), np.zeros((3, 2)), np.zeros(2)))
        >>> layer.shapes, layer.is_bayesian
        (((3, 2), (3, 2), (2,)), True)
    """

    name: str
    arrays: tuple[np.ndarray, ...]
    variables: tuple[str, ...] | None = None
    kind: str | None = None
    named: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the arrays."""
        return tuple(array.shape for array in self.arrays)

    @property
    def is_bayesian(self) -> bool:
        """Whether it is a variational layer, by the names of its variables, else its class, else
        by its first two arrays: loc and untransformed scale of one shape."""
        if self.variables is not None:
            return any("posterior" in name for name in self.variables)
        if self.kind is not None and is_bayesian_kind(self.kind):
            return True
        shapes = self.shapes
        return len(shapes) > 1 and len(shapes[0]) > 1 and shapes[0] == shapes[1]


class KerasWeights(Mapping[str, list[np.ndarray]]):
    """A weight file: a mapping from layer names to lists of arrays, in the file's order.

    Args:
        path: where it was read.
        kind: what it is, in words; the attribute ``format``.
        layers: the layers as records, with variable names.
        ordered: whether the order is that of the model. Files that number layers per class know
            the order within a class only.

    Raises:
        KerasWeightsError: no layers, or two of one name.

    Example:
        >>> weights = KerasWeights("x", "made by hand", [LayerWeights("head", (np.zeros(2),))])
        >>> list(weights)
        ['head']
    """

    def __init__(
        self, path: Any, kind: str, layers: Sequence[LayerWeights], ordered: bool = True
    ) -> None:
        self.path, self.format = os.fspath(path), kind
        self.layers, self.ordered = tuple(layers), ordered
        self._by_name = {layer.name: layer for layer in self.layers}
        if not self.layers:
            raise KerasWeightsError(f"{path}: expected weights of layers, got none ({kind})")
        if len(self._by_name) != len(self.layers):
            raise KerasWeightsError(
                f"{path}: expected distinct layers, got {[layer.name for layer in self.layers]}"
            )

    def __getitem__(self, name: str) -> list[np.ndarray]:
        return list(self.record(name).arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"KerasWeights({self.path!r}, {self.format}, {len(self)} layers)"

    def record(self, name: str) -> LayerWeights:
        """The layer of that name with all that is known of it.

        Raises:
            KeyError: no such layer.
        """
        if name not in self._by_name:
            raise KeyError(f"layer: expected one of {list(self._by_name)}, got {name!r}")
        return self._by_name[name]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz that ``read_keras_weights`` reads without further packages.

        Args:
            path: a file name; its keys are ``layer/variable``, or ``layer/number`` without names.
        """
        arrays: dict[str, np.ndarray] = {}
        index = []
        for layer in self.layers:
            names = layer.variables or tuple(map(str, range(len(layer.arrays))))
            for name, array in zip(names, layer.arrays, strict=True):
                arrays[f"{layer.name}/{name}"] = array
            index.append(
                {
                    "name": layer.name,
                    "keys": names,
                    "has_variable_names": layer.variables is not None,
                    "kind": layer.kind,
                    "named": layer.named,
                    "aliases": layer.aliases,
                }
            )
        text = json.dumps({"format": self.format, "ordered": self.ordered, "layers": index})
        with open(path, "wb") as file:  # np.savez adds a suffix to a name of its own choice
            np.savez(file, **{_INDEX: np.array(text)}, **arrays)


def checked_array(where: str, value: Any) -> np.ndarray:
    """A contiguous array of numbers, in this machine's byte order.

    Raises:
        KerasWeightsError: anything but numbers.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise KerasWeightsError(
            f"{where}: expected an array of numbers, got dtype {array.dtype}; it is not read"
        )
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def read_npz(path: Path) -> KerasWeights:
    """Reads what ``KerasWeights.save`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if _INDEX not in file.files:
                raise KerasWeightsError(
                    f"{path}: expected an .npz written by KerasWeights.save or by "
                    f"'python -m fastbconv keras-weights', got one with {file.files[:5]}"
                )
            index = json.loads(str(file[_INDEX]))
            layers = [_layer_of_index(path, file, item) for item in index["layers"]]
            return KerasWeights(path, index["format"], layers, bool(index["ordered"]))
    except KerasWeightsError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise damaged(path, "an .npz file", error) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise damaged(path, "an .npz file", error) from None


def _layer_of_index(path: Path, file: Any, item: dict[str, Any]) -> LayerWeights:
    name, keys = item["name"], tuple(item["keys"])
    arrays = tuple(checked_array(f"{path}: {name}/{key}", file[f"{name}/{key}"]) for key in keys)
    variables = keys if item["has_variable_names"] else None
    return LayerWeights(
        name, arrays, variables, item["kind"], bool(item["named"]), tuple(item["aliases"])
    )


def damaged(path: Any, what: str, error: Exception) -> KerasWeightsError:
    """The error for a file that breaks off or makes no sense."""
    message = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
    return KerasWeightsError(
        f"{path}: expected {what}, whole and undamaged, got an error while reading it ({reason}); "
        "copy or save it again"
    )
