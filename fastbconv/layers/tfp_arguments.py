"""Arguments and shapes of the TFP face: one place that checks them and says what was wrong."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch

Shape = Sequence[int | None]
_CALLED_PROPERTY = tuple(f"'{kind}' object is not callable" for kind in ("Tensor", "Parameter"))


class ArgumentTypeError(TypeError, AttributeError):
    """A non-string where TFP calls ``.lower()``: AttributeError in TFP, TypeError here."""


class InputDtypeError(TypeError, ValueError):
    """An integer input: TFP raises ValueError, this library TypeError."""


class RankError(ValueError, IndexError):
    """A shape with too many dimensions: TFP raises IndexError, this library ValueError."""


_FLOAT_DTYPES = {
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
}
_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_OTHER_DTYPES = ("bool", "complex64", "complex128", "string", *_INTEGERS)
LAYER_OPTIONS = (
    "name",
    "trainable",
    "dtype",
    "dynamic",
    "autocast",
    "input_shape",
    "batch_input_shape",
    "input_dim",
    "batch_size",
    "weights",
    "device",
)
_INSTEAD = {
    "use_bias": "bias_posterior_fn=None leaves the bias out",
    "seed": "pass it to the call, layer(x, seed=...), or take a Flipout layer",
    "groups": "fastbconv.BayesConv2d has groups",
    "mask": "the layer does not support masking",
    "n_samples": "call the layer once for each draw",
    "num_samples": "call the layer once for each draw",
    "kernel_initializer": "kernel_posterior_fn=default_mean_field_normal_fn(loc_initializer=...)",
    "kernel_regularizer": "kernel_posterior_fn=default_mean_field_normal_fn(loc_regularizer=...)",
    "kernel_constraint": "kernel_posterior_fn=default_mean_field_normal_fn(loc_constraint=...)",
}


@dataclass(frozen=True)
class InputSpec:
    """What a layer accepts: rank, and sizes of some axes.

    Attributes:
        ndim: the exact rank, or None.
        min_ndim: the least rank, or None.
        axes: axis -> required size.
    """

    ndim: int | None = None
    min_ndim: int | None = None
    axes: dict[int, int] = field(default_factory=dict)


def positive_int(name: str, value: Any) -> int:
    """A positive integer of any integral type."""
    if value is None:
        raise ValueError(f"{name}: expected a positive integer, got None")
    number = _integer(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {number}")
    return number


def optional_seed(name: str, value: Any) -> int | None:
    """None, or an integer of at most 64 bits."""
    if value is None:
        return None
    number = _integer(name, value)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"{name}: expected an integer of at most 64 bits, got {number}")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got the bool {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer, got {value!r} of type {type(value).__name__}"
        ) from None


def int_tuple(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """``rank`` positive integers, from one integer or a sequence of them."""
    expected = f"{name}: expected a positive integer or a sequence of {rank} of them"
    if isinstance(value, Integral):
        entries: tuple[Any, ...] = (value,) * rank
    else:
        try:
            entries = tuple(value)
        except TypeError:
            raise ValueError(f"{expected}, got {value!r}") from None
    if len(entries) != rank:
        raise ValueError(f"{expected}, got {value!r}")
    for entry in entries:
        try:
            int(entry)
        except (TypeError, ValueError):
            raise ValueError(f"{expected}, got {value!r}") from None
    numbers = tuple(_integer(name, entry) for entry in entries)
    if min(numbers) <= 0:
        raise ValueError(f"{expected}, got {value!r}")
    return numbers


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some strings, in any case; returned in lower case."""
    expected = f"{name}: expected {' or '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{expected}, got {value!r} of type {type(value).__name__}")
    if value.lower() not in choices:
        raise ValueError(f"{expected}, got {value!r}")
    return value.lower()


def dtype(value: Any) -> torch.dtype:
    """The torch dtype that a string, a torch dtype, a NumPy dtype or None (the default) means."""
    if value is None:
        return torch.get_default_dtype()
    if isinstance(value, torch.dtype):
        text = str(value).removeprefix("torch.")
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = np.dtype(value).name
        except TypeError:
            raise TypeError(
                f"dtype: expected a string, a torch dtype or a NumPy dtype, got {value!r}"
            ) from None
    if text in _FLOAT_DTYPES:
        return _FLOAT_DTYPES[text]
    if text.startswith("mixed_"):
        raise ValueError(
            f"dtype: expected a dtype, got the mixed-precision policy {text!r}; keep the layer in "
            "float32 and call it under torch.autocast"
        )
    if isinstance(value, torch.dtype) or text in _OTHER_DTYPES:
        raise ValueError(f"dtype: expected float32, float64, float16 or bfloat16, got {text!r}")
    raise TypeError(f"dtype: expected the name of a dtype, got {value!r}")


def dtype_name(value: torch.dtype) -> str:
    """The name that Keras gives a dtype."""
    return str(value).removeprefix("torch.")


def function(name: str, value: Any, *, optional: bool) -> Any:
    """A callable argument; None only where it has a meaning."""
    if value is None and optional:
        return None
    if not callable(value):
        none = " or None" if optional else ""
        raise TypeError(f"{name}: expected a callable{none}, got {value!r}")
    return value


def shape_tuple(name: str, shape: Any) -> tuple[int | None, ...]:
    """A shape with None for unknown sizes, from a tuple, a list or a shape object."""
    if shape is None:
        raise ValueError(f"{name}: expected a shape of known rank, got None")
    if isinstance(shape, torch.Size):
        return tuple(shape)
    if isinstance(shape, str) or not hasattr(shape, "__iter__"):
        raise TypeError(f"{name}: expected a tuple of sizes, got {shape!r}")
    entries = tuple(None if size is None else _integer(name, size) for size in shape)
    if any(size is not None and size < 0 for size in entries):
        raise ValueError(f"{name}: expected non-negative sizes or None, got {entries}")
    return entries


