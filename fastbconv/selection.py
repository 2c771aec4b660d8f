"""Which kernel a call uses: the process-wide choice and its explanation.

The choice becomes an int argument of the operator, saved for backward; native code reads no state
of a thread or of Python.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _arguments, _native, estimators, ops
from ._arguments import IntPair, PaddingLike
from .estimators import Estimator

Algorithm = Literal[
    "auto", "direct", "winograd2", "winograd2x4", "winograd4", "library", "reference"
]

ALGORITHM_ID: Final[dict[str, int]] = {
    "auto": 0,
    "direct": 1,
    "winograd2": 2,
    "winograd4": 3,
    "library": 4,
    "winograd2x4": 5,
    "reference": 0,
}

_FUSED: Final = ("direct", "winograd2", "winograd2x4", "winograd4")


class _Choice:
    """The choice in force. Plain attributes: torch.compile guards on them."""

    def __init__(self) -> None:
        self.name: str = "auto"
        self.keep_weight: bool = False


CHOICE: Final = _Choice()


class algorithm:
    """Chooses the kernels: at once for the process, or for a ``with`` block.

    Args:
        name: "auto" picks by shape, dtype, layout and instruction set; "direct", "winograd2",
            "winograd2x4" and "winograd4" (these three for 3x3 filters without stride, dilation and
            groups, on a CPU) are the fused kernels, "library" is the fused sampling pass followed
            by PyTorch's convolution, "reference" the definition in plain PyTorch.
        keep_weight: save the sampled weight for backward, in the compute dtype, instead of
            regenerating it.

    Raises:
        ValueError: an unknown name.
        TypeError: keep_weight is no bool.

    Winograd's convolutions: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks",
    CVPR 2016 (arXiv:1509.09308).

    A call that the kernels cannot serve raises NotImplementedError and says why: on a CPU "library"
    does so under torch.use_deterministic_algorithms(True), since the bits of its weight gradient
    depend on the number of threads. On CUDA it is then a deterministic algorithm of cuDNN.

    "winograd2" needs four ninths of the multiplications of a direct sum, "winograd2x4" a third, in
    0.8 to 0.95 of the time. The errors of its output are 1.7 to 2.2 times as large, so "auto" picks
    it where they stay within those of PyTorch's float32 convolution in the same memory format: over
    the 72 shapes of benchmarks/accuracy.py the root mean square of the output's error with "auto"
    was 0.27 to 1.00 of that of PyTorch (median 0.77), the largest error of a gradient at most 2.0
    times. For contiguous images, whose sums PyTorch cuts into shorter chains, "winograd2x4" is
    there on request: 1.6 to 2.1 times the error of PyTorch.

    "winograd4" needs a quarter, and takes 0.7 to 0.85 of the time of "winograd2" where its tiles of
    4 x 4 pixels fit the image or nearly so. "auto" never picks it: over 37 shapes the output's
    error was 0.7 to 3.7 times that of PyTorch (median 1.4), the largest error of the output 0.5 to
    5.6 times, that of a gradient at most 7.9 times.

    Three-dimensional convolutions, and Flipout and local reparameterisation on CUDA, are composed
    of our draws and PyTorch's convolution: "auto" and "library" are the same there, the fused
    kernels raise. ``keep_weight`` concerns the estimator "reparameterization" in one and two
    dimensions.

    Example:
        >>> with algorithm("reference"):
        ...     pass
    """

    def __init__(self, name: Algorithm = "auto", *, keep_weight: bool = False) -> None:
        if name not in ALGORITHM_ID:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHM_ID)}, got {name!r}")
        if not isinstance(keep_weight, bool):
            raise TypeError(
                f"keep_weight: expected True or False, got {_arguments.type_name(keep_weight)}: "
                f"{keep_weight!r}"
            )
        self._name, self._keep_weight = name, keep_weight
        self._former = (CHOICE.name, CHOICE.keep_weight)
        CHOICE.name, CHOICE.keep_weight = name, keep_weight

    def __repr__(self) -> str:
        return f"fastbconv.algorithm({self._name!r}, keep_weight={self._keep_weight})"

    def __enter__(self) -> algorithm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        CHOICE.name, CHOICE.keep_weight = self._former


def use_native(tensor: Tensor) -> bool:
    """Whether a call on this tensor goes to the operators, else to the reference.

    Raises:
        NotImplementedError: a CUDA tensor, and a native library without CUDA kernels.
    """
    if CHOICE.name == "reference":
        return False
    kind = tensor.device.type
    if kind == "cuda" and ops.available() and not ops.cuda():
        raise _no_cuda("input", f"a CPU tensor, got one on {tensor.device}")
    return kind in ("cpu", "cuda", "meta") and ops.available()


def check_composed(input: Tensor) -> None:
    """Raises where the choice does not go with a call composed of PyTorch's convolution.

    Raises:
        NotImplementedError: fused kernels are asked for, or "library" on a CPU under
            torch.use_deterministic_algorithms(True).
    """
    if CHOICE.name in _FUSED:
        raise NotImplementedError(
            "algorithm: expected 'auto', 'library' or 'reference' for a three-dimensional or "
            "transposed convolution, and for Flipout and local reparameterisation on CUDA, got "
            f"{CHOICE.name!r}"
        )
    on_cpu = input.device.type == "cpu"
    if CHOICE.name == "library" and on_cpu and torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError(
            "algorithm: expected 'auto' or 'reference', got 'library': deterministic algorithms "
            "were asked for, and its bits depend on the number of threads"
        )


def _no_cuda(name: str, expected: str) -> NotImplementedError:
    """What is said to CUDA where the library has no kernels for it: why, and what to do."""
    return NotImplementedError(
        f"{name}: expected {expected}: the native library is built without CUDA "
        f"({_native.build_info()['cuda_reason']}). To have it: a CUDA build of PyTorch, and nvcc "
        "of the same major version on PATH or under CUDA_HOME; 'python -m fastbconv env' tells "
        "what was found. fastbconv.algorithm('reference') runs on any device"
    )


@dataclass(frozen=True)
class Candidate:
    """One kernel that could serve a call.

    Attributes:
        direction: "fprop", "dgrad" or "wgrad".
        algorithm: its name in :class:`algorithm`.
        available: whether it can compute this problem.
        chosen: whether "auto" takes it.
        reason: why it cannot, or was passed over; None where there is nothing to say.
    """

    direction: str
    algorithm: str
    available: bool
    chosen: bool
    reason: str | None


class Candidates(list[Candidate]):
    """What :func:`explain` returns: a list that prints as a table."""

    def __repr__(self) -> str:
        def verdict(row: Candidate) -> str:
            return "chosen" if row.chosen else "available" if row.available else "cannot"

        lines = (
            f"{row.direction:<6} {row.algorithm:<10} {verdict(row):<10} {row.reason or ''}"
            for row in self
        )
        return "\n".join(line.rstrip() for line in lines)


def explain(
    input: Tensor | torch.nn.Module,
    weight: Tensor,
    *,
    stride: IntPair = 1,
    padding: PaddingLike = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    num_samples: int = 1,
    share_input: bool = False,
    estimator: Estimator = "reparameterization",
    device: torch.device | str | None = None,
) -> list[Candidate]:
    """The kernels that could serve a convolution, best first in each direction, with reasons.

    The layer is taken by itself. On a GPU "library" draws its weights in a launch of its own;
    ``fastbconv.grouped`` saves those launches for a whole model, and pays where there are many
    layers and little work in each.

    Args:
        input: (N, C, H, W); shape, dtype and memory format count, values do not (meta is fine).
        weight: (K, C/groups, R, S).
        stride: as in functional.bayes_conv2d, like all that follows.
        padding: see there.
        dilation: see there.
        groups: see there.
        num_samples: see there.
        share_input: see there.
        estimator: see there. Local reparameterisation sums its variance by "direct" whatever
            computes its mean.
        device: a CPU or CUDA device; None: that of ``input``, where meta stands for the CPU.

    ``explain(layer, input)`` takes weight, stride, padding, dilation, groups and estimator from a
    layer, convolution or linear; ``input`` is what the layer would be called with. The kernels see
    one dimension as images of one row, and a linear map as images of one pixel.

    Returns:
        One entry per direction and algorithm; the reference alone without a native library. The
        list prints as a table.

    Raises:
        ValueError: shapes or values that do not fit.
        TypeError: a type or dtype that does not fit.
        NotImplementedError: a CUDA device, and a native library without CUDA kernels.

    Example:
        >>> rows = explain(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))
        >>> all(row.available for row in rows if row.chosen)
        True
    """
    if isinstance(input, torch.nn.Module):
        given = (stride, padding, dilation, groups, estimator)
        num_samples = _arguments.integer("num_samples", num_samples, 1)
        own = _of_layer(input, weight, given, 1 if share_input else num_samples)
        if own is None:
            return _composed(weight.device if device is None else device)
        input, weight, stride, padding, dilation, groups, estimator = own
    affine = estimators.check(estimator) != 0
    input, _ = _arguments.batched_image(input, num_samples)
    _arguments.conv_tensors(input, weight, None, None, None, groups)
    input = _arguments.one_channel(input, weight)
    _arguments.dtypes(input, "weight", weight)
    num_samples = _arguments.integer("num_samples", num_samples, 1)
    if not share_input:
        _arguments.rows(input, num_samples)
    steps = _arguments.pair("stride", stride), _arguments.pair("dilation", dilation)
    extent, filter = tuple(input.shape[2:]), tuple(weight.shape[2:])
    form = _arguments.padding_form(padding)
    pads = _arguments.resolve_padding(form, extent, filter, *steps)
    _arguments.extents(extent, pads, filter, *steps)
    on = {"device": "cuda"} if _is_cuda(input.device if device is None else device) else {}
    native = _native.load()
    if native is None:
        return _reference()
    _check_cuda(bool(on))
    rows = native.explain_conv(
        list(input.shape),
        list(weight.shape),
        stride=steps[0],
        padding=pads,
        dilation=steps[1],
        groups=groups,
        num_samples=num_samples,
        share_input=share_input,
        # Both products of an affine call are float32 for 16-bit inputs.
        dtype=str(_affine_dtype(input) if affine else input.dtype).removeprefix("torch."),
        channels_last=suggest_memory_format(input) == torch.channels_last,
        **on,
    )
    names = ("direction", "algorithm", "available", "chosen", "reason")
    found = Candidates(Candidate(*(row[name] for name in names)) for row in rows)
    return _of_estimator(found, composed=bool(on)) if affine else found


def _affine_dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def _of_estimator(rows: Candidates, *, composed: bool) -> Candidates:
    """What serves Flipout and local reparameterisation, from what serves the plain convolution."""
    on_request = (
        "composed of PyTorch's convolutions, on request: what is drawn is kept for backward"
    )
    only = "Flipout and local reparameterisation are composed of PyTorch's convolutions here"
    winograd = {row.direction for row in rows if row.chosen and row.algorithm in _FUSED[1:]}
    found = Candidates()
    for row in rows:
        library = row.algorithm == "library"
        if composed:
            row = replace(row, available=library, chosen=library, reason=None if library else only)
        elif library:
            row = replace(row, chosen=False, reason=on_request if row.available else row.reason)
        elif row.algorithm == "direct":
            row = replace(row, chosen=row.direction not in winograd)
        found.append(row)
    return found


def _is_cuda(device: torch.device | str) -> bool:
    """Whether it is a CUDA device; meta stands for the CPU, and there are no others."""
    kind = None
    if isinstance(device, (str, torch.device)):
        with contextlib.suppress(RuntimeError):  # not a device
            kind = torch.device(device).type
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device: expected cpu or cuda, got {str(device)!r}")
    return kind == "cuda"


_DIRECTIONS: Final = ("fprop", "dgrad", "wgrad")


def _reference() -> Candidates:
    """What serves a call without a native library."""
    reason = "there is no native library; see fastbconv.build_info()"
    return Candidates(Candidate(name, "reference", True, True, reason) for name in _DIRECTIONS)


def _check_cuda(asked: bool) -> None:
    if asked and not (ops.cuda() or _native.build_info().get("interpreter")):
        raise _no_cuda("device", "cpu, got cuda")


def _composed(device: torch.device | str) -> Candidates:
    """What serves three-dimensional and transposed convolutions, whatever their shape."""
    on_cuda = _is_cuda(device)
    if not ops.available():
        return _reference()
    _check_cuda(on_cuda)
    only = "for one and two dimensions, not transposed"
    composed = "our draws, PyTorch's convolution"
    if torch.are_deterministic_algorithms_enabled() and not on_cuda:
        composed += "; refused by name, as its bits depend on the number of threads"
    rows = Candidates()
    for direction in _DIRECTIONS:
        rows.append(Candidate(direction, "library", True, True, composed))
        for name in _FUSED:
            rows.append(Candidate(direction, name, False, False, only))
    return rows


def _of_layer(
    layer: torch.nn.Module, input: Tensor, given: tuple[Any, ...], draws: int
) -> tuple[Any, ...] | None:
    """(input, weight, stride, padding, dilation, groups, estimator) of a layer and its input.

    None: the layer's calls are composed of PyTorch's convolution.
    """
    if given != (1, 0, 1, 1, "reparameterization"):
        raise ValueError(
            "stride, padding, dilation, groups, estimator: expected none beside a layer, which has "
            f"its own; got {given}"
        )
    own = getattr(layer, "_convolution_of", None)
    if own is None:
        raise TypeError(
            "input: expected a tensor, or a layer of this package and its input, got "
            f"{_arguments.type_name(layer)}; pass explain(input, weight) with the weight as "
            "(K, C / groups, R, S) and the input as (N, C, H, W)"
        )
    if _arguments.is_lazy(getattr(layer, "weight", None)):
        raise ValueError(
            f"input: expected a layer whose shape is known, got {_arguments.type_name(layer)}; "
            "call it once"
        )
    input = _arguments.tensor("input", input)
    if input.is_floating_point():
        input = input.to(_arguments.compute_dtype(input))  # autocast's
    return own(input, draws)
