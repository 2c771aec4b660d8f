"""Which layer of a file belongs to which layer of a model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastbconv.models import bayesian_layers

from .contents import KerasWeights, LayerWeights, Shape, snake_case
from .reading import read_keras_weights

_MOST_LINES = 8


@dataclass(frozen=True)
class LoadedLayer:
    """One layer that has got its weights.

    Attributes:
        path: of the module in the model, as in ``named_modules()``.
        name: the layer's ``name``.
        source: the layer of the file.
        by: "mapping", "name" or "order".

    Example:
        >>> LoadedLayer("4", "dense", source="head", by="order").source
        'head'
    """

    path: str
    name: str
    source: str
    by: str


@dataclass(frozen=True)
class LoadReport:
    """What ``load_keras_weights`` did.

    Attributes:
        loaded: the layers that were set.
        left_over: layers of the file that nothing in the model has taken, with their shapes.

    Example:
        >>> print(LoadReport((LoadedLayer("4", "dense", "head", "order"),), {"conv": ((3, 3),)}))
        4 <- head (by order)
        left over: conv [(3, 3)]
    """

    loaded: tuple[LoadedLayer, ...]
    left_over: dict[str, tuple[Shape, ...]]

    def __str__(self) -> str:
        lines = [f"{one.path or one.name} <- {one.source} (by {one.by})" for one in self.loaded]
        lines += [f"left over: {name} {list(s)}" for name, s in self.left_over.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer of the model: where it is, and what its ``set_weights`` expects."""

    path: str
    layer: Any
    variables: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def kind(self) -> str:
        """The class as Keras spells it, also for a subclass of ours."""
        own = type(self.layer)
        ours = (kind for kind in own.__mro__ if kind.__module__.startswith("fastbconv."))
        return snake_case(next(ours, own).__name__.replace("Convolution", "Conv"))

    @property
    def label(self) -> str:
        """How messages call it."""
        where = f" at {self.path!r}" if self.path else ""
        return f"layer {self.layer.name!r}{where}"

    def has_given_name(self) -> bool:
        """Whether the name says which layer this is; an automatic one counts layers instead."""
        return re.fullmatch(rf"{self.kind}(_\d+)?", self.layer.name) is None

    def arranged(self, record: LayerWeights) -> list[np.ndarray]:
        """The arrays in the order of ``set_weights``: by name where both sides have names."""
        names = record.variables
        if names is not None and set(names) == set(self.variables):
            return [record.arrays[names.index(name)] for name in self.variables]
        return list(record.arrays)

    def fits(self, record: LayerWeights) -> bool:
        """Whether ``set_weights`` takes these arrays."""
        return tuple(array.shape for array in self.arranged(record)) == self.shapes


def load_keras_weights(
    model: nn.Module,
    path: str | os.PathLike[str] | KerasWeights,
    mapping: Mapping[str, str | None] | None = None,
) -> LoadReport:
    """Puts the weights of a Keras file into the TFP-face layers of a model.

    A layer takes the file's layer of its name. Where names are automatic (they count layers, and
    say nothing else) or not in the file, the remaining layers are taken in order, and every shape
    has to be equal. Nothing is changed unless everything fits.

    Args:
        model: any module, with its TFP-face layers built; other parameters are left alone.
        path: a file for ``read_keras_weights``, or its result.
        mapping: layer of the model (its path in ``named_modules()``, or its name) -> layer of the
            file, or None for a layer that stays as it is. It comes before names and order.

    Returns:
        What went where, and the layers of the file that are left over: deterministic ones (Conv2D,
        Dense, BatchNormalization) among them.

    Raises:
        ValueError: a layer that is not built, has no counterpart or another shape.
        TypeError: ``model`` is no module.
        ModuleNotFoundError: the package for the file's format is missing.

    Example:
        >>> import tempfile, torch, fastbconv as fb
        >>> model = fb.DenseReparameterization(2, name="head")
        >>> model.build((None, 3))
        >>> arrays = tuple(model.get_weights())
        >>> weights = KerasWeights("example", "made by hand", [LayerWeights("head", arrays)])
        >>> print(load_keras_weights(model, weights))
        head <- head (by name)
    """
    targets = _targets(model)
    weights = path if isinstance(path, KerasWeights) else read_keras_weights(path)
    pairs = _Plan(targets, weights).pairs(mapping or {})
    arranged = [(target, target.arranged(record)) for target, record, _ in pairs]
    for target, arrays in arranged:
        target.layer.set_weights(arrays)
    taken = {record.name for _, record, _ in pairs}
    return LoadReport(
        tuple(LoadedLayer(t.path, t.layer.name, record.name, by) for t, record, by in pairs),
        {record.name: record.shapes for record in weights.layers if record.name not in taken},
    )


