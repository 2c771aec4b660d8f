"""The Bayesian linear layer with the arguments of torch.nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastbconv import _arguments, functional
from fastbconv._quick import quick_call
from fastbconv.estimators import Estimator
from fastbconv.functional import ActivationLike
from fastbconv.functional.linear import as_filter
from fastbconv.kl import PriorLike

from ._base import BayesLayer, EvalMode


class BayesLinear(BayesLayer, nn.Linear):
    r"""Linear map whose weights are drawn from a mean-field normal posterior at each call.

    .. code-block:: text

        w      = weight + (floor + softplus(weight_rho)) * eps       one draw, shared by the batch
        output = activation(input w^T + bias)

    See ``BayesConv2d``, also for the KL; the source is the same (arXiv:1505.05424).

    Args:
        in_features: size of the last dimension of the input.
        out_features: that of the output.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters: float32 or float64; bfloat16 and float16 for inference.
        activation: name, function or module, fused where the kernels have it.
        prior: as in BayesConv2d; tensors broadcast to (out_features, in_features).
        bayesian_bias: also draw the bias; its prior is ``prior``.
        estimator: 'reparameterization', 'flipout' or 'local', as in BayesConv2d; 'local' is exact
            for a linear map.
        eval_mode: 'sample' or 'mean'.

    Shape:
        input (..., in_features), output (..., out_features).

    Attributes:
        weight: (out_features, in_features) posterior mean.
        weight_rho: its untransformed scale.
        bias: (out_features,) or None.
        bias_rho: untransformed scale of the bias, or None.

    Raises:
        ValueError: a value that does not fit.
        TypeError: a type that does not fit.

    Example:
        >>> layer = BayesLinear(20, 10)
        >>> tuple(layer(torch.randn(4, 20)).shape)
        (4, 10)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        prior: PriorLike = (0.0, 1.0),
        bayesian_bias: bool = False,
        estimator: Estimator = "reparameterization",
        eval_mode: EvalMode = "sample",
    ) -> None:
        least = 0 if isinstance(self, LazyModuleMixin) else 1  # 0: not known yet
        in_features = _arguments.integer("in_features", in_features, least)
        out_features = _arguments.integer("out_features", out_features, 1)
        if dtype is not None and dtype not in _arguments.FLOATING:
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        super().__init__(in_features, out_features, bias, device, dtype)
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
        """Draws the weights and multiplies; arguments as in BayesConv2d.

        Returns:
            (..., out_features); the first dimension is num_samples times as long with
            ``share_input``.
        """
        if num_samples == 1 and generator is None and not share_input:
            output = quick_call(self, input, seed, None)
            if output is not None:
                return output
        return self._call(functional.bayes_linear, input, seed, generator, num_samples, share_input)

    def _convolution_of(self, input: Tensor, draws: int) -> tuple[Any, ...]:
        """For ``fastbconv.explain``: the arguments of the convolution behind a call."""
        weight = self.weight.to("meta") if input.is_meta else self.weight
        _arguments.linear_tensors(input, weight, None, None, None)
        if input.ndim > 1:
            _arguments.rows(input, draws)
        image = input.reshape(-1, self.in_features, 1, 1)
        return image, as_filter(weight), 1, 0, 1, 1, self.estimator

    def extra_repr(self) -> str:
        """The arguments that are not at their default."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return text + f", bias={self.bias is not None}" + self._extra_options()
