"""The convolutions of the TFP face: arguments, shapes, and the call of the operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbconv import functional
from fastbconv.functional.conv1d import as_plane

from . import tfp_arguments as arguments
from .tfp_arguments import InputSpec
from .tfp_base import DEFAULT_POINT_MASS, DEFAULT_POSTERIOR, VariationalLayer
from .tfp_distributions import (
    default_multivariate_normal_fn,
    kl_divergence,
    posterior_sample,
)
from .tfp_sampling import Part

_CONVOLUTIONS = {
    1: functional.bayes_conv1d,
    2: functional.bayes_conv2d,
    3: functional.bayes_conv3d,
}


class VariationalConv(VariationalLayer):
    """A convolution of any rank; ``rank`` and the estimator are those of a subclass."""

    _config_arguments = (
        "filters",
        "kernel_size",
        "strides",
        "padding",
        "data_format",
        "dilation_rate",
    )

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str = "channels_last",
        dilation_rate: int | Sequence[int] = 1,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        activity_regularizer: Any = None,
        kernel_posterior_fn: Callable[..., Any] = DEFAULT_POSTERIOR,
        kernel_posterior_tensor_fn: Callable[[Any], Tensor] = posterior_sample,
        kernel_prior_fn: Callable[..., Any] | None = default_multivariate_normal_fn,
        kernel_divergence_fn: Callable[..., Any] | None = kl_divergence,
        bias_posterior_fn: Callable[..., Any] | None = DEFAULT_POINT_MASS,
        bias_posterior_tensor_fn: Callable[[Any], Tensor] | None = posterior_sample,
        bias_prior_fn: Callable[..., Any] | None = None,
        bias_divergence_fn: Callable[..., Any] | None = kl_divergence,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        checked = self._checked_geometry(
            filters, kernel_size, strides, padding, data_format, dilation_rate
        )
        self.__dict__.update(checked)  # plain attributes: they may come before nn.Module's own
        super().__init__(
            activation,
            activity_regularizer,
            {
                "kernel_posterior_fn": kernel_posterior_fn,
                "kernel_posterior_tensor_fn": kernel_posterior_tensor_fn,
                "kernel_prior_fn": kernel_prior_fn,
                "kernel_divergence_fn": kernel_divergence_fn,
                "bias_posterior_fn": bias_posterior_fn,
                "bias_posterior_tensor_fn": bias_posterior_tensor_fn,
                "bias_prior_fn": bias_prior_fn,
                "bias_divergence_fn": bias_divergence_fn,
            },
            kwargs if seed is None else {**kwargs, "seed": seed},
        )

    @classmethod
    def _checked_geometry(
        cls,
        filters: int,
        kernel_size: Any,
        strides: Any,
        padding: str,
        data_format: str,
        dilation_rate: Any,
    ) -> dict[str, Any]:
        strides = arguments.int_tuple("strides", strides, cls.rank)
        dilation = arguments.int_tuple("dilation_rate", dilation_rate, cls.rank)
        if max(strides) > 1 and max(dilation) > 1:
            raise ValueError(
                f"dilation_rate: expected 1 together with strides > 1, got strides={strides} and "
                f"dilation_rate={dilation}; fastbconv.functional.bayes_conv{cls.rank}d takes both"
            )
        formats = ("channels_last", "channels_first")
        return {
            "filters": arguments.positive_int("filters", filters),
            "kernel_size": arguments.int_tuple("kernel_size", kernel_size, cls.rank),
            "strides": strides,
            "padding": arguments.choice("padding", padding, ("valid", "same")),
            "data_format": arguments.choice("data_format", data_format, formats),
            "dilation_rate": dilation,
        }

    @classmethod
    def _documented_signature(cls) -> inspect.Signature:
        """Strides and dilation default to one number for each axis."""
        signature = super()._documented_signature()
        ones = 1 if getattr(cls, "rank", 1) == 1 else (1,) * cls.rank
        return signature.replace(
            parameters=[
                p.replace(default=ones) if p.name in ("strides", "dilation_rate") else p
                for p in signature.parameters.values()
            ]
        )

    @property
    def _channel_axis(self) -> int:
        return 1 if self.data_format == "channels_first" else -1

    def _input_spec(self, channels: int | None) -> InputSpec:
        axes = {} if channels is None else {self._channel_axis: channels}
        return InputSpec(ndim=self.rank + 2, axes=axes)

    def _shape_of(self, part: Part, channels: int) -> tuple[int, ...]:
        if part == "bias":
            return (self.filters,)
        return (*self.kernel_size, channels, self.filters)

    def _to_operators(self, inputs: Tensor) -> Tensor:
        return inputs if self._channel_axis == 1 else inputs.movedim(-1, 1)

    def _from_operators(self, output: Tensor) -> Tensor:
        return output if self._channel_axis == 1 else output.movedim(1, -1)

    def _geometry(self) -> tuple[Any, ...]:
        return self.strides, self.padding, self.dilation_rate, 1

    def _affine_map(
        self, inputs: Tensor, weight: Tensor, rho: Tensor | None, *bias: Any, **options: Any
    ) -> Any:
        return _CONVOLUTIONS[self.rank](
            inputs,
            weight,
            rho,
            *bias,
            stride=self.strides,
            padding=self.padding,
            dilation=self.dilation_rate,
            **options,
        )

    def _convolution_of(self, inputs: Tensor, draws: int) -> tuple[Any, ...] | None:
        """For ``fastbconv.explain``: the arguments of the convolution behind a call."""
        image = self._to_operators(self._checked_input(inputs))
        if self.rank == 3:
            return None
        shape = (self.filters, image.shape[1], *self.kernel_size)
        weight = image.new_empty(shape, dtype=torch.promote_types(self._dtype, torch.float32))
        geometry = (self.strides, self.padding, self.dilation_rate)
        if self.rank == 2:
            return image, weight, *geometry, 1, self._estimator
        image, weight, of_plane = as_plane(image, weight, *geometry)
        return image, weight, *of_plane.values(), 1, self._estimator

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Output shape for an input shape, with None for unknown sizes; works before ``build``.

        Raises:
            ValueError: unknown or wrong rank, or a spatial size that the kernel does not fit.
        """
        return arguments.conv_output_shape(
            input_shape,
            filters=self.filters,
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            channels_first=self._channel_axis == 1,
        )

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        ones = (1,) * self.rank
        parts = [f"{self.filters}, kernel_size={self.kernel_size}"]
        defaults = {
            "strides": ones,
            "padding": "valid",
            "data_format": "channels_last",
            "dilation_rate": ones,
        }
        parts += [
            f"{key}={getattr(self, key)!r}"
            for key, default in defaults.items()
            if getattr(self, key) != default
        ]
        return ", ".join(parts + self._repr_options())


