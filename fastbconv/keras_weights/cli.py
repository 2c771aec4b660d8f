"""``python -m fastbconv keras-weights``: lists a weight file, and converts it to ``.npz``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .contents import KerasWeights, KerasWeightsError, MissingPackageError
from .reading import read_keras_weights


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbconv keras-weights",
        description="List the layers of a Keras weight file, and write them as an .npz that "
        "fastbconv reads without h5py and tensorflow.",
    )
    parser.add_argument("path", help="HDF5 file, .keras archive, SavedModel or checkpoint")
    parser.add_argument("--output", metavar="FILE", help="where to write an .npz")
    options = parser.parse_args(list(arguments))
    try:
        weights = read_keras_weights(options.path)
        print(describe(weights))
        if options.output is not None:
            _check_output(Path(options.path), Path(options.output))
            weights.save(options.output)
            print(f"written: {options.output}")
    except (KerasWeightsError, MissingPackageError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _check_output(source: Path, output: Path) -> None:
    """Raises where writing would destroy what was read: a file, or those of a checkpoint."""
    if not output.exists():
        return
    prefixed = (source.parent.glob(f"{source.name}{end}") for end in (".index", ".data-*"))
    read = [source, *(path for paths in prefixed for path in paths)]
    inside = source.resolve() in output.resolve().parents and output.suffix != ".npz"
    if inside or any(path.exists() and output.samefile(path) for path in read):
        raise KerasWeightsError(
            f"--output {output}: expected another file than the one that is read, got the same"
        )


def describe(weights: KerasWeights) -> str:
    """The file as a table: layers, their variables and shapes."""
    lines = [f"{weights.path}: {weights.format}, {len(weights)} layers"]
    if not weights.ordered:
        lines.append("(the file does not tell the order of layers of different classes)")
    for layer in weights.layers:
        count = sum(array.size for array in layer.arrays)
        kind = "Bayesian" if layer.is_bayesian else "other"
        lines.append(f"{layer.name}  {kind}, {count} values")
        names = layer.variables or tuple(map(str, range(len(layer.arrays))))
        width = max(map(len, names))
        lines += [
            f"    {name:<{width}}  {array.dtype} {array.shape}"
            for name, array in zip(names, layer.arrays, strict=True)
        ]
    return "\n".join(lines)
