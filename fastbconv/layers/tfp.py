"""The TFP face: layers of ``tfp.layers`` with their documented arguments, order and defaults.

Recorded behaviour of TFP that is deliberately not followed:

* Layers of equal shape start from equal values there (one set of numbers per shape), so that a
  trainable prior starts at KL 0. Here every variable is drawn independently.
* The default divergence of plain elementwise distributions is an unsummed tensor there, and a mix
  with Independent ones has no KL. Here both give the sum.
* ``losses`` are computed in the call there and keep its values. Here divergences are computed when
  they are read: they follow the variables, and nothing is held.
* A dilated layer remembers the size of its first input there, and a second ``build`` adds more
  variables. Here inputs may change their size, and building again does nothing.
* Values and shapes are checked in the constructor here, some at build or in the call there;
  filters=0 and 0 input channels are ValueErrors. bfloat16 works. A float16 layer computes through
  float32.
* Configurations hold marshalled byte code there, which fails on loading; here they are JSON.
* ``dtype`` is a torch dtype, and ``mean`` and ``stddev`` of a distribution are properties, as
  everywhere in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastbconv import functional

from . import tfp_arguments as arguments
from .tfp_arguments import InputSpec
from .tfp_base import VariationalLayer
from .tfp_channels_last import ChannelsLast
from .tfp_config import register_function
from .tfp_distributions import (
    Deterministic,
    MeanFieldNormalFn,
    default_loc_scale_fn,
    default_mean_field_normal_fn,
    default_multivariate_normal_fn,
    kl_divergence,
    posterior_mean,
    posterior_sample,
)
from .tfp_sampling import Part, Posterior
from .tfp_variables import apply_constraints, to_operator

__all__ = [
    "ChannelsLast",
    "Convolution2DReparameterization",
    "DenseReparameterization",
    "Deterministic",
    "apply_constraints",
    "default_loc_scale_fn",
    "default_mean_field_normal_fn",
    "default_multivariate_normal_fn",
    "kl_divergence",
    "posterior_mean",
    "posterior_sample",
    "register_function",
]

_POSTERIOR = MeanFieldNormalFn()
_POINT_MASS = MeanFieldNormalFn(is_singular=True)


class VariationalConv(VariationalLayer):
    """A convolution of any rank; ``rank`` is a class attribute, the estimator a subclass's."""

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
        kernel_size: Any,
        strides: Any,
        padding: str,
        data_format: str,
        dilation_rate: Any,
        activation: Any,
        activity_regularizer: Any,
        functions: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        checked = {
            "filters": arguments.positive_int("filters", filters),
            "kernel_size": arguments.int_tuple("kernel_size", kernel_size, self.rank),
            "strides": arguments.int_tuple("strides", strides, self.rank),
            "padding": arguments.choice("padding", padding, ("valid", "same")),
            "data_format": arguments.choice(
                "data_format", data_format, ("channels_last", "channels_first")
            ),
            "dilation_rate": arguments.int_tuple("dilation_rate", dilation_rate, self.rank),
        }
        if max(checked["strides"]) > 1 and max(checked["dilation_rate"]) > 1:
            raise ValueError(
                "dilation_rate: expected 1 together with strides > 1, got strides="
                f"{checked['strides']} and dilation_rate={checked['dilation_rate']}; "
                "fastbconv.BayesConv2d takes both"
            )
        # Plain attributes: they are there before nn.Module is set up.
        self.__dict__.update(checked)
        super().__init__(activation, activity_regularizer, functions, options)
        self.__dict__.update(checked)

    @property
    def _channels_first(self) -> bool:
        return self.data_format == "channels_first"

    def _input_spec(self, channels: int | None) -> InputSpec:
        axis = 1 if self._channels_first else -1
        return InputSpec(ndim=self.rank + 2, axes={} if channels is None else {axis: channels})

    def _shape_of(self, part: Part, channels: int) -> tuple[int, ...]:
        if part == "bias":
            return (self.filters,)
        return (*self.kernel_size, channels, self.filters)

    def _channels_of(self, shape: tuple[int | None, ...]) -> int | None:
        return shape[1 if self._channels_first else -1]

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
            channels_first=self._channels_first,
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