class Convolution2DReparameterization(VariationalConv):
    r"""2D convolution with kernel and bias drawn from posteriors: ``tfp.layers``'s layer.

    .. code-block:: text

        kernel = kernel_posterior_tensor_fn(kernel_posterior)     by default loc + scale * eps
        output = activation(conv2d(inputs, kernel) + bias)        cross-correlation
        scale  = eps_machine + softplus(untransformed_scale)

    One draw is shared by the whole batch, in training and inference alike. ``losses`` are the KL
    divergences from the priors, plain sums in nats: a training step minimises
    ``mean NLL of the batch + sum(layer.losses) / number of training examples``.

    Where posterior and tensor functions are the built-in ones, noise is drawn inside the
    convolution from a 16-byte seed and made again in backward; nothing else is stored.
    C. Blundell, J. Cornebise, K. Kavukcuoglu, D. Wierstra, "Weight uncertainty in neural networks",
    ICML 2015 (arXiv:1505.05424).

    Args:
        filters: number of output channels.
        kernel_size: an integer or two: height and width of the window.
        strides: an integer or two.
        padding: 'valid' or 'same' (TensorFlow's rule: the odd zero goes to the end), in any case.
        data_format: 'channels_last' (N, H, W, C) or 'channels_first' (N, C, H, W), in any case.
        dilation_rate: an integer or two; not together with strides > 1.
        activation: None, a Keras name ('leaky_relu' has slope 0.2, 'softmax' is over the last
            axis), or a callable of the output.
        activity_regularizer: None, a callable of the output, 'l1', 'l2', 'l1_l2' or a
            configuration; its value is divided by the batch size.
        kernel_posterior_fn: ``fn(dtype, shape, name, trainable, add_variable_fn)``, which returns a
            distribution.
        kernel_posterior_tensor_fn: takes the posterior and returns the kernel.
        kernel_prior_fn: like ``kernel_posterior_fn``; None: no kernel loss.
        kernel_divergence_fn: ``fn(posterior, prior, sample)``; None: no kernel loss.
        bias_posterior_fn: likewise for the bias, by default a point mass; None: no bias.
        bias_posterior_tensor_fn: likewise.
        bias_prior_fn: likewise; None (the default): no bias loss.
        bias_divergence_fn: likewise.
        **kwargs: name, trainable, dtype (a string, torch or NumPy dtype), input_shape,
            batch_input_shape, batch_size, weights (initial values), dynamic, autocast, device.

    Shape:
        inputs: (N, H, W, C), or (N, C, H, W) with 'channels_first'.
        output: (N, H', W', filters), or (N, filters, H', W').
        kernel variables: (height, width, C, filters) for both formats, stored so that the permuted
        (filters, C, height, width) view is channels_last.

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction.

    Example:
        >>> import torch
        >>> layer = Convolution2DReparameterization(64, kernel_size=5, padding="SAME")
        >>> y = layer(torch.randn(2, 32, 32, 3))
        >>> tuple(y.shape), len(layer.losses)
        ((2, 32, 32, 64), 1)
    """

    rank = 2
    _short_name = "Conv2DReparameterization"


