"""Convolutions composed of the sampling operators and the library's convolution: any number of
spatial axes, every estimator, any device.

This is the definition of Flipout and of local reparameterisation that the kernels are compared
with, and what serves where there is no kernel: three-dimensional and transposed convolutions, CUDA,
no native library. Autograd sees every step: drawn weights and signed inputs are saved for backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import activations, estimators, kl, noise, reference
from ._library import (
    convolve,
    convolve_transposed,
    in_memory_format,
    outside_autocast,
    suggested_memory_format,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def bind(own: ModuleType) -> Callable[..., Outputs]:
    """The composition with the sampling functions of ``own``: ``ops`` or ``reference``.

    The result has the arguments of the operator bconv2d_affine, for any rank, and estimator 0 too.
    ``output_padding`` makes the convolution a transposed one, with one padding for each axis.
    It returns output, KL, pre-activation, and the deviation of local's pre-activation.
    """

    def call(*tensors: Tensor | None, **options: Any) -> Outputs:
        return _Call(own, tensors, options).run()

    return call


class _Call:
    """One convolution. Fields are the operator's arguments."""

    def __init__(
        self, own: ModuleType, tensors: Sequence[Tensor | None], options: dict[str, Any]
    ) -> None:
        self.input, loc, self.rho, self.bias, self.bias_rho, self.seed, *priors = tensors
        # A weight without noise may come in the compute dtype, which the sampler does not take.
        self.loc = loc.to(torch.promote_types(loc.dtype, torch.float32))
        self.own, self.options = own, options
        prior = options["prior"]
        self.weight_prior, self.bias_prior = priors[:2], priors[2:]
        self.weight_numbers, self.bias_numbers = prior[:2], prior[2:]
        self.estimator = options["estimator"]
        self.num_samples = options["num_samples"]

    def run(self) -> Outputs:
        with outside_autocast(self.input) as cast:
            return self._run(cast)

    def _run(self, cast: torch.dtype) -> Outputs:
        o = self.options
        wide = torch.float64 if cast == torch.float64 else torch.float32
        # PyTorch's 16-bit convolutions of a CPU are wrong for some shapes.
        self.arithmetic = wide if self.input.device.type == "cpu" else cast
        x = self.input.to(cast)
        weights, kl_weight = self._weights(cast)
        biases, kl_bias = self._biases()
        x = x.to(self.arithmetic)
        mean, deviation = self._moments(x, weights)
        parts = zip(*(self._split(value) for value in (x, mean, deviation)), strict=True)
        outputs = []
        for s, part in enumerate(parts):
            z = self._pre_activation(*part, weights, s)
            if biases is not None:
                z = z + biases[s].reshape(-1, *[1] * (z.ndim - 2))
            outputs.append(z)
        z = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        layout = suggested_memory_format(self.input)
        output = activations.apply(o["activation"], z, o["activation_param"])
        output = in_memory_format(output.to(cast), layout)
        saved = x.new_empty((0,))
        if o["save_pre_activation"]:
            saved = in_memory_format(z.to(cast), layout)
        if deviation is None:
            deviation = x.new_empty((0,))
        else:
            deviation = in_memory_format(deviation, layout)
        total = kl_weight + kl_bias if o["weight_kl"] or o["bias_kl"] else self.loc.new_empty((0,))
        return output, total, saved, deviation

    def _split(self, x: Tensor | None) -> Sequence[Tensor | None]:
        """The rows of each draw."""
        if x is None:
            return [None] * self.num_samples
        if self.options["share_input"] or self.num_samples == 1 or not x.shape[0]:
            return [x] * self.num_samples
        return x.split(x.shape[0] // self.num_samples)

    # --- draws ------------------------------------------------------------------------------------

    def _sample(self, loc: Tensor, rho: Tensor | None, part: str, **changes: Any) -> Any:
        """(draws, KL) of one posterior: num_samples draws, in the dtype asked for."""
        o, bias = self.options, part == "bias"
        arguments = {
            "prior": self.bias_numbers if bias else self.weight_numbers,
            "with_kl": False,
            "scale_floor": o["scale_floor"],
            "stream": noise.STREAMS[part],
            "num_samples": self.num_samples,
            "offset_add": o["offset_add"],
            "element_offset": o["element_offset"][int(bias)],
            "dtype": None,
            **changes,
        }
        priors = self.bias_prior if bias else self.weight_prior
        if not arguments["with_kl"]:
            priors = (None, None)
        return self.own.sample_posterior(loc, rho, self.seed, *priors, **arguments)

    def _weights(self, cast: torch.dtype) -> tuple[Any, Tensor]:
        """What the estimator multiplies the input with, and the KL of the weight."""
        with_kl = self.options["weight_kl"] and self.rho is not None
        # The sampler rounds where the products are narrow too.
        wide = cast in (self.loc.dtype, torch.float64)
        narrow = None if wide or self.arithmetic != cast else cast
        if self.estimator == 0:
            drawn, total = self._sample(self.loc, self.rho, "weight", with_kl=with_kl, dtype=narrow)
            return self._rounded(drawn, cast), total if with_kl else self.loc.new_zeros(())
        total = self.loc.new_zeros(())
        if with_kl:
            numbers, floor = self.weight_numbers, self.options["scale_floor"]
            total = self.own.kl_normal(
                self.loc, self.rho, *self.weight_prior, prior=numbers, scale_floor=floor
            )
        loc = self._rounded(self.loc, cast)
        if self.estimator == estimators.LOCAL:
            return (loc, kl.posterior_scale(self.rho, self.options["scale_floor"])), total
        delta, _ = self._sample(torch.zeros_like(self.loc), self.rho, "weight", dtype=narrow)
        return (loc, self._rounded(delta, cast)), total

    def _rounded(self, weight: Tensor, cast: torch.dtype) -> Tensor:
        """A weight in the compute dtype; its gradient is as wide as the products are."""
        if cast in (weight.dtype, torch.float64):
            return weight
        if self.arithmetic == cast:  # loc: what is drawn is narrow already
            return weight.to(cast)
        return weight + (weight.detach().to(cast).to(weight.dtype) - weight.detach())

    def _biases(self) -> tuple[Tensor | None, Tensor]:
        none = self.loc.new_zeros(())
        if self.bias is None:
            return None, none
        with_kl = self.options["bias_kl"] and self.bias_rho is not None
        drawn, total = self._sample(self.bias, self.bias_rho, "bias", with_kl=with_kl)
        return drawn, total if with_kl else none

    # --- products ---------------------------------------------------------------------------------

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        o = self.options
        geometry = (o["dilation"], o["groups"])
        if "output_padding" in o:
            paddings = (o["padding"], o["output_padding"])
            return convolve_transposed(x, weight, o["stride"], *paddings, *geometry)
        return convolve(x, weight, None, o["stride"], o["padding"], *geometry)

    def _moments(self, x: Tensor, weights: Any) -> tuple[Tensor | None, Tensor | None]:
        """What no draw changes: Flipout's product with loc; mean and deviation of local's z."""
        if self.estimator == 0:
            return None, None
        mean = self._apply(x, weights[0].to(x.dtype))
        if self.estimator == estimators.FLIPOUT:
            return mean, None
        # The variance is summed in the parameters' dtype whatever that of the input.
        scale, wide = weights[1], self.loc.dtype
        variance = self._apply(x.to(wide).square(), scale.square())
        return mean.to(wide), estimators.guarded_sqrt(variance)

    def _pre_activation(
        self, x: Tensor, mean: Tensor | None, deviation: Tensor | None, weights: Any, s: int
    ) -> Tensor:
        """z of the rows of one draw, without bias, in the parameters' dtype."""
        if self.estimator == 0:
            return self._apply(x, weights[s].to(x.dtype)).to(self.loc.dtype)
        sample = self.options["offset_add"] + s
        if self.estimator == estimators.LOCAL:
            return mean + deviation * self._eps(mean, sample)
        signs = (
            self._signs(x, channels, name, sample)
            for name, channels in (("sign_input", x.shape[1]), ("sign_output", mean.shape[1]))
        )
        delta = weights[1][s].to(x.dtype)
        z = mean + estimators.perturbation(self._apply, x, delta, *signs)
        return z.to(self.loc.dtype)

    def _noise(self) -> ModuleType:
        """Where signs and noise come from: inside a transform of torch.func from plain PyTorch."""
        return reference if torch._C._are_functorch_transforms_active() else self.own

    def _signs(self, x: Tensor, channels: int, stream: str, sample: int) -> Tensor:
        """(N, channels, 1, ...): constant over space."""
        drawn = self._noise().random_signs(
            self.seed,
            x.shape[0] * channels,
            stream=noise.STREAMS[stream],
            sample=sample,
            element_offset=self.options["row_offset"] * channels,
        )
        return drawn.to(x.dtype).reshape(x.shape[0], channels, *[1] * (x.ndim - 2))

    def _eps(self, z: Tensor, sample: int) -> Tensor:
        """Noise of the entries of z (N, K, P, Q), numbered in the order N, P, Q, K."""
        rows, filters, *extent = z.shape
        drawn = self._noise().standard_normal(
            self.seed,
            z.numel(),
            stream=noise.STREAMS["local"],
            sample=sample,
            element_offset=self.options["row_offset"] * math.prod(z.shape[1:]),
        )
        return drawn.to(z.dtype).reshape(rows, *extent, filters).movedim(-1, 1)