class VariationalDense(VariationalLayer):
    """A linear map of the last axis; the estimator is a subclass's."""

    rank = 0
    _config_arguments = ("units",)

    def __init__(
        self,
        units: int,
        activation: Any,
        activity_regularizer: Any,
        functions: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.__dict__["units"] = arguments.positive_int("units", units)
        super().__init__(activation, activity_regularizer, functions, options)

    def _input_spec(self, channels: int | None) -> InputSpec:
        return InputSpec(min_ndim=2, axes={} if channels is None else {-1: channels})

    def _shape_of(self, part: Part, channels: int) -> tuple[int, ...]:
        return (self.units,) if part == "bias" else (channels, self.units)

    def _channels_of(self, shape: tuple[int | None, ...]) -> int | None:
        return shape[-1]

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The input shape with ``units`` as its last entry.

        Raises:
            ValueError: fewer than two dimensions, or an unknown last one.
        """
        shape = arguments.shape_tuple("input_shape", input_shape)
        arguments.check_rank(self.name, shape, self._input_spec(None))
        if shape[-1] is None:
            raise ValueError(f"input_shape: expected a known last entry, got {shape}")
        return (*shape[:-1], self.units)

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        return ", ".join([f"{self.units}", *self._repr_options()])


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

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1),
        padding: str = "valid",
        data_format: str = "channels_last",
        dilation_rate: int | Sequence[int] = (1, 1),
        activation: str | Callable[[Tensor], Tensor] | None = None,
        activity_regularizer: Any = None,
        kernel_posterior_fn: Callable[..., Any] = _POSTERIOR,
        kernel_posterior_tensor_fn: Callable[[Any], Tensor] = posterior_sample,
        kernel_prior_fn: Callable[..., Any] | None = default_multivariate_normal_fn,
        kernel_divergence_fn: Callable[..., Any] | None = kl_divergence,
        bias_posterior_fn: Callable[..., Any] | None = _POINT_MASS,
        bias_posterior_tensor_fn: Callable[[Any], Tensor] | None = posterior_sample,
        bias_prior_fn: Callable[..., Any] | None = None,
        bias_divergence_fn: Callable[..., Any] | None = kl_divergence,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
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
            kwargs,
        )

    def _apply_posteriors(
        self, inputs: Tensor, kernel: Posterior, bias: tuple[Any, Any], **options: Any
    ) -> Any:
        image = inputs if self._channels_first else inputs.permute(0, 3, 1, 2)
        loc, rho = kernel
        result = functional.bayes_conv2d(
            image,
            to_operator(loc),
            None if rho is None else to_operator(rho),
            *bias,
            stride=self.strides,
            padding=self.padding,
            dilation=self.dilation_rate,
            **options,
        )
        output, total = result if options["return_kl"] else (result, None)
        output = output if self._channels_first else output.permute(0, 2, 3, 1)
        return output if total is None else (output, total)


class DenseReparameterization(VariationalDense):
    r"""Linear map with kernel and bias drawn from posteriors: ``activation(inputs @ kernel +
    bias)``.

    See ``Convolution2DReparameterization`` for what the arguments mean.

    Args:
        units: size of the output's last axis.
        activation: None, a Keras name or a callable.
        activity_regularizer: see there.
        trainable: whether the variables take gradients.
        kernel_posterior_fn: see there, and likewise for the other functions.
        **kwargs: see there; also input_dim.

    Shape:
        inputs: (N, ..., in). output: (N, ..., units). kernel variables: (in, units).

    Example:
        >>> import torch
        >>> layer = DenseReparameterization(10)
        >>> tuple(layer(torch.randn(4, 7)).shape)
        (4, 10)
    """

    def __init__(
        self,
        units: int,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        activity_regularizer: Any = None,
        trainable: bool = True,
        kernel_posterior_fn: Callable[..., Any] = _POSTERIOR,
        kernel_posterior_tensor_fn: Callable[[Any], Tensor] = posterior_sample,
        kernel_prior_fn: Callable[..., Any] | None = default_multivariate_normal_fn,
        kernel_divergence_fn: Callable[..., Any] | None = kl_divergence,
        bias_posterior_fn: Callable[..., Any] | None = _POINT_MASS,
        bias_posterior_tensor_fn: Callable[[Any], Tensor] | None = posterior_sample,
        bias_prior_fn: Callable[..., Any] | None = None,
        bias_divergence_fn: Callable[..., Any] | None = kl_divergence,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
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
            {**kwargs, "trainable": trainable},
        )

    def _apply_posteriors(
        self, inputs: Tensor, kernel: Posterior, bias: tuple[Any, Any], **options: Any
    ) -> Any:
        loc, rho = kernel
        weight_rho = None if rho is None else to_operator(rho)
        return functional.bayes_linear(inputs, to_operator(loc), weight_rho, *bias, **options)
