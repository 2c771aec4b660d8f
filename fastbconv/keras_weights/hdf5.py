"""HDF5 files of Keras: those with names in attributes, and those with numbered variables.

Nothing but numbers and names is read: no configuration is run, no link to another file followed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .contents import (
    KerasWeights,
    KerasWeightsError,
    LayerWeights,
    MissingPackageError,
    checked_array,
    damaged,
    is_bayesian_kind,
    natural_key,
    snake_case,
)

_ARCHIVED = "model.weights.h5"
# Groups that hold the layers of a model, and say nothing about a layer.
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
_NO_LAYERS = ("optimizer", "metrics", "_metrics", "compile_metrics")
# No compressor of HDF5 does better on numbers; a file that claims more would fill the memory.
_HIGHEST_COMPRESSION = 2000


def read_hdf5(path: Path) -> KerasWeights:
    """Reads an HDF5 file of either layout.

    Raises:
        KerasWeightsError: another layout, or damage.
        MissingPackageError: h5py is not installed.
    """
    with _open(path, "an HDF5 file", path) as file:
        root = _member(path, file, "model_weights") if "model_weights" in file else file
        if "layer_names" in root.attrs or "layer_names0" in root.attrs:
            return KerasWeights(path, "Keras HDF5 with names", _named_layers(path, root))
        layers = _numbered_layers(path, file)
        if layers:
            named = all(layer.named for layer in layers)
            kind = "Keras .weights.h5" + ("" if named else " without layer names")
            return KerasWeights(path, kind, layers, ordered=False)
        raise KerasWeightsError(
            f"{path}: expected the weights of a Keras model (an attribute layer_names, or groups "
            f"with vars), got an HDF5 file with {sorted(file)[:6]}"
        )


def read_archive(path: Path) -> KerasWeights:
    """Reads a ``.keras`` archive: numbered variables, with the layers' names in ``config.json``.

    Raises:
        KerasWeightsError: another archive, or damage.
        MissingPackageError: h5py is not installed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _ARCHIVED not in names:
                raise KerasWeightsError(
                    f"{path}: expected a .keras archive with {_ARCHIVED}, got a zip file with "
                    f"{names[:5]}"
                )
            content = archive.read(_ARCHIVED)
            config = archive.read("config.json") if "config.json" in names else b"{}"
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise damaged(path, "a .keras archive or an .npz", error) from None
    except (NotImplementedError, RuntimeError) as error:  # encrypted, or an unknown compression
        raise damaged(path, "a .keras archive", error) from None
    with _open(f"{path}: {_ARCHIVED}", "an HDF5 file", io.BytesIO(content)) as file:
        layers = _numbered_layers(path, file)
    try:
        known = dict(_layers_of_config(json.loads(config)))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        known = {}  # a configuration of another kind: the file's own numbering stays
    ordered = _with_names(layers, known)
    kind = ".keras archive" + ("" if ordered else " without layer names")
    return KerasWeights(path, kind, layers if ordered is None else ordered, ordered is not None)


@contextlib.contextmanager
def _open(path: Any, what: str, source: Any) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise MissingPackageError(path, what, "h5py", error) from error
    try:
        with h5py.File(source, "r") as file:
            yield file
    except KerasWeightsError:
        raise
    # A damaged file can raise nearly anything while it is read.
    except Exception as error:
        raise damaged(path, what, error) from None


# --- names in attributes --------------------------------------------------------------------------


def _names(path: Any, group: Any, attribute: str) -> list[str]:
    """A list of names; Keras splits a long one into attribute0, attribute1, ..."""
    chunks = [group.attrs[attribute]] if attribute in group.attrs else []
    while f"{attribute}{len(chunks)}" in group.attrs:
        chunks.append(group.attrs[f"{attribute}{len(chunks)}"])
    if not chunks:
        raise KerasWeightsError(
            f"{path}: expected the attribute {attribute} on {group.name}, got {sorted(group.attrs)}"
        )
    names = [name for chunk in chunks for name in np.asarray(chunk).ravel().tolist()]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _named_layers(path: Any, root: Any) -> list[LayerWeights]:
    names = _names(path, root, "layer_names")
    if "top_level_model_weights" in root:  # variables of the model itself
        names.append("top_level_model_weights")
    layers: list[LayerWeights] = []
    for name in names:
        group = _member(path, root, name)
        layers += _layers_of_group(path, name, group, _names(path, group, "weight_names"))
    return layers


