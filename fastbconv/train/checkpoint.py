"""Checkpoints: whole or absent, never half a file, and never code.

A checkpoint is written beside its name, forced to the disk and renamed: a process killed at any
moment leaves the former file or the new one. It holds tensors and plain values only, so that it is
read with ``weights_only=True``; the checksums of the archive are verified before.
"""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .settings import TrainError

FORMAT = 1
_KEYS = {"format", "stage", "settings", "epoch", "model", "optimizer", "generators", "history"}


def write_atomically(path: Path, write: Any) -> None:
    """Calls ``write`` with an open binary file that becomes ``path`` once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself lasts only once the folder is written
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Deletes the unfinished files of a process that was killed while it wrote."""
    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    """Writes JSON atomically; numbers that are not finite are refused."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def seed_generators(seed: int) -> None:
    """Seeds the process-wide generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def generators(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's generators, as tensors and plain values.

    ``device``: a GPU has a generator of its own, which the layers on it draw their seeds from.
    """
    on_gpu = torch.device(device).type == "cuda"
    # The process-wide generator: what any code that asks NumPy for random numbers reads.
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(internal), gauss_next],
    }


def restore_generators(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """The inverse of ``generators``."""
    torch.set_rng_state(state["torch"])
    if state.get("cuda") is not None and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically; ``content`` has every key but the format's."""
    content = {"format": FORMAT, **content}
    if content.keys() != _KEYS:
        raise ValueError(f"content: expected the keys {sorted(_KEYS)}, got {sorted(content)}")
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Reads and checks a checkpoint.

    Raises:
        TrainError: not there, damaged, or written by something else.
    """
    advice = "delete it, or start afresh without --resume"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise TrainError(
                f"{path}: expected a whole checkpoint, got a wrong checksum in {damaged}; {advice}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except TrainError:
        raise
    except FileNotFoundError:
        raise TrainError(f"{path}: expected a checkpoint, got no such file") from None
    # A damaged archive can raise nearly anything while it is read.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainError(
            f"{path}: expected a whole checkpoint, got a damaged or another file "
            f"({type(error).__name__}: {reason}); {advice}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.keys() != _KEYS:
        raise TrainError(
            f"{path}: expected a checkpoint of this version (format {FORMAT}), got another file"
        )
    return content
