"""Flipout and local reparameterisation on the TFP face: layers that form no kernel sample.

With the built-in posterior and tensor function the operators do the whole work, as for the other
layers. Otherwise the kernel's tensor function receives a normal distribution made from the kernel's
posterior, ``kernel_posterior_affine``, and what it returns takes part in the pre-activation:

.. code-block:: text

    flipout    receives N(0, scale^2), returns delta      z = conv(x, loc) + t * conv(x * r, delta)
    local      receives N(conv(x, loc), conv(x^2, scale^2)), returns z

A context that asks for one draw of the weights (``fixed_sample``) gets it: the call is then that of
the Reparameterization layer with the same variables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from fastbconv import _arguments, activations, functional
from fastbconv._library import outside_autocast
from fastbconv.contexts import Entry, Sampled

from . import tfp_arguments as arguments
from ._base import _rank_seed
from .tfp_base import VariationalLayer
from .tfp_distributions import kind_of, normal_parameters
from .tfp_sampling import Call, Part
from .tfp_variables import to_operator


class AffineEstimator(VariationalLayer):
    """What Flipout and local reparameterisation share; comes before the kind of layer."""

    # --- what an estimator says -------------------------------------------------------------------

    def _affine_distribution(self, loc: Tensor, scale: Tensor, x: Tensor) -> Distribution:
        """What the kernel's tensor function receives; ``x`` in the layer's layout."""
        raise NotImplementedError

    def _give_affine_noise(self, distribution: Any, seed: Tensor) -> None:
        """Lets that distribution draw from a seed: the noise of the fused path."""
        raise NotImplementedError

    def _pre_activation(self, x: Tensor, loc: Tensor, drawn: Tensor, seed: Tensor) -> Tensor:
        """z without bias, from what the tensor function returned; in the layer's layout."""
        raise NotImplementedError

    def _affine_of(self, last: Call) -> Distribution:
        """What the tensor function received in the last call."""
        raise NotImplementedError

    # --- the forward pass -------------------------------------------------------------------------

    def _run(
        self, x: Tensor, call: Call, sampled: Sampled | None
    ) -> tuple[Tensor, Tensor | None, dict[Part, Any]]:
        one_kernel = call.mean or call.estimator != self._estimator
        fused = self._is_built_in("kernel") and not self.kernel_posterior_fn.is_singular
        if fused or one_kernel:
            return super()._run(x, call, sampled)
        return self._run_by_functions(x, call)

    def _run_by_functions(
        self, x: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, dict[Part, Any]]:
        """The pass by the user's functions; the whole KL is left to the divergence functions."""
        if call.seed is None:
            call.seed = self._fresh_seed(x.device)
        with outside_autocast(x) as dtype:
            x = x.to(torch.promote_types(self._dtype, torch.float32))
            loc, scale = self._kernel_normal()
            drawn = self._draw_affine(self._affine_distribution(loc, scale, x), call)
            z = self._pre_activation(x, loc, drawn.to(x.dtype), call.seed)
            z = z + self._drawn_bias(call, x.device)
        resolved = activations.resolve(self._activation_spec, face="keras")
        output = activations.apply(resolved.id, z, resolved.param).to(dtype)
        if resolved.fn is not None:
            output = arguments.activated(resolved.fn, output)
        wants_kl = self._fb_context is not None and self._fb_context.wants_kl
        return output, z.new_zeros(()) if wants_kl else None, {}

    def _kernel_normal(self) -> tuple[Tensor, Tensor]:
        """(loc, scale) of the kernel's posterior in the operators' layout, in the dtype of the
        pass: float32 or float64, as the layer has it."""
        posterior = self.kernel_posterior
        parameters = normal_parameters(posterior)
        if parameters is None:
            raise TypeError(
                "kernel_posterior_fn: expected a function that returns Normal or "
                f"Independent(Normal), since layer {self.name!r} uses the estimator "
                f"{self._estimator!r}, got {kind_of(posterior)}; the Reparameterization layers "
                "take any posterior"
            )
        # Nothing is broadcast: a shape that fits by chance would tie or add weights.
        shape, got = self._shape_of("kernel", self._channels), tuple(parameters[0].shape)
        if got != shape:
            raise ValueError(
                f"kernel_posterior_fn: expected a distribution of shape {shape}, got "
                f"{kind_of(posterior)} of shape {got}; make it from the shape that the function "
                "receives"
            )
        wide = torch.promote_types(self._dtype, torch.float32)
        loc, scale = (
            _arguments.wide_parameter(to_operator(value)).to(wide) for value in parameters
        )
        return loc, scale

    def _draw_affine(self, distribution: Distribution, call: Call) -> Tensor:
        """What the tensor function returns; held where it is the user's own."""
        self._give_affine_noise(distribution, call.seed)
        shape = (*distribution.batch_shape, *distribution.event_shape)
        drawn = self._call_tensor_fn("kernel", distribution, shape, call)
        if not self._has_built_in_tensor_fn("kernel"):
            call.tensors["affine"] = drawn
        return drawn

    def _drawn_bias(self, call: Call, device: torch.device) -> Tensor | float:
        """The bias, so that it broadcasts to an output in the layer's layout."""
        loc, rho = self._draw_posteriors(call, device, ("bias",)).get("bias", (None, None))
        if loc is None:
            return 0.0
        if rho is not None:
            floor = torch.finfo(loc.dtype).eps
            loc = functional.sample_posterior(
                loc, rho, seed=call.seed, stream="bias", scale_floor=floor
            )[0]
        return loc if self._channel_axis == -1 else loc.reshape(-1, *[1] * self.rank)

    def _plain(self, image: Tensor, weight: Tensor) -> Tensor:
        """The affine map with a given weight, without bias, in the operators' layout."""
        return self._affine_map(image, weight, None)

    # --- groups, the last call --------------------------------------------------------------------

    def _group_entries(self, with_kl: bool) -> list[Entry] | None:
        """None: a group draws weights, and this layer forms none."""
        del with_kl
        return None

    def _sample_of_last_call(self, part: Part) -> Tensor | None:
        if part == "kernel" and (self._last is None or self._last.estimator == self._estimator):
            return None
        return super()._sample_of_last_call(part)

    @property
    def kernel_posterior_affine(self) -> Any:
        """The distribution that the kernel's tensor function received in the last call, made from
        the present variables; None where that call used one draw of the weights (``fixed_sample``).

        Raises:
            AttributeError: the layer has not been called, or what is needed of that call is gone.
        """
        last = self._last_call("kernel_posterior_affine")
        return self._affine_of(last) if last.estimator == self._estimator else None

    @property
    def kernel_posterior_affine_tensor(self) -> Tensor | None:
        """What the kernel's tensor function returned in the last call.

        Made again from the call's seed and the present variables; the very tensor of the call where
        a function of the user's own returned it. None as for ``kernel_posterior_affine``.

        Raises:
            AttributeError: as there.
        """
        last = self._last_call("kernel_posterior_affine_tensor")
        if last.estimator != self._estimator:
            return None
        if "affine" in last.tensors:
            return last.tensors["affine"]
        distribution = self._affine_of(last)
        if last.mean:
            return distribution.mean
        seed = _rank_seed(None, self._device) if last.seed is None else last.seed.to(self._device)
        return self._draw_affine(distribution, Call(seed=seed))
