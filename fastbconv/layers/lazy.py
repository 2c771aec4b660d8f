"""Layers that take the number of their input channels from the first call, as torch.nn.LazyConv2d.

They are PyTorch's own lazy modules (``torch.nn.modules.lazy.LazyModuleMixin``), so that what knows
those knows these: until the first call, or ``fastbconv.build``, the parameters are
``UninitializedParameter`` objects, which optimisers may hold already. Then the layer becomes an
ordinary one: of the ordinary class, without hooks.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy

from fastbconv import _arguments
from fastbconv.kl import PriorLike

from ._conv_base import check_groups
from .conv import BayesConv1d, BayesConv2d, BayesConv3d
from .conv_transpose import BayesConvTranspose2d
from .linear import BayesLinear


class _Lazy(LazyModuleMixin):
    """Stands before an ordinary layer among the bases, and takes away its first argument."""

    inferred: ClassVar[str]  # the name of that argument

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.cls_to_become is not None:
            signature = inspect.signature(cls.cls_to_become)
            rest = list(signature.parameters.values())[1:]
            cls.__signature__ = signature.replace(parameters=rest)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(0, *arguments, **options)

    def _init_posterior(self, prior: PriorLike, bayesian_bias: bool) -> None:
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.weight = UninitializedParameter(**like)
        if self.bias is not None:
            self.bias = UninitializedParameter(**like)
        super()._init_posterior(prior, bayesian_bias)

    def reset_parameters(self) -> None:
        """As in the ordinary layer, once the parameters have shapes."""
        if getattr(self, self.inferred) and not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, *arguments: Any, **options: Any) -> None:
        """Gives all parameters their shapes, and first values to those that were not loaded.

        Raises:
            ValueError: the input does not fit the layer, or what was loaded the input.
        """
        channels, weight_shape, filters = self._infer(_arguments.tensor("input", input))
        if channels == 0:
            raise ValueError(f"input: expected at least one channel, got {tuple(input.shape)}")
        named = {name: getattr(self, name) for name in ("weight", "weight_rho", "bias", "bias_rho")}
        posterior = {name: value for name, value in named.items() if value is not None}
        shapes = {name: (filters,) if "bias" in name else weight_shape for name in posterior}
        self._check_shapes(posterior, shapes)
        setattr(self, self.inferred, channels)
        loaded = {}
        for name, parameter in posterior.items():
            if is_lazy(parameter):
                parameter.materialize(shapes[name])
            else:
                loaded[name] = parameter.detach().clone()
        if len(loaded) < len(posterior):
            self.reset_parameters()
            with torch.no_grad():
                for name, value in loaded.items():
                    posterior[name].copy_(value)

    def _infer(self, input: Tensor) -> tuple[int, tuple[int, ...], int]:
        """Channels of the input, shape of the weight, channels of the output."""
        raise NotImplementedError

    def _check_shapes(
        self, posterior: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """What exists already has to fit: parameters that were loaded, tensors of the prior."""
        for name, parameter in posterior.items():
            if not is_lazy(parameter):
                _arguments.shape(name, parameter, shapes[name])
        weight = torch.empty(shapes["weight"], device="meta")
        for part in ("loc", "scale"):
            value = getattr(self, f"prior_{part}", None)
            if value is not None:
                _arguments.prior_shape(f"prior {part}", value, weight)


class _LazyConv(_Lazy):
    inferred = "in_channels"

    def _infer(self, input: Tensor) -> tuple[int, tuple[int, ...], int]:
        image, _ = _arguments.batched_image(input, 1, self.rank)
        channels = image.shape[1]
        check_groups(self.groups, channels, self.out_channels)
        sides = (self.out_channels, channels // self.groups)
        if self.transposed:
            sides = (channels, self.out_channels // self.groups)
        return channels, (*sides, *self.kernel_size), self.out_channels


class LazyBayesConv1d(_LazyConv, BayesConv1d):
    """A BayesConv1d without ``in_channels``, which its first input tells; an ordinary one then.

    Args:
        arguments: those of BayesConv1d but the first, as in torch.nn.LazyConv1d.

    Shape:
        as in BayesConv1d.

    Raises:
        ValueError: a value that does not fit; at the first call, an input that does not.
        TypeError: a type that does not fit.

    Example:
        >>> layer = LazyBayesConv1d(8, 3)
        >>> tuple(layer(torch.randn(2, 3, 16)).shape)
        (2, 8, 14)
        >>> type(layer).__name__
        'BayesConv1d'
    """

    cls_to_become = BayesConv1d


class LazyBayesConv2d(_LazyConv, BayesConv2d):
    """A BayesConv2d without ``in_channels``, which its first input tells; an ordinary one then.

    Args:
        arguments: those of BayesConv2d but the first, as in torch.nn.LazyConv2d.

    Shape:
        as in BayesConv2d.

    Raises:
        ValueError: a value that does not fit; at the first call, an input that does not.
        TypeError: a type that does not fit.

    Example:
        >>> layer = LazyBayesConv2d(8, 3)
        >>> tuple(layer(torch.randn(2, 3, 16, 16)).shape)
        (2, 8, 14, 14)
        >>> type(layer).__name__
        'BayesConv2d'
    """

    cls_to_become = BayesConv2d


class LazyBayesConv3d(_LazyConv, BayesConv3d):
    """A BayesConv3d without ``in_channels``, which its first input tells; an ordinary one then.

    Args:
        arguments: those of BayesConv3d but the first, as in torch.nn.LazyConv3d.

    Shape:
        as in BayesConv3d.

    Raises:
        ValueError: a value that does not fit; at the first call, an input that does not.
        TypeError: a type that does not fit.

    Example:
        >>> layer = LazyBayesConv3d(8, 3)
        >>> tuple(layer(torch.randn(1, 3, 4, 6, 6)).shape)
        (1, 8, 2, 4, 4)
        >>> type(layer).__name__
        'BayesConv3d'
    """

    cls_to_become = BayesConv3d


class LazyBayesConvTranspose2d(_LazyConv, BayesConvTranspose2d):
    """A BayesConvTranspose2d without ``in_channels``, which its first input tells; an ordinary one
    then.

    Args:
        arguments: those of BayesConvTranspose2d but the first, as in torch.nn.LazyConvTranspose2d.

    Shape:
        as in BayesConvTranspose2d.

    Raises:
        ValueError: a value that does not fit; at the first call, an input that does not.
        TypeError: a type that does not fit.

    Example:
        >>> layer = LazyBayesConvTranspose2d(8, 4, stride=2)
        >>> tuple(layer(torch.randn(2, 3, 8, 8)).shape)
        (2, 8, 18, 18)
        >>> type(layer).__name__
        'BayesConvTranspose2d'
    """

    cls_to_become = BayesConvTranspose2d


class LazyBayesLinear(_Lazy, BayesLinear):
    """A BayesLinear without ``in_features``, which its first input tells; an ordinary one then.

    Args:
        arguments: those of BayesLinear but the first, as in torch.nn.LazyLinear.

    Shape:
        as in BayesLinear.

    Raises:
        ValueError: a value that does not fit; at the first call, an input that does not.
        TypeError: a type that does not fit.

    Example:
        >>> layer = LazyBayesLinear(8)
        >>> tuple(layer(torch.randn(2, 5)).shape)
        (2, 8)
        >>> type(layer).__name__
        'BayesLinear'
    """

    cls_to_become = BayesLinear
    inferred = "in_features"

    def _infer(self, input: Tensor) -> tuple[int, tuple[int, ...], int]:
        features = input.shape[-1] if input.ndim else 0
        return features, (self.out_features, features), self.out_features
