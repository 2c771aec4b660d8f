"""TensorFlow checkpoints and SavedModels, through TensorFlow's own reader.

A checkpoint is a table of arrays with a description of the objects that held them. The layers are
found in that description: a layer is an object that holds a variable under the variable's own name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .contents import (
    KerasWeights,
    KerasWeightsError,
    LayerWeights,
    MissingPackageError,
    checked_array,
    damaged,
    natural_key,
)

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"
# Other ways to the layers, and what is no layer at all.
_NO_LAYERS = {
    *("keras_api", "variables", "trainable_variables", "non_trainable_variables"),
    *("regularization_losses", "signatures", "optimizer", "metrics", "save_counter"),
}
# The order of creation in a variational layer, for files that do not tell it.
_CREATED = tuple(
    f"{part}_{role}_{name}"
    for part in ("kernel", "bias")
    for role in ("posterior", "prior")
    for name in ("loc", "untransformed_scale")
)


def find_prefix(path: Path) -> tuple[str, str] | None:
    """(what TensorFlow's reader takes, what it is) for a folder or a checkpoint; else None.

    Raises:
        KerasWeightsError: a folder without exactly one checkpoint.
    """
    if path.is_dir():
        if (path / "variables" / "variables.index").exists():
            return str(path / "variables" / "variables"), "SavedModel"
        if (path / "checkpoint").exists():
            return str(path), "TensorFlow checkpoint"
        found = sorted(path.glob("*.index"))
        if len(found) == 1:
            return str(found[0].with_suffix("")), "TensorFlow checkpoint"
        raise KerasWeightsError(
            f"{path}: expected a SavedModel (with variables/variables.index) or one checkpoint, "
            f"got a folder with {[file.name for file in found] or 'neither'}"
        )
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(path))
    return (prefix, "TensorFlow checkpoint") if Path(f"{prefix}.index").exists() else None


def read_checkpoint(path: Path, prefix: str, kind: str) -> KerasWeights:
    """Reads a checkpoint by ``tf.train.load_checkpoint``.

    Raises:
        KerasWeightsError: damage, or no layers.
        MissingPackageError: tensorflow is not installed.
    """
    try:
        tensorflow = importlib.import_module("tensorflow")
    except ImportError as error:
        article = "a" if kind[0] in "TS" else "an"
        raise MissingPackageError(path, f"{article} {kind}", "tensorflow", error) from error
    try:
        reader = tensorflow.train.load_checkpoint(prefix)
        keys = sorted(reader.get_variable_to_shape_map(), key=natural_key)
        if _GRAPH in keys:
            found = list(_layers_of_graph(_parse_graph(reader.get_tensor(_GRAPH))))
        else:
            found = list(_layers_of_names(keys))
        layers = _read_layers(path, reader, found)
    except KerasWeightsError:
        raise
    # TensorFlow has errors of its own, and a damaged description can cause nearly any.
    except Exception as error:
        raise damaged(path, f"a {kind}", error) from None
    return KerasWeights(path, kind, layers, ordered=_GRAPH in keys)


@dataclass
class _Found:
    """A layer before its arrays are read: names of variables and their keys."""

    prefix: str
    path: str
    variables: dict[str, str] = field(default_factory=dict)


def _read_layers(path: Path, reader: Any, found: list[_Found]) -> list[LayerWeights]:
    """Layers by the shortest name that no other has: their own, that with scopes, the path."""
    layers = []
    for layer in found:
        candidates = [layer.prefix.rsplit("/", 1)[-1], layer.prefix, layer.path]
        names = [name for name in candidates if name]
        rivals = [
            {other.prefix.rsplit("/", 1)[-1], other.prefix, other.path}
            for other in found
            if other is not layer
        ]
        name = next((n for n in names if not any(n in r for r in rivals)), layer.path)
        arrays = [
            checked_array(f"{path}: {key}", reader.get_tensor(key))
            for key in layer.variables.values()
        ]
        layers.append(
            LayerWeights(
                name,
                tuple(arrays),
                tuple(layer.variables),
                named=bool(layer.prefix),
                aliases=tuple(alias for alias in names if alias != name),
            )
        )
    return layers


# --- the description of objects -------------------------------------------------------------------


@dataclass
class _Node:
    children: list[tuple[str, int]] = field(default_factory=list)
    full_name: str | None = None
    key: str | None = None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a serialised protocol buffer: integers and bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire)
        if size is None or position + size > len(data):
            raise ValueError(f"field {tag >> 3} of type {wire} at byte {position}")
        yield tag >> 3, data[position : position + size]
        position += size


def _parse_graph(data: bytes) -> list[_Node]:
    """TrackableObjectGraph: nodes (1) of children (1: node_id 1, local_name 2) and attributes
    (2: name 1, full_name 2, checkpoint_key 3)."""
    nodes = []
    for number, content in _fields(bytes(data)):
        if number != 1:
            continue
        node = _Node()
        nodes.append(node)
        for part, value in _fields(content):
            if part == 1:
                child = dict(_fields(value))
                node.children.append((child.get(2, b"").decode(), child.get(1, 0)))
            elif part == 2:
                texts = {n: v.decode() for n, v in _fields(value) if isinstance(v, bytes)}
                if texts.get(1) == _VALUE:
                    node.full_name, node.key = texts.get(2, ""), texts.get(3)
    return nodes


def _layers_of_graph(nodes: list[_Node]) -> Iterator[_Found]:
    """The layers, depth first: those that Keras has numbered in order, then by attributes."""
    stack, seen = [(0, "")], set()
    while stack:
        number, path = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        node = nodes[number]
        layer = _layer_of_node(nodes, node, path or "model")
        if layer.variables:
            yield layer
        numbered = [c for c in node.children if c[0].startswith("layer_with_weights-")]
        others = [c for c in node.children if c not in numbered and c[0] not in _NO_LAYERS]
        ordered = sorted(numbered, key=lambda child: natural_key(child[0])) + others
        inside = [(child, f"{path}/{name}" if path else name) for name, child in ordered]
        stack += reversed(inside)


def _layer_of_node(nodes: list[_Node], node: _Node, path: str) -> _Found:
    """The variables that an object holds under their own names, in the order of get_weights().

    A SavedModel lists that order; a checkpoint keeps the order of creation, which differs where a
    variable that is not trainable comes before one that is.
    """
    children = dict(node.children)
    listed = nodes[children["variables"]].children if "variables" in children else []
    order = {child: position for position, (_, child) in enumerate(listed)}
    layer = _Found("", path)
    for name, child in sorted(node.children, key=lambda pair: order.get(pair[1], len(order))):
        prefix, _, own = re.sub(r":\d+$", "", nodes[child].full_name or "").rpartition("/")
        key = nodes[child].key
        if key is not None and own == name and name not in _NO_LAYERS:
            layer.prefix = prefix
            layer.variables[name] = key
    return layer


def _layers_of_names(keys: list[str]) -> Iterator[_Found]:
    """The layers of a checkpoint of names, as ``tf.compat.v1.train.Saver`` writes it.

    A variable below another one (``zeta/kernel/Adam``) belongs to an optimiser.
    """
    layers: dict[str, _Found] = {}
    known = set(keys)
    for key in keys:
        prefix, _, variable = key.rpartition("/")
        if prefix and prefix not in known:
            layers.setdefault(prefix, _Found(prefix, prefix)).variables[variable] = key
    for layer in layers.values():
        order = {name: position for position, name in enumerate(_CREATED)}
        names = sorted(layer.variables, key=lambda name: order.get(name, len(order)))
        layer.variables = {name: layer.variables[name] for name in names}
        yield layer
