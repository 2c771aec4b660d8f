"""Variables of the TFP face: creation, documented order, exchange as arrays, state dicts, freezing.

A kernel has the documented shape (*window, C, filters), for both data formats, and its memory is in
the order (filters, *window, C), so that permuting it gives the (K, C, R, S) channels_last weight of
the operators without a copy.

Variables of the built-in functions exist from construction on, as UninitializedParameter: an
optimiser made before the first call holds them. ``weights`` and its kin are empty until the layer
is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from fastbconv import constraints, initializers, regularizers
from fastbconv.constraints import Constraint, ConstraintLike
from fastbconv.initializers import GlorotUniform, Initializer, InitializerLike
from fastbconv.regularizers import Regularizer, RegularizerLike

from . import tfp_arguments as arguments


@dataclass(frozen=True)
class VariableRecord:
    """What a layer knows about one of its variables besides the value."""

    name: str
    trainable: bool
    regularizer: Regularizer | None
    constraint: Constraint | None


def resolve_options(
    pattern: str,
    initializer: InitializerLike,
    regularizer: RegularizerLike,
    constraint: ConstraintLike,
    default: Initializer,
) -> tuple[Initializer, Regularizer | None, Constraint | None]:
    """Initialiser, regulariser and constraint from what Keras takes for them.

    Args:
        pattern: name of an argument in messages, with {} for its kind.
        initializer: a callable, a name, a configuration, or None.
        regularizer: likewise.
        constraint: likewise.
        default: the initialiser where it is None.
    """
    made = initializers.get(initializer, pattern.format("initializer"))
    return (
        default if made is None else made,
        regularizers.get(regularizer, pattern.format("regularizer")),
        constraints.get(constraint, pattern.format("constraint")),
    )


def to_operator(value: Tensor) -> Tensor:
    """(*window, C, K) -> the view (K, C, *window); a bias or a scalar stays as it is."""
    if value.dim() < 2:
        return value
    last = value.dim() - 1
    return value.permute(last, last - 1, *range(last - 1))


def from_operator(value: Tensor) -> Tensor:
    """(K, C, *window) -> the view (*window, C, K); the inverse of ``to_operator``."""
    if value.dim() < 2:
        return value
    return value.permute(*range(2, value.dim()), 1, 0)


def _initial_value(
    name: str, initializer: Initializer, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """What an initialiser gives: a tensor of the shape, or a scalar for all values."""
    made = initializer(shape, dtype)
    hint = "; an initialiser is a function f(shape, dtype) -> tensor"
    try:
        value = torch.as_tensor(made, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected it to return a tensor, got {type(made).__name__}{hint}"
        ) from error
    return arguments.sample_tensor(name, value, shape, hint) if value.dim() else value


class VariableStore(nn.Module):
    """The variables of one layer."""

    built: bool
    _dtype: torch.dtype
    _device: torch.device

    def __init__(self, trainable: bool, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.built = False
        self._trainable = trainable
        self._dtype = dtype
        self._device = torch.empty(0, device=device).device
        self._records: dict[str, VariableRecord] = {}
        self._kernel_shape: tuple[int, ...] | None = None

    # --- creation ---------------------------------------------------------------------------------

    def _reserve(self, name: str) -> None:
        """A variable whose shape is not known yet."""
        parameter = UninitializedParameter(self._trainable, device=self._device, dtype=self._dtype)
        self.register_parameter(name, parameter)

    def _check_variable_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a non-empty string without dots, got {name!r}")
        if name in self._records:
            raise ValueError(f"name: expected a name not yet taken, got a second {name!r}")
        if name in self.__dict__ or hasattr(type(self), name):
            raise ValueError(f"name: expected a name that is no attribute of a layer, got {name!r}")

    def add_variable(
        self,
        name: str,
        shape: Sequence[int] = (),
        initializer: InitializerLike = None,
        regularizer: RegularizerLike = None,
        constraint: ConstraintLike = None,
        dtype: torch.dtype | None = None,
        trainable: bool = True,
    ) -> Tensor:
        """Creates a variable of the layer; the ``add_variable_fn`` that user functions receive.

        Args:
            name: its name among the layer's parameters.
            shape: its shape.
            initializer: ``f(shape, dtype) -> tensor``, or what ``fastbconv.initializers.get``
                takes; default Glorot's uniform distribution.
            regularizer: a penalty, re-evaluated at each access of ``losses``, or what
                ``fastbconv.regularizers.get`` takes.
            constraint: a projection for ``apply_constraints``, or what
                ``fastbconv.constraints.get`` takes.
            dtype: default that of the layer.
            trainable: False: it takes no gradient.

        Returns:
            The nn.Parameter.

        Raises:
            TypeError: initialiser, regulariser or constraint of no accepted type, or an
                initialiser that gives no tensor.
            ValueError: the name is taken, one of the three has an unknown name, or the initialiser
                gives another shape.
        """
        self._check_variable_name(name)
        initializer, regularizer, constraint = resolve_options(
            f"{{}} of {name}", initializer, regularizer, constraint, GlorotUniform()
        )
        shape, dtype = tuple(shape), self._dtype if dtype is None else dtype
        value = _initial_value(f"initializer of {name}", initializer, shape, dtype)
        storage = self._empty(shape, dtype)
        with torch.no_grad():
            storage.copy_(value)
        parameter = self._parameters.get(name)
        if parameter is None:
            parameter = nn.Parameter(storage, requires_grad=False)
            self.register_parameter(name, parameter)
        else:
            if isinstance(parameter, UninitializedParameter):
                parameter.materialize(shape, device=storage.device, dtype=dtype)
            parameter.data = storage
        parameter.requires_grad_(self._trainable and trainable)
        self._records[name] = VariableRecord(name, bool(trainable), regularizer, constraint)
        return parameter

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if shape != self._kernel_shape:
            return torch.empty(shape, dtype=dtype, device=self._device)
        krsc = (shape[-1], *shape[:-1])
        storage = torch.empty(krsc, dtype=dtype, device=self._device)
        return storage.permute(*range(1, len(shape)), 0)

    def _existing_variable(self, name: str, *_: Any, **__: Any) -> Tensor:
        """The ``add_variable_fn`` of every later use of a function: variables are made once."""
        if name not in self._records:
            raise ValueError(
                f"add_variable_fn: expected one of {list(self._records)}, made when the layer was "
                f"built, got {name!r}"
            )
        return getattr(self, name)

    # --- lists ------------------------------------------------------------------------------------

    @property
    def weights(self) -> list[nn.Parameter]:
        """All variables: trainable ones first, then the others, each in order of creation."""
        if not self.built:
            return []
        records = sorted(self._records.values(), key=lambda record: not record.trainable)
        return [getattr(self, record.name) for record in records]

    @property
    def variables(self) -> list[nn.Parameter]:
        """Alias of ``weights``."""
        return self.weights

    @property
    def trainable_weights(self) -> list[nn.Parameter]:
        """The variables that take a gradient."""
        return [weight for weight in self.weights if weight.requires_grad]

    @property
    def trainable_variables(self) -> list[nn.Parameter]:
        """Alias of ``trainable_weights``."""
        return self.trainable_weights

    @property
    def non_trainable_weights(self) -> list[nn.Parameter]:
        """The variables that take no gradient; all of them when the layer is not trainable."""
        return [weight for weight in self.weights if not weight.requires_grad]

    @property
    def non_trainable_variables(self) -> list[nn.Parameter]:
        """Alias of ``non_trainable_weights``."""
        return self.non_trainable_weights

    @property
    def trainable(self) -> bool:
        """Whether the variables take gradients. Settable.

        As in TFP, variables *created* with trainable=False stay so when this is set later.
        """
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for name, parameter in self._parameters.items():
            record = self._records.get(name)
            if parameter is not None:
                parameter.requires_grad = self._trainable and (record is None or record.trainable)

    def count_params(self) -> int:
        """The number of scalars in ``weights``.

        Raises:
            ValueError: the layer is not built.
        """
        if not self.built:
            raise ValueError(
                f"count_params: expected a built layer, got {self.name!r} before its first call; "
                "call layer.build(input_shape) first"
            )
        return sum(weight.numel() for weight in self.weights)

    # --- values -----------------------------------------------------------------------------------

    def get_weights(self) -> list[np.ndarray]:
        """Copies of ``weights`` as NumPy arrays, kernels as (*window, C, filters).

        The arrays are those of the TFP layer's ``get_weights``, in the same order; bfloat16 comes
        as float32.
        """
        arrays = []
        for weight in self.weights:
            value = weight.detach().cpu()
            value = value.float() if value.dtype == torch.bfloat16 else value
            arrays.append(np.array(value.numpy(), order="C", copy=True))
        return arrays

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets ``weights`` from arrays: the result of ``get_weights``, here or in TFP.

        Raises:
            TypeError: no list.
            ValueError: another number of arrays, or another shape.
        """
        variables = self.weights
        if not hasattr(weights, "__len__"):
            raise TypeError(
                f"weights: expected a list of arrays, as get_weights() of layer {self.name!r} "
                f"gives it, got {type(weights).__name__}"
            )
        if len(weights) != len(variables):
            hint = "" if self.built else "; call layer.build(input_shape) first"
            raise ValueError(
                f"weights: expected {len(variables)} arrays for layer {self.name!r}, got "
                f"{len(weights)}{hint}"
            )
        for index, (variable, value) in enumerate(zip(variables, weights, strict=True)):
            shape = getattr(value, "shape", None)
            if shape is None or tuple(shape) != tuple(variable.shape):
                got = type(value).__name__ if shape is None else f"shape {tuple(shape)}"
                raise ValueError(
                    f"weights[{index}]: expected an array of shape {tuple(variable.shape)}, got "
                    f"{got}"
                )
        with torch.no_grad():
            for variable, value in zip(variables, weights, strict=True):
                value = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
                variable.copy_(value)

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Projects every variable that has a constraint; call it after an optimiser step.

        Raises:
            TypeError: a constraint returns no tensor.
            ValueError: it returns one of another shape.
        """
        hint = "; a constraint is a function w -> w that returns the projected tensor"
        for record in self._records.values():
            if record.constraint is not None:
                variable = getattr(self, record.name)
                value = record.constraint(variable)
                arguments.sample_tensor(f"constraint of {record.name}", value, variable.shape, hint)
                variable.copy_(value)

    def _regularization_losses(self) -> list[Tensor]:
        return [
            arguments.penalty(
                f"regularizer of {record.name}", record.regularizer(getattr(self, record.name))
            )
            for record in self._records.values()
            if record.regularizer is not None
        ]

    # --- state ------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VariableStore:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        self._dtype, self._device = probe.dtype, probe.device
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        lazy = {name: p for name, p in self._parameters.items() if is_lazy(p)}
        for name in lazy:
            self._parameters[name] = None
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters.update(lazy)
        for name, parameter in lazy.items():
            destination[prefix + name] = parameter

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix) and isinstance(value, Tensor)
        }
        if not self.built:
            self._build_from_state(own)
        elif any(is_lazy(value) for value in own.values()):
            error_msgs.append(
                f"layer {self.name!r} is built, and the state was saved before its first call"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _build_from_state(self, own: dict[str, Tensor]) -> None:
        """Builds an unbuilt layer for the kernel found in a state dict, if there is one."""
        for name, value in own.items():
            if name.startswith("kernel_posterior") and not is_lazy(value) and value.dim() > 1:
                self._build_for_channels(value.shape[-2])
                return

    def _build_for_channels(self, channels: int) -> None:
        raise NotImplementedError


def apply_constraints(model: nn.Module) -> None:
    """Applies the constraints of every layer of a model; call it after an optimiser step.

    Args:
        model: any module.

    Example:
        >>> apply_constraints(nn.Linear(2, 2))    # no layer of ours: nothing to do
    """
    for module in (m for m in model.modules() if isinstance(m, VariableStore)):
        module.apply_constraints()
