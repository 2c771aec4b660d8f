"""Checks and normal forms of what users pass. Every message says name, expected, got."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

IntPair = int | Sequence[int]
PaddingLike = str | int | Sequence[int] | Sequence[Sequence[int]]
Padding = Literal["same"] | tuple[int, ...]

# By the number of spatial axes.
IMAGE: Final = {1: "C, L", 2: "C, H, W", 3: "C, D, H, W"}
FILTER: Final = {1: "K, C / groups, S", 2: "K, C / groups, R, S", 3: "K, C / groups, T, R, S"}
TRANSPOSED_FILTER: Final = "C, K / groups, R, S"
SIDES: Final = {
    1: "((left, right),)",
    2: "((top, bottom), (left, right))",
    3: "((front, back), (top, bottom), (left, right))",
}

# With it the numbers of elements, row * elements of a row, are 64-bit integers.
MAX_ROW_OFFSET: Final = 2**32

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def type_name(value: object) -> str:
    """The type of a refused value; with its module, since NumPy's bool is not Python's."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def is_lazy(parameter: Tensor | None) -> bool:
    """torch.nn.parameter.is_lazy(), in words that torch.compile can trace."""
    return isinstance(parameter, UninitializedTensorMixin)


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, for a message."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def integer(name: str, value: object, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; anything with __index__ except bool is one."""
    if type(value) is not int:
        if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an integer, got {type_name(value)}: {value!r}")
        if not isinstance(value, torch.SymInt):
            value = value.__index__()
    if value < minimum:
        kind = "a positive" if minimum == 1 else "a non-negative"
        raise ValueError(f"{name}: expected {kind} integer, got {value}")
    return value


def row_offset(value: object) -> int:
    """The number of a call's first row."""
    value = integer("row_offset", value, 0)
    if value > MAX_ROW_OFFSET:
        raise ValueError(f"row_offset: expected at most {MAX_ROW_OFFSET} (2^32), got {value}")
    return value


def pair(name: str, value: IntPair, minimum: int = 1) -> tuple[int, int]:
    """An int or two ints as (height, width)."""
    if type(value) is tuple and len(value) == 2:  # what a layer passes: no abstract base class
        return integer(name, value[0], minimum), integer(name, value[1], minimum)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an integer or a pair, got {tuple(value)}")
        return integer(name, value[0], minimum), integer(name, value[1], minimum)
    single = integer(name, value, minimum)
    return single, single


def element_offsets(value: object) -> tuple[int, int]:
    """Noise numbers of the first weight and the first bias element."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            "element_offset: expected a pair of integers (weight, bias), got "
            f"{type_name(value)}: {value!r}"
        )
    return pair("element_offset", value, 0)


def spatial(name: str, value: int | Sequence[int], rank: int, minimum: int = 1) -> tuple[int, ...]:
    """An int, or an int for each spatial axis."""
    if rank == 2:
        return pair(name, value, minimum)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != rank:
            raise ValueError(f"{name}: expected an integer or {rank} of them, got {tuple(value)}")
        return tuple(integer(name, entry, minimum) for entry in value)
    return (integer(name, value, minimum),) * rank


def padding_form(padding: PaddingLike, rank: int = 2) -> Padding:
    """'same', or zeros before and after each spatial axis: (top, bottom, left, right).

    Args:
        padding: 'valid', 'same', an int, an int for each axis, or a pair of sides for each axis.
        rank: number of spatial axes.
    """
    if isinstance(padding, str):
        if padding == "same":
            return "same"
        if padding == "valid":
            return (0, 0) * rank
        raise ValueError(
            "padding: expected 'valid', 'same', an integer, an integer for each axis or "
            f"{SIDES[rank]}, got {padding!r}"
        )
    nested = type(padding) in (tuple, list) and any(type(side) is not int for side in padding)
    if nested and any(isinstance(side, Sequence) for side in padding):
        fits = all(isinstance(side, Sequence) and len(side) == 2 for side in padding)
        if len(padding) != rank or not fits:
            raise ValueError(f"padding: expected {SIDES[rank]}, got {padding!r}")
        return tuple(zeros for sides in padding for zeros in pair("padding", sides, 0))
    return tuple(zeros for zeros in spatial("padding", padding, rank, 0) for _ in range(2))


def same_padding(extent: int, filter: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's 'same' for one axis: ceil(extent / stride) outputs, the odd zero at the end."""
    outputs = (extent + stride - 1) // stride
    total = max((outputs - 1) * stride + (filter - 1) * dilation + 1 - extent, 0)
    return total // 2, total - total // 2