def _layers_of_group(path: Any, name: str, group: Any, names: list[str]) -> list[LayerWeights]:
    """One layer, or the layers of a nested model, whose variables all lie in one group."""
    found = [(*_split(full), _array(path, group, full)) for full in names]
    prefixes = {prefix for prefix, _, _ in found}
    owners = {prefix: _owner(name, prefix, len(prefixes) == 1) for prefix in prefixes}
    if len(set(owners.values())) != len(owners):
        owners = {prefix: f"{name}/{prefix}" for prefix in prefixes}
    layers: dict[str, list[tuple[str, np.ndarray]]] = {}
    for prefix, variable, array in found:
        layers.setdefault(owners[prefix], []).append((variable, array))
    return [
        LayerWeights(
            owner,
            tuple(array for _, array in pairs),
            tuple(variable for variable, _ in pairs),
            aliases=() if owner == name else (owner.rsplit("/", 1)[-1],),
        )
        for owner, pairs in layers.items()
    ]


def _split(full: str) -> tuple[str, str]:
    """``zeta/kernel_posterior_loc:0`` -> (``zeta``, ``kernel_posterior_loc``)."""
    prefix, _, variable = re.sub(r":\d+$", "", full).rpartition("/")
    return prefix, variable


def _owner(group: str, prefix: str, alone: bool) -> str:
    """The layer that a variable belongs to, by its group's name and its own prefix."""
    start = f"/{prefix}/".rfind(f"/{group}/")
    if start >= 0:  # model/layer, or outer/layer/inner layer
        return prefix[start:]
    last = prefix.rsplit("/", 1)[-1]
    if not prefix or (alone and re.fullmatch(re.escape(group) + r"_\d+", last)):
        return group  # built outside a name scope, or in one that TensorFlow made unique
    return f"{group}/{last}"


# --- numbered variables ---------------------------------------------------------------------------


def _numbered_layers(path: Any, file: Any) -> list[LayerWeights]:
    """All groups with a group ``vars``, in natural order of their paths."""
    found: list[LayerWeights] = []
    _walk(path, file, (), (), found, set())
    names = [layer.name for layer in found]
    return [layer for layer in found if names.count(layer.name) == 1] + [
        LayerWeights(layer.aliases[-1], layer.arrays, layer.variables, layer.kind, layer.named)
        for layer in found
        if names.count(layer.name) > 1
    ]


def _walk(
    path: Any,
    group: Any,
    parts: tuple[str, ...],
    given: tuple[str, ...],
    found: list[LayerWeights],
    seen: set[int],
) -> None:
    """Collects the layers below a group. ``given``: the names of the models around it."""
    import h5py

    address = h5py.h5o.get_info(group.id).addr
    if address in seen or (parts and parts[0] in _NO_LAYERS):
        return
    seen.add(address)
    own = given
    if "vars" in group:
        variables = _member(path, group, "vars")
        name = variables.attrs.get("name")
        name = name.decode() if isinstance(name, bytes) else name
        own = (*given, name) if isinstance(name, str) and parts else given
        layer = _numbered_layer(path, variables, parts, own if own != given else None)
        if layer is not None:
            found.append(layer)
    for key in sorted(set(group) - {"vars"}, key=natural_key):
        member = _member(path, group, key)
        # On Windows Keras once wrote its own separators into the names.
        inner = (*parts, *key.replace("\\", "/").split("/"))
        if isinstance(member, h5py.Group):
            _walk(path, member, inner, own, found, seen)


