"""NCHW modules on NHWC tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Runs a module for (N, C, ...) tensors on (N, ..., C) tensors, through views.

    The module sees a channels_last view of its input, which pooling, normalisation and convolution
    keep, so that nothing is copied. A bare ``nn.MaxPool2d`` on NHWC tensors would pool over width
    and channels, silently.

    Args:
        module: the module to run.

    Shape:
        inputs: (N, ..., C). Outputs with three or more dimensions come back as (N, ..., C), others
        as the module gives them.

    Example:
        >>> import torch
        >>> pool = ChannelsLast(nn.MaxPool2d(2))
        >>> tuple(pool(torch.randn(1, 8, 6, 3)).shape)
        (1, 4, 3, 3)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Any:
        """The module's output, channels last."""
        if inputs.dim() < 3:
            raise ValueError(
                f"inputs: expected (N, ..., C) with a spatial axis, got shape {tuple(inputs.shape)}"
            )
        return _channels_to_end(self.module(inputs.movedim(-1, 1)))


def _channels_to_end(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.movedim(1, -1) if output.dim() > 2 else output
    if isinstance(output, (tuple, list)):
        return type(output)(_channels_to_end(value) for value in output)
    return output