def resolve_padding(
    padding: Padding,
    extent: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """(top, bottom, left, right) of a call, for any number of axes."""
    if padding != "same":
        return padding
    axes = zip(extent, filter, stride, dilation, strict=True)
    return tuple(zeros for axis in axes for zeros in same_padding(*axis))


def tensor(name: str, value: object) -> Tensor:
    """``value`` itself, when it is a floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type_name(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}; use .to_dense()")
    return value


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raises unless the shape is exactly this."""
    if value.shape != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(value.shape)}")


def device(name: str, value: Tensor, like: Tensor) -> None:
    """Raises unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} of the input, got {value.device}")


def compute_dtype(input: Tensor) -> torch.dtype:
    """What a convolution of ``input`` computes in: its own dtype, or that of autocast."""
    device = input.device.type
    if input.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return input.dtype
    return torch.get_autocast_dtype(device)


class _Warned:
    low_precision = False


def wide_parameter(value: Tensor) -> Tensor:
    """A bfloat16 or float16 parameter as float32, differentiably; others as they are."""
    if value.dtype not in LOW_PRECISION:
        return value
    if value.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_low_precision(value.dtype)
    return value.to(torch.float32)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in the operators: float64 or float32."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def _warn_low_precision(dtype: torch.dtype) -> None:
    if _Warned.low_precision:
        return
    _Warned.low_precision = True
    warnings.warn(
        f"training {dtype} posterior parameters: an optimiser's steps are mostly below their "
        "resolution, so that rho hardly moves; keep the parameters in float32 and run the model "
        "under torch.autocast",
        UserWarning,
        stacklevel=5,
    )


def posterior(name: str, loc: Tensor, rho: Tensor | None, input: Tensor) -> None:
    """Checks one posterior against itself and the input: types, shapes, devices."""
    tensor(name, loc)
    device(name, loc, input)
    if rho is not None:
        tensor(f"{name}_rho", rho)
        shape(f"{name}_rho", rho, loc.shape)
        device(f"{name}_rho", rho, input)
        if rho.dtype != loc.dtype:
            raise TypeError(f"{name}_rho: expected {loc.dtype} of {name}, got {rho.dtype}")


def dtypes(input: Tensor, name: str, parameter: Tensor) -> None:
    """float64 goes with float64 only; every other mix computes in the input's dtype."""
    if (input.dtype == torch.float64) != (parameter.dtype == torch.float64):
        raise TypeError(
            f"{name}: expected {'float64' if input.dtype == torch.float64 else 'float32'} to go "
            f"with an input of {input.dtype}, got {parameter.dtype}; convert one of them, for "
            "example with module.to(input.dtype) or input.to(torch.float32)"
        )


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of the first shape expands to the second."""
    trailing = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(have in (1, want) for have, want in trailing)


def prior_shape(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raises unless a prior tensor broadcasts to the parameter."""
    if not broadcasts(value.shape, parameter.shape):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(parameter.shape)}, got "
            f"{tuple(value.shape)}"
        )


def prior_tensor(name: str, value: Tensor, parameter: Tensor) -> Tensor:
    """A prior tensor in the dtype of the parameter that it broadcasts to."""
    device(name, value, parameter)
    prior_shape(name, value, parameter)
    return value.to(parameter.dtype)


def prior_scale(name: str, value: Tensor) -> None:
    """Raises unless all values are positive; looks at them only where that costs no more than
    reading them: not on a device, not while anything traces."""
    if torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        return
    if value.device.type != "cpu" or value.numel() == 0 or torch.jit.is_tracing():
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return
    least = value.detach().amin().item()  # NaN if there is one
    if not least > 0.0:
        raise ValueError(f"{name}: expected positive values, got {least}")


# --- whole calls ----------------------------------------------------------------------------------