class Convolution1DReparameterization(VariationalConv):
    r"""1D convolution with kernel and bias drawn from posteriors: ``tfp.layers``'s layer.

    ``output = activation(conv1d(inputs, kernel) + bias)``; see ``Convolution2DReparameterization``.

    Args:
        filters: as in ``Convolution2DReparameterization``, like all that follows.
        kernel_size: an integer, or a sequence of one; likewise strides and dilation_rate.

    Shape:
        inputs: (N, L, C), or (N, C, L) with 'channels_first'.
        output: (N, L', filters), or (N, filters, L').
        kernel variables: (length, C, filters).

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction.

    Example:
        >>> import torch
        >>> layer = Convolution1DReparameterization(8, kernel_size=5, padding="same", strides=2)
        >>> tuple(layer(torch.randn(2, 16, 3)).shape)
        (2, 8, 8)
    """

    rank = 1
    _short_name = "Conv1DReparameterization"


class Convolution3DReparameterization(VariationalConv):
    r"""3D convolution with kernel and bias drawn from posteriors: ``tfp.layers``'s layer.

    ``output = activation(conv3d(inputs, kernel) + bias)``; see ``Convolution2DReparameterization``.

    Args:
        filters: as in ``Convolution2DReparameterization``, like all that follows.
        kernel_size: an integer or three; likewise strides and dilation_rate.

    Shape:
        inputs: (N, D, H, W, C), or (N, C, D, H, W) with 'channels_first'.
        output: (N, D', H', W', filters), or (N, filters, D', H', W').
        kernel variables: (depth, height, width, C, filters).

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction.

    Example:
        >>> import torch
        >>> layer = Convolution3DReparameterization(4, kernel_size=(1, 3, 3))
        >>> tuple(layer(torch.randn(2, 4, 6, 6, 3)).shape)
        (2, 4, 4, 4, 4)
    """

    rank = 3
    _short_name = "Conv3DReparameterization"
