"""Data sets and their split: training, validation, test.

Hyperparameters are chosen on the validation images; the test images are read once, for the report.
The split has a fixed seed of its own, so that runs with different seeds are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .readers import RawData, read_folder
from .settings import TrainError

SPLIT_SEED = 0
TEST_SHARE = 0.25  # where a data set does not come with test images of its own
VALIDATION_SHARE = 0.15  # of the other images
NUM_HELD_OUT = 2
_MIN_PER_CLASS = 5


@dataclass(frozen=True)
class Part:
    """Images and labels.

    Attributes:
        images: (N, C, H, W) uint8; ``divisor`` is the value of a white pixel.
        labels: (N,) int64.
        divisor: pixels are divided by it, and lie in [0, 1].
    """

    images: Tensor
    labels: Tensor
    divisor: float

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, index: Tensor | slice, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], and labels."""
        images = self.images[index].to(device, non_blocking=True)
        return images.float() / self.divisor, self.labels[index].to(device, non_blocking=True)

    def only(self, classes: list[int]) -> Part:
        """The examples of these classes, with their own labels."""
        keep = torch.isin(self.labels, torch.tensor(classes))
        return replace(self, images=self.images[keep], labels=self.labels[keep])


@dataclass(frozen=True)
class Dataset:
    """A data set, split.

    Attributes:
        name: for people.
        classes: name of each class.
        held_out: the classes that the "held-out" networks are trained without: the last two.
            Empty where there are fewer than four classes, or no test images to tell apart.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    held_out: tuple[int, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.train.images.shape[1:])

    def without_held_out(self) -> Dataset:
        """The same split, training and validation without the held-out classes."""
        kept = [index for index in range(len(self.classes)) if index not in self.held_out]
        return replace(self, train=self.train.only(kept), validation=self.validation.only(kept))

    def describe(self) -> str:
        """One line."""
        channels, height, width = self.image_shape
        return (
            f"{self.name}: {len(self.train)} training, {len(self.validation)} validation and "
            f"{len(self.test)} test images of {height}x{width}x{channels}, "
            f"{len(self.classes)} classes"
        )


def load(data: str, image_size: tuple[int, int] | None = None) -> Dataset:
    """Reads and splits a data set.

    Args:
        data: "digits" (scikit-learn's, 1797 images of 8x8), or a folder with CIFAR-10 in its
            binary or python layout, IDX files ((Fashion-)MNIST, also .gz), or one folder of images
            per class.
        image_size: (height, width) that the images of a folder of images are scaled to.

    Raises:
        TrainError: nothing known there, or a file that is damaged.
    """
    raw = _digits() if data == "digits" else read_folder(Path(data), image_size)
    count = np.bincount(raw.labels, minlength=len(raw.classes))
    if len(raw.classes) < 2 or count.min() < _MIN_PER_CLASS:
        scarce = raw.classes[int(count.argmin())] if len(count) else "none"
        raise TrainError(
            f"--data {data}: expected two classes or more with {_MIN_PER_CLASS} training images "
            f"each, got {len(raw.classes)} with {min(count, default=0)} in class {scarce!r}"
        )
    return split(raw)


def _digits() -> RawData:
    from sklearn.datasets import load_digits

    found = load_digits()
    return RawData(
        name="scikit-learn digits",
        images=found.images.astype(np.uint8)[:, None],
        labels=found.target.astype(np.int64),
        classes=tuple(str(name) for name in found.target_names),
        divisor=16.0,
    )


def split(raw: RawData) -> Dataset:
    """Splits by class, with a fixed seed; test images that came with the data stay the test."""
    from sklearn.model_selection import train_test_split

    index = np.arange(len(raw.labels))
    if raw.test_images is None:
        index, test_index = train_test_split(
            index, test_size=TEST_SHARE, stratify=raw.labels, random_state=SPLIT_SEED
        )
        test = _part(raw.images[test_index], raw.labels[test_index], raw.divisor)
    else:
        test = _part(raw.test_images, raw.test_labels, raw.divisor)
    train_index, validation_index = train_test_split(
        index,
        test_size=max(VALIDATION_SHARE, len(raw.classes) / len(index)),
        stratify=raw.labels[index],
        random_state=SPLIT_SEED,
    )
    classes = len(raw.classes)
    return Dataset(
        name=raw.name,
        classes=raw.classes,
        train=_part(raw.images[train_index], raw.labels[train_index], raw.divisor),
        validation=_part(raw.images[validation_index], raw.labels[validation_index], raw.divisor),
        test=test,
        held_out=_held_out(classes, test),
    )


def _held_out(classes: int, test: Part) -> tuple[int, ...]:
    last = range(classes - NUM_HELD_OUT, classes)
    present = set(test.labels.tolist())
    return tuple(last) if classes >= 4 and present & set(last) and present - set(last) else ()


def _part(images: np.ndarray, labels: np.ndarray, divisor: float) -> Part:
    return Part(torch.from_numpy(images), torch.from_numpy(labels), divisor)
