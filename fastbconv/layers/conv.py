"""Bayesian convolutions with the arguments of torch.nn.ConvNd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.modules.conv import _ConvNd

from fastbconv import _arguments, functional
from fastbconv._quick import quick_call
from fastbconv.estimators import Estimator
from fastbconv.functional import ActivationLike
from fastbconv.kl import PriorLike

from ._base import BayesLayer, EvalMode

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class BayesConv2d(BayesLayer, _ConvNd):
    r"""2-d convolution whose weights are drawn from a mean-field normal posterior at each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(conv2d(input, w) + bias)

    The KL divergence from the prior, ``kl_loss()``, is a plain sum in nats. The loss of a training
    step is ``mean NLL of the batch + fastbconv.kl_loss(model, n_data)``. Noise is drawn in
    ``train()`` and in ``eval()`` alike; ``eval_mode='mean'`` uses the means in ``eval()``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or pair.
        stride: int or pair.
        padding: int, pair, ((top, bottom), (left, right)), 'valid', or 'same' (TensorFlow's rule,
            with any stride).
        dilation: int or pair.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: of the parameters.
        dtype: of the parameters: float32 or float64; bfloat16 and float16 for inference.
        activation: name, function or module, fused where the kernels have it.
        prior: (loc, scale), each a float, a tensor that broadcasts to the weight (saved as a
            buffer) or a Parameter (trained); a ScaleMixture; a function that returns a torch
            distribution (both with a Monte-Carlo KL); None: no KL.
        bayesian_bias: also draw the bias; its prior is ``prior``.
        estimator: 'reparameterization' (one draw of the weights for the batch), 'flipout' (a weight
            of its own for every row, from sign flips of one draw), or 'local' (the pre-activations
            are drawn: right marginals, but no covariances between pixels, hence another objective,
            not one of less variance). See fastbconv.estimators.
        eval_mode: 'sample' or 'mean'.

    Shape:
        input (N, C, H, W) or (C, H, W), any memory format; output (N, K, H_out, W_out) in the
        memory format of the input, and in its dtype.

    Attributes:
        weight: (K, C/groups, R, S) posterior mean.
        weight_rho: its untransformed scale.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.

    Example:
        >>> layer = BayesConv2d(3, 8, 3, padding="same", activation="relu")
        >>> tuple(layer(torch.randn(2, 3, 16, 16)).shape)
        (2, 8, 16, 16)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | Sequence[int] | Sequence[Sequence[int]] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
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
        in_channels = _arguments.integer("in_channels", in_channels, 1)
        out_channels = _arguments.integer("out_channels", out_channels, 1)
        groups = _arguments.integer("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"groups: expected a divisor of {name} = {channels}, got {groups}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        if dtype is not None and dtype not in _arguments.FLOATING:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        form = _arguments.padding_form(padding)
        super().__init__(
            in_channels,
            out_channels,
            _arguments.pair("kernel_size", kernel_size),
            _arguments.pair("stride", stride),
            (0, 0),  # resolved here: torch refuses 'same' with a stride, and four sides
            _arguments.pair("dilation", dilation),
            False,
            (0, 0),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.padding = padding if isinstance(padding, str) else _symmetric(form)
        self._padding = form
        self._init_options(activation, estimator, eval_mode)
        self._init_posterior(prior, bayesian_bias)

    def forward(
        self,
        input: Tensor,
        seed: int | Tensor | None = None,
        *,
        num_samples: int = 1,
        share_input: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws the weights and convolves.

        Args:
            input: (N, C, H, W) or (C, H, W).
            seed: int ``n``, meaning (n, 0), or an int64 tensor (2,); None draws a fresh one.
            num_samples: weight draws; the rows are that many equal consecutive groups.
            share_input: every draw reads all rows.
            generator: where the seed is drawn from.

        Returns:
            (rows, K, H_out, W_out); rows = num_samples * N with ``share_input``, else N.
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            input = self._pad(input)
            padding = 0
        elif num_samples == 1 and generator is None and not share_input:
            geometry = (self.stride, padding, self.dilation, self.groups)
            output = quick_call(self, input, seed, geometry)
            if output is not None:
                return output
        return self._call(
            functional.bayes_conv2d,
            input,
            seed,
            generator,
            num_samples,
            share_input,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _convolution_of(self, input: Tensor) -> tuple[Any, ...]:
        """For ``fastbconv.explain``: the arguments of the convolution behind a call."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._pad(input), 0
        geometry = (self.stride, padding, self.dilation, self.groups)
        return input, self.weight, *geometry, self.estimator

    def _pad(self, input: Tensor) -> Tensor:
        """Padding with values of the image instead of zeros."""
        if input.ndim not in (3, 4):
            raise ValueError(
                f"input: expected shape (N, C, H, W) or (C, H, W), got {tuple(input.shape)}"
            )
        extent = (input.shape[-2], input.shape[-1])
        top, bottom, left, right = _arguments.resolve_padding(
            self._padding, extent, self.kernel_size, self.stride, self.dilation
        )
        if not top + bottom + left + right:
            return input
        padded = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        # ATen's circular padding forgets channels_last.
        return padded.contiguous(memory_format=suggest_memory_format(input))

    def extra_repr(self) -> str:
        """The arguments that are not at their default."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text + self._extra_options()


def _symmetric(form: tuple[int, int, int, int]) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    """(height, width) where both sides are equal, else ((top, bottom), (left, right))."""
    top, bottom, left, right = form
    if top == bottom and left == right:
        return (top, left)
    return ((top, bottom), (left, right))