def _numbered_layer(
    path: Any, group: Any, parts: tuple[str, ...], given: tuple[str, ...] | None
) -> LayerWeights | None:
    keys = sorted(group, key=natural_key)
    if not keys:
        return None
    numbered = all(key.isdigit() for key in keys)
    if numbered and keys != list(map(str, range(len(keys)))):
        raise KerasWeightsError(
            f"{path}: expected variables 0 to {len(keys) - 1} in {group.name}, got {keys}"
        )
    arrays = tuple(_array(path, group, key) for key in keys)
    short = [part for part in parts if part not in _CONTAINERS]
    kind = re.sub(r"_\d+$", "", short[-1]) if short else ""
    in_container = len(parts) > 1 and parts[-2] in _CONTAINERS
    name = "/".join(short) or "model"
    return LayerWeights(
        name if given is None else "/".join(given),
        arrays,
        None if numbered else tuple(keys),
        kind if in_container or is_bayesian_kind(kind) else None,
        named=given is not None,
        aliases=(given[-1] if given else name, "/".join(parts)),
    )


def _layers_of_config(
    config: Mapping[str, Any], raw: tuple[str, ...] = (), given: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, str]]]:
    """(path in the file, (name, class)) of all layers of a model's configuration, in order."""
    numbers: dict[str, int] = {}
    for layer in config["config"]["layers"]:
        kind = snake_case(layer["class_name"].rsplit(">", 1)[-1])
        number = numbers[kind] = numbers.get(kind, -1) + 1
        path = (*raw, f"{kind}_{number}" if number else kind)
        name = (*given, layer["config"]["name"])
        yield "/".join(path), ("/".join(name), kind)
        if isinstance(layer["config"].get("layers"), list):
            yield from _layers_of_config(layer, path, name)


def _with_names(
    layers: list[LayerWeights], known: dict[str, tuple[str, str]]
) -> list[LayerWeights] | None:
    """The layers with their names, in the model's order; None where one is not known."""
    order = {path: position for position, path in enumerate(known)}
    renamed = []
    for layer in layers:
        raw = "/".join(p for p in layer.aliases[-1].split("/") if p not in _CONTAINERS)
        outer = raw
        while outer and outer not in known:  # a layer inside a wrapper
            outer = outer.rpartition("/")[0]
        if not outer:
            return None
        name, kind = known[outer]
        name += raw[len(outer) :]
        alias = (name.rsplit("/", 1)[-1],)
        kind = kind if outer == raw else None
        record = LayerWeights(name, layer.arrays, layer.variables, kind, aliases=alias)
        renamed.append((order[outer], record))
    return [record for _, record in sorted(renamed, key=lambda pair: pair[0])]


# --- members --------------------------------------------------------------------------------------


def _member(path: Any, group: Any, name: str) -> Any:
    """A member of a group that lies in this very file."""
    import h5py

    current = group
    for part in name.split("/"):
        link = current.get(part, getlink=True) if isinstance(current, h5py.Group) else None
        if link is None:
            raise KerasWeightsError(f"{path}: expected {name!r} in {group.name}, got none")
        if not isinstance(link, h5py.HardLink):
            raise KerasWeightsError(
                f"{path}: expected {name!r} of {group.name} in the file itself, got a link to "
                "elsewhere; it is not followed"
            )
        current = current[part]
    return current


def _array(path: Any, group: Any, name: str) -> np.ndarray:
    import h5py

    where = f"{path}: {group.name}/{name}"
    dataset = _member(path, group, name)
    if not isinstance(dataset, h5py.Dataset):
        raise KerasWeightsError(f"{where}: expected an array, got a group")
    if dataset.is_virtual or dataset.external:
        raise KerasWeightsError(f"{where}: expected numbers in the file, got a link to elsewhere")
    if dataset.dtype.kind not in "fiub":
        checked_array(where, np.empty(0, dataset.dtype))
    stored = dataset.id.get_storage_size()
    plain = dataset.id.get_create_plist().get_nfilters() == 0
    if dataset.nbytes > stored * (1 if plain else _HIGHEST_COMPRESSION):
        raise KerasWeightsError(
            f"{where}: expected {dataset.nbytes} bytes for its shape {dataset.shape}, got {stored}"
        )
    return checked_array(where, dataset[()])
