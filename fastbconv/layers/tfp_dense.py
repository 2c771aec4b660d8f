"""The linear maps of the TFP face: arguments, shapes, and the call of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbconv import functional

from . import tfp_arguments as arguments
from .tfp_arguments import InputSpec
from .tfp_base import DEFAULT_POINT_MASS, DEFAULT_POSTERIOR, VariationalLayer
from .tfp_distributions import (
    default_multivariate_normal_fn,
    kl_divergence,
    posterior_sample,
)
from .tfp_sampling import Part


class VariationalDense(VariationalLayer):
    """A linear map of the last axis; the estimator is a subclass's."""

    rank = 0
    _channel_axis = -1
    _config_arguments = ("units",)

    def __init__(
        self,
        units: int,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        activity_regularizer: Any = None,
        trainable: bool = True,
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
        # A plain attribute: it may come before nn.Module's own.
        self.__dict__["units"] = arguments.positive_int("units", units)
        options = {**kwargs, "trainable": trainable}
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
            options if seed is None else {**options, "seed": seed},
        )

    def _input_spec(self, channels: int | None) -> InputSpec:
        return InputSpec(min_ndim=2, axes={} if channels is None else {-1: channels})

    def _shape_of(self, part: Part, channels: int) -> tuple[int, ...]:
        return (self.units,) if part == "bias" else (channels, self.units)

    def _to_operators(self, inputs: Tensor) -> Tensor:
        return inputs

    def _from_operators(self, output: Tensor) -> Tensor:
        return output

    def _geometry(self) -> None:
        return None

    def _affine_map(
        self, inputs: Tensor, weight: Tensor, rho: Tensor | None, *bias: Any, **options: Any
    ) -> Any:
        return functional.bayes_linear(inputs, weight, rho, *bias, **options)

    def _convolution_of(self, inputs: Tensor, draws: int) -> tuple[Any, ...]:
        """For ``fastbconv.explain``: the arguments of the convolution behind a call."""
        inputs = self._checked_input(inputs)
        image = inputs.reshape(-1, inputs.shape[-1], 1, 1)
        dtype = torch.promote_types(self._dtype, torch.float32)
        weight = image.new_empty((self.units, image.shape[1], 1, 1), dtype=dtype)
        return image, weight, 1, 0, 1, 1, self._estimator

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


class DenseReparameterization(VariationalDense):
    r"""Linear map with kernel and bias drawn from posteriors: ``tfp.layers``'s layer.

    ``output = activation(inputs @ kernel + bias)``, over the last axis; see
    ``Convolution2DReparameterization``.

    Args:
        units: size of the output's last axis.
        activation: as in ``Convolution2DReparameterization``.
        activity_regularizer: see there.
        trainable: whether the variables take gradients.
        kernel_posterior_fn: see there, and likewise for the other functions.
        **kwargs: see there; also input_dim.

    Shape:
        inputs: (N, ..., in). output: (N, ..., units). kernel variables: (in, units).

    Raises:
        ValueError, TypeError: an argument that does not fit, at construction.

    Example:
        >>> import torch
        >>> layer = DenseReparameterization(10)
        >>> tuple(layer(torch.randn(4, 7)).shape)
        (4, 10)
    """