def _targets(model: nn.Module) -> list[_Target]:
    layers = [layer for layer in bayesian_layers(model) if hasattr(layer, "set_weights")]
    if not layers:
        raise ValueError(
            "model: expected layers of the TFP face (Convolution2DReparameterization, "
            "DenseReparameterization, ...), got none"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    targets = []
    for layer in layers:
        names = {id(parameter): name for name, parameter in layer.named_parameters(recurse=False)}
        variables = tuple(names[id(weight)] for weight in layer.weights)
        shapes = tuple(tuple(weight.shape) for weight in layer.weights)
        target = _Target(paths[id(layer)], layer, variables, shapes)
        if not layer.built:
            raise ValueError(
                f"{target.label}: expected a built layer, got one before its first call; call "
                "fastbconv.build(model, input_shape) first"
            )
        targets.append(target)
    return targets


class _Plan:
    """The search for pairs of a layer of the model and one of the file."""

    def __init__(self, targets: Sequence[_Target], weights: KerasWeights) -> None:
        self.targets, self.weights = list(targets), weights
        self.found: dict[_Target, tuple[LayerWeights, str]] = {}
        self.skipped: set[_Target] = set()

    def pairs(self, mapping: Mapping[str, str | None]) -> list[tuple[_Target, LayerWeights, str]]:
        """All pairs, in the model's order, with what decided.

        Raises:
            ValueError: something does not fit.
        """
        self._by_mapping(mapping)
        self._by_name()
        self._by_order()
        pairs = [(t, *self.found[t]) for t in self.targets if t not in self.skipped]
        problems = [
            f"{t.label}: expected shapes {list(t.shapes)}, got {list(record.shapes)} from layer "
            f"{record.name!r} of the file (by {by})"
            for t, record, by in pairs
            if not t.fits(record)
        ]
        if problems:
            raise self._error(*problems)
        return pairs

    def _error(self, *problems: str) -> ValueError:
        more = len(problems) - _MOST_LINES
        lines = [*problems[:_MOST_LINES], *([f"... and {more} more"] if more > 0 else [])]
        advice = (
            "nothing was changed; mapping={layer of the model: layer of the file} says what "
            "belongs together, and 'python -m fastbconv keras-weights' lists the file"
        )
        return ValueError("\n".join([f"{self.weights.path}: {lines[0]}", *lines[1:], advice]))

    def _open_targets(self) -> list[_Target]:
        return [t for t in self.targets if t not in self.found and t not in self.skipped]

    def _open_records(self) -> list[LayerWeights]:
        """What is not taken yet and could belong to a Bayesian layer."""
        taken = {record.name for record, _ in self.found.values()}
        return [r for r in self.weights.layers if r.name not in taken and r.is_bayesian]

    # --- mapping, names -----------------------------------------------------------------------

    def _by_mapping(self, mapping: Mapping[str, str | None]) -> None:
        for key, source in mapping.items():
            chosen = [t for t in self.targets if t.path == key]
            chosen = chosen or [t for t in self.targets if t.layer.name == key]
            if len(chosen) != 1:
                known = [t.path or t.layer.name for t in self.targets]
                raise ValueError(
                    f"mapping: expected a path or the name of one layer, {known}, got {key!r}"
                )
            if source is None:
                self.skipped.add(chosen[0])
                continue
            if source not in self.weights:
                raise ValueError(
                    f"mapping[{key!r}]: expected a layer of the file, {list(self.weights)}, got "
                    f"{source!r}"
                )
            self.found[chosen[0]] = (self.weights.record(source), "mapping")

    def _by_name(self) -> None:
        targets, taken = self._open_targets(), {r.name for r, _ in self.found.values()}
        free = [record for record in self.weights.layers if record.name not in taken]
        records = [record for record in free if record.is_bayesian and record.named]
        names = Counter(target.layer.name for target in targets)
        # Automatic names count too where they are the file's names, all of them.
        same = names == Counter(record.name.rsplit("/", 1)[-1] for record in records)
        for target in targets:
            wanted = {target.path} - {""}
            if names[target.layer.name] == 1 and (same or target.has_given_name()):
                wanted.add(target.layer.name)
            matches = [r for r in free if wanted & self._names_of(r)]
            matches = [r for r in matches if r.is_bayesian or target.fits(r)]
            if len(matches) > 1:
                raise self._error(
                    f"{target.label}: expected one layer of that name, got "
                    f"{[record.name for record in matches]}"
                )
            if matches:
                self.found[target] = (matches[0], "name")
        sources = Counter(r.name for r, by in self.found.values() if by == "name")
        if sources and max(sources.values()) > 1:
            twice = [t.label for t, (r, _) in self.found.items() if sources[r.name] > 1]
            raise self._error(f"expected one layer for each name of the file, got {twice}")

    def _names_of(self, record: LayerWeights) -> set[str]:
        """Names that identify a layer; a class and a number do not."""
        if record.named:
            return {record.name, *record.aliases}
        return set() if record.kind is not None else {record.name}

    # --- order --------------------------------------------------------------------------------

    def _by_order(self) -> None:
        targets, records = self._open_targets(), self._open_records()
        if not targets:
            return
        if self.weights.ordered:
            self._pair_up(targets, records, "layers")
            return
        for kind in dict.fromkeys(target.kind for target in targets):
            same = [target for target in targets if target.kind == kind]
            found = [record for record in records if record.kind in (kind, None)]
            containers = {record.name.rpartition("/")[0] for record in found}
            if len(containers) == 1 and all(record.kind == kind for record in found):
                self._pair_up(same, found, f"layers of class {kind}")
            else:
                self._pair_by_shape(same, found, kind)

    def _pair_up(self, targets: list[_Target], records: list[LayerWeights], what: str) -> None:
        if len(targets) != len(records):
            listed = {record.name: list(record.shapes) for record in records}
            raise self._error(
                f"expected {len(targets)} Bayesian {what}, for "
                f"{[t.path or t.layer.name for t in targets]}, got {len(records)}: {listed}"
            )
        for target, record in zip(targets, records, strict=True):
            self.found[target] = (record, "order")

    def _pair_by_shape(
        self, targets: list[_Target], records: list[LayerWeights], kind: str
    ) -> None:
        """For a file that does not tell the order: shapes have to leave no choice."""
        for target in targets:
            fitting = [record for record in records if target.fits(record)]
            rivals = [other for other in targets if other.shapes == target.shapes]
            if len(fitting) != 1 or len(rivals) != 1:
                raise self._error(
                    f"{target.label}: expected one layer of class {kind} with shapes "
                    f"{list(target.shapes)}, got {[record.name for record in fitting]} for "
                    f"{len(rivals)} layer(s), in a file without names and order"
                )
            self.found[target] = (fitting[0], "order")
