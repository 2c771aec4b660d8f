"""The rows of the table: convolutions with the padding that keeps height and width, stride 1; and
whole networks, which come after them and have no part in their means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import networks


@dataclass(frozen=True, order=True)
class Shape:
    """One convolution: N images of C x H x H, K filters of k x k."""

    N: int
    H: int
    C: int
    K: int
    k: int

    def __str__(self) -> str:
        return f"{self.N},{self.H},{self.C},{self.K},{self.k}"

    @property
    def padding(self) -> int:
        """Zeros on each side: height and width stay."""
        return self.k // 2

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.K * self.C * self.k * self.k

    @property
    def flops(self) -> int:
        """Nominal operations of one pass, 2 N H W C K k^2: padded taps count as if computed."""
        return 2 * self.N * self.H * self.H * self.weights

    @property
    def step_flops(self) -> int:
        """Forward, and the gradients of input and weight."""
        return 3 * self.flops

    @property
    def largest(self) -> int:
        """Elements of the largest tensor of one pass."""
        return max(self.N * self.H**2 * max(self.C, self.K), self.weights)

    @property
    def for_direct(self) -> bool:
        """Whether the row counts in the mean of ``direct``: 3 x 3, batch >= 16, C >= 64."""
        return self.k == 3 and self.N >= 16 and self.C >= 64


@dataclass(frozen=True, order=True)
class NetworkRow:
    """A whole network: a key of networks.NETWORKS, and N images."""

    name: str
    N: int

    def __str__(self) -> str:
        return f"{self.name}@{self.N}"

    @property
    def weights(self) -> int:
        """Elements of the weights of convolutions and linear maps."""
        return networks.facts(self.name, self.N).weights

    @property
    def flops(self) -> int:
        """Nominal operations of one pass, of convolutions and linear maps."""
        return networks.facts(self.name, self.N).flops

    @property
    def step_flops(self) -> int:
        """Forward and backward, without the gradient of the images."""
        return networks.facts(self.name, self.N).step_flops

    @property
    def largest(self) -> int:
        """Elements of the largest tensor of one pass."""
        found = networks.facts(self.name, self.N)
        return max(found.largest, found.weights)


Row = Shape | NetworkRow

SHAPES: tuple[Shape, ...] = (
    Shape(128, 28, 1, 32, 5),
    Shape(64, 32, 3, 64, 3),
    Shape(64, 32, 64, 64, 3),
    Shape(64, 16, 128, 128, 3),
    Shape(64, 8, 256, 256, 3),
    Shape(64, 4, 512, 512, 3),
    Shape(16, 56, 64, 64, 3),
    Shape(16, 14, 256, 256, 3),
    Shape(16, 7, 512, 512, 3),
    Shape(16, 56, 64, 256, 1),
    Shape(1, 32, 64, 64, 3),
    Shape(1, 8, 256, 256, 3),
)

NETWORK_ROWS: tuple[NetworkRow, ...] = (NetworkRow("lenet5", 128), NetworkRow("resnet18", 64))
ROWS: tuple[Row, ...] = (*SHAPES, *NETWORK_ROWS)


def select(texts: Sequence[str]) -> tuple[Row, ...]:
    """Rows by what the command line says; all of them for an empty list.

    Args:
        texts: each a row's number (from 1), five numbers N,H,C,K,k, which may be a new shape, a
            network's name, with ``@N`` for another batch, or a part of a row's text, such as
            ``512,512``.

    Returns:
        The rows in the order asked for, each once.

    Raises:
        ValueError: a text that names no row.

    Example:
        >>> [str(row) for row in select(["12", "2,6,3,4,3", "lenet5", "resnet18@32"])]
        ['1,8,256,256,3', '2,6,3,4,3', 'lenet5@128', 'resnet18@32']
    """
    chosen: dict[Row, None] = {}
    for text in texts or [str(index + 1) for index in range(len(ROWS))]:
        chosen.update(dict.fromkeys(_named_by(text.replace(" ", ""))))
    return tuple(chosen)


def _named_by(text: str) -> Sequence[Row]:
    parts = text.split(",")
    if len(parts) == 1 and text.isdigit():
        if not 1 <= int(text) <= len(ROWS):
            raise ValueError(f"shapes: expected a row number from 1 to {len(ROWS)}, got {text}")
        return [ROWS[int(text) - 1]]
    if len(parts) == 5 and all(part.isdigit() for part in parts):
        shape = Shape(*map(int, parts))
        if min(shape.N, shape.H, shape.C, shape.K) < 1 or shape.k % 2 == 0:
            raise ValueError(f"shapes: expected positive N,H,C,K and an odd k, got {text}")
        return [shape]
    name, at, batch = text.partition("@")
    if at and name in networks.NETWORKS:
        if not batch.isdigit() or int(batch) < 1:
            raise ValueError(f"shapes: expected a positive batch after {name}@, got {text}")
        return [NetworkRow(name, int(batch))]
    found = [row for row in ROWS if text in str(row)] if text else []
    if not found:
        raise ValueError(
            "shapes: expected a row number, five numbers N,H,C,K,k, a network (NAME or NAME@BATCH) "
            f"or a part of a row's text, got {text!r}; --list shows the rows"
        )
    return found
