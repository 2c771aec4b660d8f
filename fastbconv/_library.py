"""The library's convolution, called as the operators would be: any padding, any empty extent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The library's convolution with one to three spatial axes and padding on every side of each;
    an output without pixels is empty, not an error."""
    extents = [
        (size + padding[2 * axis] + padding[2 * axis + 1] - (filter - 1) * dilation[axis] - 1)
        // stride[axis]
        + 1
        for axis, (size, filter) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True))
    ]
    if 0 in extents:
        parts = x.sum() + weight.sum() + (0.0 if bias is None else bias.sum())
        return (parts * 0.0).expand(x.shape[0], weight.shape[0], *extents)
    before, after = tuple(padding[::2]), tuple(padding[1::2])
    # Of filters with one tap the pixels that they meet, without a stride: for few channels last
    # oneDNN's weight gradient writes past its workspace (uxlfoundation/oneDNN issue 6035).
    meets_few = weight.shape[2:].numel() == 1 and max(stride) > 1
    if before == after and 0 not in x.shape[2:] and not meets_few:
        pad = before
    else:
        sides = [zeros for pair in zip(before[::-1], after[::-1], strict=True) for zeros in pair]
        x, pad = F.pad(x, sides), (0,) * len(extents)
    if meets_few:
        x = x[(..., *(slice(None, None, step) for step in stride))]
        stride = (1,) * len(extents)
    if x.dtype == torch.float64:  # ATen's float64 path wants the weight's gradient contiguous
        x, weight = x.contiguous(), weight.contiguous()
    function = (F.conv1d, F.conv2d, F.conv3d)[len(extents) - 1]
    return function(x, weight, bias, tuple(stride), pad, tuple(dilation), groups)


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The library's transposed convolution with two spatial axes, of a checked problem."""
    if x.dtype == torch.float64:  # as in convolve
        x, weight = x.contiguous(), weight.contiguous()
    geometry = (tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    return F.conv_transpose2d(x, weight, None, *geometry)


@contextmanager
def outside_autocast(input: Tensor) -> Iterator[torch.dtype]:
    """Yields the dtype to compute in; inside, autocast is off: parameters and KL stay float32."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        yield input.dtype
        return
    cast = input.dtype if input.dtype == torch.float64 else torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield cast


def suggested_memory_format(input: Tensor) -> torch.memory_format:
    """Tensor::suggest_memory_format() of an image: the output takes this of the input.

    A permutation of strides that could be read both ways counts as contiguous, as in ATen.
    """
    last = input.ndim - 1
    if last not in (3, 4) or input.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(last, 1, -1), 0):
        size, stride = input.shape[dim], input.stride(dim)
        ambiguous = dim == 0 and least == input.stride(1)
        if size == 0 or stride < least or ambiguous:
            return torch.contiguous_format
        least = stride * max(size, 1)
    return torch.channels_last if last == 3 else torch.channels_last_3d


def in_memory_format(value: Tensor, layout: torch.memory_format) -> Tensor:
    """``value`` laid out so; inside a transform of torch.func, where vmap knows one layout only, as
    it is."""
    if torch._C._are_functorch_transforms_active():
        return value
    return value.contiguous(memory_format=layout)