def output_size(size: int, kernel: int, stride: int, padding: str, dilation: int) -> int:
    """Output size of one axis; negative where the kernel does not fit."""
    if padding == "same":
        return -(-size // stride)
    return (size - ((kernel - 1) * dilation + 1) + stride) // stride


def conv_output_shape(
    input_shape: Any,
    *,
    filters: int,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    channels_first: bool,
) -> tuple[int | None, ...]:
    """Output shape of a convolution; None stays None.

    Raises:
        ValueError: unknown or wrong rank (also an IndexError where it is too high), or a negative
            output size.
    """
    shape = shape_tuple("input_shape", input_shape)
    rank = len(kernel_size)
    if len(shape) != rank + 2:
        kind = RankError if len(shape) > rank + 2 else ValueError
        raise kind(f"input_shape: expected {rank + 2} dimensions, got {len(shape)}: {shape}")
    first = 2 if channels_first else 1
    outputs: list[int | None] = []
    for axis in range(rank):
        size = shape[first + axis]
        if size is None:
            outputs.append(None)
            continue
        out = output_size(size, kernel_size[axis], strides[axis], padding, dilation_rate[axis])
        if out < 0:
            raise ValueError(
                f"input_shape: expected spatial sizes that hold a kernel of {tuple(kernel_size)} "
                f"with dilation {tuple(dilation_rate)}, got {shape}"
            )
        outputs.append(out)
    if channels_first:
        return (shape[0], filters, *outputs)
    return (shape[0], *outputs, filters)


def check_rank(name: str, shape: Shape, spec: InputSpec) -> None:
    """Raises ValueError where a shape does not agree with an input specification."""
    got = tuple(shape)
    if spec.ndim is not None and len(got) != spec.ndim:
        raise ValueError(
            f"inputs of layer {name!r}: expected {spec.ndim} dimensions, got {len(got)}: {got}"
        )
    if spec.min_ndim is not None and len(got) < spec.min_ndim:
        raise ValueError(
            f"inputs of layer {name!r}: expected at least {spec.min_ndim} dimensions, "
            f"got {len(got)}: {got}"
        )
    for axis, size in spec.axes.items():
        if got[axis] != size:
            raise ValueError(
                f"inputs of layer {name!r}: expected size {size} on axis {axis}, got shape {got}"
            )


def check_channels(name: str, channels: int, built: int) -> None:
    """Raises where a layer is built a second time for other channels."""
    if channels != built:
        raise ValueError(
            f"input_shape: expected {built} channels, for which layer {name!r} was built, got "
            f"{channels}"
        )


def reject_unknown(options: dict[str, Any], known: Sequence[str]) -> None:
    """Raises TypeError for the first keyword that no layer takes."""
    for key in options:
        if key not in known:
            instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
            raise TypeError(f"{key}: expected one of the keywords {', '.join(known)}{instead}")


def batch_input_shape(options: dict[str, Any]) -> tuple[int | None, ...] | None:
    """The shape that ``batch_input_shape``, ``input_shape`` or ``input_dim`` give, or None."""
    if options.get("batch_input_shape") is not None:
        return shape_tuple("batch_input_shape", options["batch_input_shape"])
    rest = options.get("input_shape")
    if rest is None and options.get("input_dim") is not None:
        rest = (options["input_dim"],)
    if rest is None:
        return None
    return (options.get("batch_size"), *shape_tuple("input_shape", rest))


def sample_tensor(name: str, value: Any, shape: Sequence[int], hint: str = "") -> Any:
    """What a user's function returned: a tensor of a given shape; ``hint`` ends a message."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected it to return a tensor, got {type(value).__name__}{hint}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected a tensor of shape {tuple(shape)}, got {tuple(value.shape)}{hint}"
        )
    return value


def distribution(name: str, value: Any, *, optional: bool) -> Any:
    """What a posterior or prior function returned; None only where it has a meaning."""
    if value is None and optional:
        return None
    # Not only PyTorch's own classes: a prior that has log_prob alone serves a user's divergence.
    known = any(hasattr(value, name) for name in ("sample", "log_prob"))
    if isinstance(value, torch.Tensor) or not known:
        none = " or None" if optional else ""
        raise TypeError(
            f"{name}: expected a function that returns a torch.distributions.Distribution{none}, "
            f"got one that returns {type(value).__name__}; return for instance "
            "torch.distributions.Normal(loc, scale)"
        )
    return value


def activated(activation: Callable[[Any], Any], output: Any) -> Any:
    """The output of a user's activation: a tensor of any shape."""
    value = activation(output)
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"activation: expected it to return a tensor, got {type(value).__name__}; it is a "
            "function z -> tensor, such as torch.relu"
        )
    return value


def penalty(name: str, value: Any) -> Any:
    """What a regulariser returned."""
    if value is None:
        raise TypeError(
            f"{name}: expected it to return a 0-dim tensor, got NoneType; a regulariser is a "
            "function x -> penalty, such as fastbconv.regularizers.l2()"
        )
    return value


def call_function(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a user's function; the usual mistake of a move from TFP is explained."""
    try:
        return function(*args)
    except TypeError as error:
        if str(error) not in _CALLED_PROPERTY:
            raise
        raise TypeError(
            f"{name}: in PyTorch mean, stddev, variance and mode of a distribution are properties, "
            "so that d.mean() calls a tensor; write d.mean, or pass fastbconv.posterior_mean"
        ) from error
