"""Bayesian convolutions with the arguments of torch.nn.ConvNd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from fastbconv import _arguments, functional
from fastbconv._quick import quick_call
from fastbconv.estimators import Estimator
from fastbconv.functional import ActivationLike
from fastbconv.functional.conv1d import as_plane
from fastbconv.kl import PriorLike

from ._base import EvalMode
from ._conv_base import BayesConvNd


class _BayesConv(BayesConvNd):
    """A convolution that is not transposed; ``function`` is that of its rank."""

    function: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: _arguments.PaddingLike = 0,
        dilation: int | Sequence[int] = 1,
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
        form = _arguments.padding_form(padding, self.rank)
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
            input: with or without a batch dimension.
            seed: int ``n``, meaning (n, 0), or an int64 tensor (2,); None draws a fresh one.
            num_samples: weight draws; the rows are that many equal consecutive groups.
            share_input: every draw reads all rows.
            generator: where the seed is drawn from.

        Returns:
            The output; its rows are num_samples * N with ``share_input``, else N.
        """
        if self.padding_mode == "zeros" and num_samples == 1 and not share_input:
            output = self._quick(input, seed) if generator is None else None
            if output is not None:
                return output
        input, padding = self._padded(input)
        self._check_size(input, padding)
        return self._call(
            self.function,
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

    def _quick(self, input: Tensor, seed: int | Tensor | None) -> Tensor | None:
        """The short way of a call, where this rank has one."""
        if self.rank == 3:
            return None
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return quick_call(self, input, seed, geometry)

    def _padded(self, input: Tensor) -> tuple[Tensor, _arguments.PaddingLike]:
        """What is convolved, and with which zeros around it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return self._pad(_arguments.tensor("input", input)), 0

    def _convolution_of(self, input: Tensor, draws: int) -> tuple[Any, ...] | None:
        """For ``fastbconv.explain``: the arguments of the convolution behind a call."""
        weight = self._explained(input, draws)
        input, padding = self._padded(input)
        self._check_size(input, padding)
        geometry = (self.stride, padding, self.dilation)
        if self.rank == 3:
            return None
        if self.rank == 2:
            return input, weight, *geometry, self.groups, self.estimator
        input, weight, of_plane = as_plane(input, weight, *geometry)
        return input, weight, *of_plane.values(), self.groups, self.estimator

    def _check_size(self, input: Tensor, padding: _arguments.PaddingLike) -> None:
        """As torch.nn, a layer wants an image that its filter fits into; of functional a size less
        gives an output without pixels."""
        if not isinstance(input, Tensor) or input.ndim not in (self.rank + 1, self.rank + 2):
            return  # said with the other arguments
        extent, filter = input.shape[-self.rank :], self.kernel_size
        form = _arguments.padding_form(padding, self.rank)
        pads = _arguments.resolve_padding(form, extent, filter, self.stride, self.dilation)
        _arguments.extents(extent, pads, filter, self.stride, self.dilation, least=1)

    def _pad(self, input: Tensor) -> Tensor:
        """Padding with values of the image instead of zeros."""
        if input.ndim not in (self.rank + 1, self.rank + 2):
            image = _arguments.IMAGE[self.rank]
            raise ValueError(
                f"input: expected shape (N, {image}) or ({image}), got {tuple(input.shape)}"
            )
        extent = input.shape[-self.rank :]
        pads = _arguments.resolve_padding(
            self._padding, extent, self.kernel_size, self.stride, self.dilation
        )
        if not any(pads):
            return input
        # F.pad begins with the last axis.
        sides = [pads[2 * axis + end] for axis in reversed(range(self.rank)) for end in (0, 1)]
        padded = F.pad(input, sides, mode=self.padding_mode)
        # ATen's circular padding forgets channels_last.
        return padded.contiguous(memory_format=suggest_memory_format(input))


def _symmetric(form: tuple[int, ...]) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """One padding for each axis where both its sides are equal, else a pair for each axis."""
    if form[::2] == form[1::2]:
        return form[::2]
    return tuple(form[first : first + 2] for first in range(0, len(form), 2))


class BayesConv1d(_BayesConv, nn.Conv1d):
    r"""1-d convolution whose weights are drawn from a mean-field normal posterior at each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(conv1d(input, w) + bias)

    Runs the kernels of two dimensions on images of one row. Arguments, attributes and exceptions
    are those of BayesConv2d, with one spatial axis.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int.
        stride: int.
        padding: int, ((left, right),), 'valid', or 'same' (TensorFlow's rule, with any stride).
        dilation: int.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: as in BayesConv2d, like all that follows.
        dtype: see there.
        activation: see there.
        prior: see there.
        bayesian_bias: see there.
        estimator: see there.
        eval_mode: see there.

    Shape:
        input (N, C, L) or (C, L); output (N, K, L_out), in the dtype of the input. Memory in the
        order N, L, C is the fast one.

    Attributes:
        weight: (K, C/groups, S) posterior mean.
        weight_rho: its untransformed scale.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.

    Example:
        >>> layer = BayesConv1d(3, 8, 5, padding="same", activation="relu")
        >>> tuple(layer(torch.randn(2, 3, 16)).shape)
        (2, 8, 16)
    """

    rank = 1
    function = staticmethod(functional.bayes_conv1d)


class BayesConv2d(_BayesConv, nn.Conv2d):
    r"""2-d convolution whose weights are drawn from a mean-field normal posterior at each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(conv2d(input, w) + bias)

    The KL divergence from the prior, ``kl_loss()``, is a plain sum in nats. The loss of a training
    step is ``mean NLL of the batch + fastbconv.kl_loss(model, n_data)``. Noise is drawn in
    ``train()`` and in ``eval()`` alike; ``eval_mode='mean'`` uses the means in ``eval()``.
    C. Blundell, J. Cornebise, K. Kavukcuoglu, D. Wierstra, "Weight uncertainty in neural networks",
    ICML 2015 (arXiv:1505.05424).

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
        memory format of the input (one channel is in both: in that of the weight), and in its
        dtype.

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

    rank = 2
    function = staticmethod(functional.bayes_conv2d)


class BayesConv3d(_BayesConv, nn.Conv3d):
    r"""3-d convolution whose weights are drawn from a mean-field normal posterior at each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(conv3d(input, w) + bias)

    Our sampling pass draws the weights, the library convolves; the drawn weight is kept for
    backward. Arguments, attributes and exceptions are those of BayesConv2d, with three spatial
    axes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or three.
        stride: int or three.
        padding: int, three ints, ((front, back), (top, bottom), (left, right)), 'valid', or 'same'
            (TensorFlow's rule, with any stride).
        dilation: int or three.
        groups: number of groups.
        bias: whether there is a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: as in BayesConv2d, like all that follows.
        dtype: see there.
        activation: see there.
        prior: see there.
        bayesian_bias: see there.
        estimator: see there.
        eval_mode: see there.

    Shape:
        input (N, C, D, H, W) or (C, D, H, W), any memory format; output (N, K, D_out, H_out, W_out)
        in the memory format of the input, and in its dtype.

    Attributes:
        weight: (K, C/groups, T, R, S) posterior mean.
        weight_rho: its untransformed scale.
        bias: (K,) or None.
        bias_rho: untransformed scale of the bias, or None.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.

    Example:
        >>> layer = BayesConv3d(3, 8, 3, padding="same", activation="relu")
        >>> tuple(layer(torch.randn(1, 3, 4, 6, 6)).shape)
        (1, 8, 4, 6, 6)
    """

    rank = 3
    function = staticmethod(functional.bayes_conv3d)