def batched_image(input: Tensor, num_samples: int, rank: int = 2) -> tuple[Tensor, bool]:
    """The input with a batch dimension, and whether that was added."""
    tensor("input", input)
    if input.ndim == rank + 2:
        return input, False
    if input.ndim != rank + 1:
        raise ValueError(
            f"input: expected shape (N, {IMAGE[rank]}) or ({IMAGE[rank]}), got {tuple(input.shape)}"
        )
    if num_samples != 1:
        raise ValueError(f"num_samples: expected 1 for an input without batch, got {num_samples}")
    return input.unsqueeze(0), True


def conv_tensors(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None,
    bias_rho: Tensor | None,
    groups: int,
    rank: int = 2,
    transposed: bool = False,
) -> None:
    """Checks the tensors of a convolution with ``rank`` spatial axes, the input with its batch."""
    posterior("weight", weight, weight_rho, input)
    groups = integer("groups", groups, 1)
    if weight.ndim != rank + 2:
        expected = TRANSPOSED_FILTER if transposed else FILTER[rank]
        raise ValueError(f"weight: expected shape ({expected}), got {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight: expected no empty dimension, got {tuple(weight.shape)}")
    if weight.shape[0] % groups != 0:
        side = "input" if transposed else "output"
        raise ValueError(
            f"groups: expected a divisor of the {weight.shape[0]} {side} channels, got {groups}"
        )
    filters, channels = weight.shape[0], weight.shape[1] * groups
    if transposed:
        filters, channels = channels, filters
    if input.shape[1] != channels:
        raise ValueError(
            f"input: expected {channels} channels (weight {tuple(weight.shape)}, "
            f"groups {groups}), got {input.shape[1]}"
        )
    _check_bias(weight, bias, bias_rho, input, filters)


def linear_tensors(
    input: Tensor,
    weight: Tensor,
    weight_rho: Tensor | None,
    bias: Tensor | None,
    bias_rho: Tensor | None,
) -> None:
    posterior("weight", weight, weight_rho, input)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}"
        )
    if input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape (..., {weight.shape[1]}), got {tuple(input.shape)}"
        )
    _check_bias(weight, bias, bias_rho, input, weight.shape[0])


def _check_bias(
    weight: Tensor, bias: Tensor | None, bias_rho: Tensor | None, input: Tensor, filters: int
) -> None:
    if bias is None:
        if bias_rho is not None:
            raise ValueError("bias_rho: expected None without a bias, got a tensor")
        return
    posterior("bias", bias, bias_rho, input)
    shape("bias", bias, (filters,))
    if bias.dtype != wide_dtype(weight.dtype) and bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected {weight.dtype} of the weight, got {bias.dtype}")


def one_channel(image: Tensor, weight: Tensor) -> Tensor:
    """An image of one channel, which is in both memory formats, as one in that of the weight.

    ``contiguous(memory_format=...)`` leaves such an image as it is, so that only the weight tells
    what the model was brought into; the output goes on in that, as PyTorch's does. A filter of one
    tap is in both itself, and tells nothing.
    """
    n, channels, height, width = image.shape
    both = channels == 1 and image.stride(1) != 1 and weight.stride(1) == 1
    tells = both and weight.shape[2:].numel() > 1
    if not tells or torch._C._are_functorch_transforms_active() or not image.is_contiguous():
        return image
    return image.view(n, height, width, 1).permute(0, 3, 1, 2)


def rows(input: Tensor, num_samples: int) -> None:
    integer("num_samples", num_samples, 1)
    if input.shape[0] % num_samples != 0:
        raise ValueError(
            f"num_samples: expected a divisor of the {input.shape[0]} input rows, got "
            f"{num_samples}; share_input=True lets every draw read all rows"
        )


def extents(
    extent: Sequence[int],
    padding: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    least: int = 0,
) -> None:
    """Raises where an extent of the output is below ``least``.

    0: a filter may just fail to fit (an empty output); beyond that there is no output at all.
    """
    for axis, size in enumerate(extent):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        span = (filter[axis] - 1) * dilation[axis] + 1
        needed = span + (least - 1) * stride[axis]
        if padded < needed:
            raise ValueError(
                f"input: expected a padded size of at least {needed} for a filter of "
                f"{filter[axis]} with dilation {dilation[axis]}, got {padded}"
            )
