"""The Bayesian transposed convolution with the arguments of torch.nn.ConvTranspose2d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbconv import _arguments, functional
from fastbconv._arguments import IntPair
from fastbconv.estimators import Estimator
from fastbconv.functional import ActivationLike
from fastbconv.functional.conv_transpose2d import least_extents
from fastbconv.kl import PriorLike

from ._base import EvalMode
from ._conv_base import BayesConvNd


class BayesConvTranspose2d(BayesConvNd, nn.ConvTranspose2d):
    r"""2-d transposed convolution whose weights are drawn from a mean-field normal posterior at
    each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(conv_transpose2d(input, w) + bias)

    Our sampling pass draws the weights, the library convolves; the drawn weight is kept for
    backward. The weight is numbered in the order C, R, S, K/groups: ``noise.weight_eps(seed,
    layer.weight.shape)`` is its eps.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or pair.
        stride: int or pair.
        padding: int or pair: rows and columns taken from each side of the output.
        output_padding: int or pair: rows and columns added to the end of the output.
        groups: number of groups.
        bias: whether there is a bias.
        dilation: int or pair.
        padding_mode: 'zeros'.
        device: as in BayesConv2d, like all that follows.
        dtype: see there.
        activation: see there.
        prior: see there.
        bayesian_bias: see there.
        estimator: see there.
        eval_mode: see there.

    Shape:
        input (N, C, H, W) or (C, H, W), any memory format; output (N, K, H_out, W_out) in the
        memory format of the input, and in its dtype;
        H_out = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.

    Attributes:
        weight: (C, K/groups, R, S) posterior mean.
        weight_rho: its untransformed scale. At first the scale is 0.1 / sqrt(fan_in) with fan_in =
            K/groups * R * S, which is torch's for this class.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.

    Example:
        >>> layer = BayesConvTranspose2d(3, 8, 4, stride=2, padding=1, activation="relu")
        >>> tuple(layer(torch.randn(2, 3, 16, 16)).shape)
        (2, 8, 32, 32)
    """

    rank = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        output_padding: IntPair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: IntPair = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        prior: PriorLike = (0.0, 1.0),
        bayesian_bias: bool = False,
        estimator: Estimator = "reparameterization",
        eval_mode: EvalMode = "sample",
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                "padding_mode: expected 'zeros', as in torch.nn.ConvTranspose2d, got "
                f"{padding_mode!r}"
            )
        padding = _arguments.pair("padding", padding, 0)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            output_padding=_arguments.pair("output_padding", output_padding, 0),
        )
        self.padding = padding
        self._init_options(activation, estimator, eval_mode)
        self._init_posterior(prior, bayesian_bias)

    def forward(
        self,
        input: Tensor,
        output_size: Sequence[int] | None = None,
        seed: int | Tensor | None = None,
        *,
        num_samples: int = 1,
        share_input: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws the weights and convolves.

        Args:
            input: (N, C, H, W) or (C, H, W).
            output_size: (H_out, W_out), also behind the first dimensions of the output; None: that
                of ``output_padding``.
            seed: as in BayesConv2d, like all that follows.
            num_samples: see there.
            share_input: see there.
            generator: see there.

        Returns:
            (rows, K, H_out, W_out); rows = num_samples * N with ``share_input``, else N.

        Raises:
            TypeError: an ``output_size`` that is no sequence: a seed, say, which goes by name.
            ValueError: an ``output_size`` that no output padding gives.
        """
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._padding_to(input, _sizes(output_size))
        return self._call(
            functional.bayes_conv_transpose2d,
            input,
            seed,
            generator,
            num_samples,
            share_input,
            stride=self.stride,
            padding=self.padding,
            output_padding=output_padding,
            groups=self.groups,
            dilation=self.dilation,
        )

    def _convolution_of(self, input: Tensor, draws: int) -> None:
        """For ``fastbconv.explain``: PyTorch's convolution computes every call."""
        self._explained(input, draws, transposed=True)

    def _padding_to(self, input: Tensor, output_size: tuple[int, ...]) -> tuple[int, ...]:
        """The output padding that gives an output of this size."""
        _arguments.batched_image(input, 1)
        if len(output_size) not in (2, input.ndim):
            raise ValueError(
                f"output_size: expected (H_out, W_out) or {input.ndim} sizes, got {output_size}"
            )
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        least = least_extents(input.shape[-2:], *geometry)
        most = tuple(size + stride - 1 for size, stride in zip(least, self.stride, strict=True))
        added = tuple(size - low for size, low in zip(output_size[-2:], least, strict=True))
        if any(not 0 <= rows < stride for rows, stride in zip(added, self.stride, strict=True)):
            raise ValueError(
                f"output_size: expected from {least} to {most} for an input of "
                f"{tuple(input.shape[-2:])}, got {output_size[-2:]}"
            )
        return added


def _sizes(output_size: Any) -> tuple[int, ...]:
    """``output_size`` as a tuple; what is none has been meant as a seed."""
    if isinstance(output_size, (str, Tensor)) or not hasattr(output_size, "__iter__"):
        raise TypeError(
            f"output_size: expected (H_out, W_out), got {_arguments.type_name(output_size)}; it is "
            "the second argument, as in torch.nn.ConvTranspose2d, and a seed goes by name: seed="
        )
    return tuple(output_size)
