"""The rest of the documented Keras surface: names, scopes, connectivity, masks, metrics.

A layer here is always called eagerly, so it is connected to nothing: what the documentation says
for eager mode happens, with a message that says what to use instead.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor, nn

_NAMES: defaultdict[str, int] = defaultdict(int)


class ConnectivityError(RuntimeError, AttributeError):
    """A question about a layer's place in a graph; TFP raises one or the other of the two bases."""


class NameScope:
    """The scope of a layer's name: ``scope.name``, ``with scope:`` and ``scope()`` all work."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}/"

    def __call__(self) -> str:
        return self.name

    def __enter__(self) -> str:
        return self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def __repr__(self) -> str:
        return f"NameScope({self.name!r})"


def layer_name(name: Any, kind: str) -> str:
    """The given name, or a fresh one from the class name: ``conv2d_reparameterization_1``."""
    if name is None:
        base = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", kind)
        base = re.sub(r"([a-z])([A-Z])", r"\1_\2", base).lower()
        number = _NAMES[base]
        _NAMES[base] += 1
        return f"{base}_{number}" if number else base
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r} of type {type(name).__name__}")
    return name


class KerasSurface(nn.Module):
    """Documented properties and methods that need nothing of the layer but its name."""

    _name: str
    _dynamic: bool

    def __getattr__(self, name: str) -> Any:
        # An AttributeError inside a property lands here, where nn.Module would replace its message.
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        return super().__getattr__(name)

    @property
    def name(self) -> str:
        """The name, given or generated."""
        return self._name

    @property
    def name_scope(self) -> NameScope:
        """The scope object of the layer's name."""
        return NameScope(self._name)

    @classmethod
    def with_name_scope(cls, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a method so that it runs inside the layer's name scope."""

        @functools.wraps(method)
        def wrapped(self: KerasSurface, *args: Any, **kwargs: Any) -> Any:
            with self.name_scope:
                return method(self, *args, **kwargs)

        return wrapped

    @property
    def submodules(self) -> tuple[nn.Module, ...]:
        """Nested modules, without the layer itself."""
        return tuple(self.modules())[1:]

    @property
    def dynamic(self) -> bool:
        """False, unless the constructor was told otherwise; without effect."""
        return self._dynamic

    @property
    def metrics(self) -> list[Any]:
        """Empty: the layer keeps no metrics."""
        return []

    @property
    def updates(self) -> list[Any]:
        """Empty: the layer has no updates."""
        return []

    def get_updates_for(self, inputs: Any) -> list[Any]:
        """Empty: the layer has no updates."""
        del inputs
        return []

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """None: the layer neither makes nor takes masks.

        Raises:
            TypeError: a mask is given.
        """
        del inputs
        if mask is not None:
            raise TypeError(
                f"mask: expected None, since layer {self._name!r} does not support masking, got "
                f"{type(mask).__name__}"
            )

    # --- connectivity -----------------------------------------------------------------------------

    def _not_connected(self, what: str, instead: str) -> NoReturn:
        raise ConnectivityError(
            f"{what}: expected a layer that is part of a graph, got {self._name!r}, which is "
            f"called eagerly; {instead}"
        )

    @property
    def input(self) -> Tensor:
        """Raises: an eager layer is connected to no input."""
        self._not_connected("input", "keep the tensor that you call the layer with")

    @property
    def output(self) -> Tensor:
        """Raises: an eager layer is connected to no output."""
        self._not_connected("output", "keep the tensor that the layer returns")

    @property
    def input_mask(self) -> Tensor:
        """Raises: an eager layer is connected to no input."""
        self._not_connected("input_mask", "the layer does not support masking")

    @property
    def output_mask(self) -> Tensor:
        """Raises: an eager layer is connected to no output."""
        self._not_connected("output_mask", "the layer does not support masking")

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Raises: an eager layer is connected to no input."""
        self._not_connected("input_shape", "see input_spec, or the shape of your tensor")

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Raises: an eager layer is connected to no output."""
        self._not_connected("output_shape", "use compute_output_shape(input_shape)")

    def _no_node(self, what: str, node_index: int) -> NoReturn:
        raise RuntimeError(
            f"{what}: expected a layer that is part of a graph, got {self._name!r}, which is "
            f"called eagerly and has no node {node_index}"
        )

    def get_input_at(self, node_index: int) -> Tensor:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_input_at", node_index)

    def get_output_at(self, node_index: int) -> Tensor:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_output_at", node_index)

    def get_input_mask_at(self, node_index: int) -> Tensor:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_input_mask_at", node_index)

    def get_output_mask_at(self, node_index: int) -> Tensor:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_output_mask_at", node_index)

    def get_input_shape_at(self, node_index: int) -> tuple[int | None, ...]:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_input_shape_at", node_index)

    def get_output_shape_at(self, node_index: int) -> tuple[int | None, ...]:
        """Raises RuntimeError: there are no nodes."""
        self._no_node("get_output_shape_at", node_index)
