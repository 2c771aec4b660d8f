"""What Bayesian convolutions of any rank share, transposed ones too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from fastbconv import _arguments

from ._base import BayesLayer

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class BayesConvNd(BayesLayer, _ConvNd):
    """Checks and repr of a convolution with ``rank`` spatial axes.

    A subclass has the class of torch.nn behind this one among its bases: what asks
    ``isinstance(module, nn.Conv2d)``, as functions for ``model.apply`` do, finds it.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        output_padding: tuple[int, ...] | None = None,
    ) -> None:
        """Without padding, which the subclass sets: torch refuses 'same' with a stride, and unequal
        sides. With ``output_padding`` the convolution is a transposed one."""
        least = 0 if isinstance(self, LazyModuleMixin) else 1  # 0: not known yet
        in_channels = _arguments.integer("in_channels", in_channels, least)
        out_channels = _arguments.integer("out_channels", out_channels, 1)
        groups = _arguments.integer("groups", groups, 1)
        check_groups(groups, in_channels, out_channels)
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        if dtype is not None and dtype not in _arguments.FLOATING:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        none = (0,) * self.rank
        # Not super(): the class of torch.nn among the bases is there for isinstance, and its
        # constructor would check the padding and pass other arguments on.
        _ConvNd.__init__(
            self,
            in_channels,
            out_channels,
            _arguments.spatial("kernel_size", kernel_size, self.rank),
            _arguments.spatial("stride", stride, self.rank),
            none,
            _arguments.spatial("dilation", dilation, self.rank),
            output_padding is not None,
            none if output_padding is None else output_padding,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def _explained(self, input: Tensor, draws: int, transposed: bool = False) -> Tensor:
        """For ``fastbconv.explain``: the weight, once the input of a call has been checked."""
        weight = self.weight.to("meta") if input.is_meta else self.weight
        image, _ = _arguments.batched_image(input, draws, rank=self.rank)
        _arguments.conv_tensors(image, weight, None, None, None, self.groups, self.rank, transposed)
        _arguments.dtypes(image, "weight", weight)
        _arguments.rows(image, draws)
        return weight

    def extra_repr(self) -> str:
        """The arguments that are not at their default."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        none, once = (0,) * self.rank, (1,) * self.rank
        if self.padding not in (none, "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != once:
            text += f", dilation={self.dilation}"
        if self.output_padding != none:
            text += f", output_padding={self.output_padding}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text + self._extra_options()


def check_groups(groups: int, in_channels: int, out_channels: int) -> None:
    """Raises unless the groups divide both."""
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups != 0:
            raise ValueError(f"groups: expected a divisor of {name} = {channels}, got {groups}")
