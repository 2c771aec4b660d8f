"""What one run measures, as it travels from the command line to the process that measures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from . import shapes
from .shapes import Row
from .timer import Effort

DIRECTIONS = {
    "forward": "a pass without graph",
    "step": "forward and backward: gradients of input, loc, rho, bias, with the KL's; of a network "
    "those of its parameters",
}


@dataclass(frozen=True)
class Settings:
    """One mode of one run.

    Attributes:
        mode: a key of memory.MODES.
        shapes: the rows.
        columns: names.
        directions: keys of DIRECTIONS.
        threads: of PyTorch.
        effort: how long a cell is measured.
        cold: evict the caches before each call.
    """

    mode: str
    shapes: tuple[Row, ...]
    columns: tuple[str, ...]
    directions: tuple[str, ...] = tuple(DIRECTIONS)
    threads: int = 2
    effort: Effort = field(default_factory=Effort)
    cold: bool = False

    def dump(self) -> str:
        """As JSON."""
        return json.dumps({**asdict(self), "shapes": [str(row) for row in self.shapes]})

    @classmethod
    def parse(cls, text: str) -> Settings:
        """The inverse of dump."""
        fields = json.loads(text)
        fields["shapes"] = shapes.select(fields["shapes"])
        fields["effort"] = Effort(**fields["effort"])
        for name in ("columns", "directions"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
