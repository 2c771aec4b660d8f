"""``losses`` of the TFP face: divergences, activity loss and variable regularisers, made on access.

A divergence that reads the sample gets the one of the last call: made again from the 16 bytes of
that call's seed, or, where the user's own functions drew it, the very tensor. Nothing here is
copied with a layer or written with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbconv import functional, kl

from . import tfp_arguments as arguments
from . import tfp_distributions as distributions
from .tfp_distributions import MeanFieldNormalFn
from .tfp_sampling import PARTS, Call, Part
from .tfp_variables import to_operator


class LossBook(nn.Module):
    """The losses of one layer."""

    _last: Call | None = None

    def _remember(self, call: Call, inputs: Any, output: Tensor) -> None:
        if self.activity_regularizer is not None:
            rows = output.shape[0]
            activity = self.activity_regularizer(output)
            activity = arguments.penalty("activity_regularizer", activity)
            call.activity = activity / rows if rows else torch.zeros_like(activity)
        if torch.compiler.is_compiling():
            self._last = call
        elif any(map(_is_wrapped, (call.seed, output))):
            # Inside a torch.func transform: its tensors must not outlive it.
            self._last = Call(mean=call.mean, estimator=call.estimator)
        else:
            call.inputs = weakref.ref(inputs)
            self._last = call

    def _forget_last_call(self) -> None:
        """Back to the state before the first call: ``losses`` is empty but for regularisers."""
        self._last = None

    # --- divergences ------------------------------------------------------------------------------

    def _closed_prior(self, part: Part) -> tuple[Any, Any] | None:
        """(loc, scale) of a normal prior under the default divergence, as the operators take it."""
        function = getattr(self, f"{part}_prior_fn")
        if function is None or not self._has_default_divergence(part):
            return None
        if function is distributions.default_multivariate_normal_fn:
            return 0.0, 1.0
        parameters = self._normal_prior(part, function)
        if parameters is None:
            return None
        loc = getattr(self, f"{part}_posterior_loc")
        return tuple(_prior_tensor(value, loc) for value in parameters)

    def _normal_prior(self, part: Part, function: Any) -> tuple[Tensor, Tensor] | None:
        if type(function) is not MeanFieldNormalFn:
            return distributions.normal_parameters(self._distribution(f"{part}_prior"))
        loc = getattr(self, f"{part}_prior_loc")
        if function.is_singular:
            return None
        rho = getattr(self, f"{part}_prior_untransformed_scale")
        return loc, distributions.scale_of(rho)

    def _has_default_divergence(self, part: Part) -> bool:
        return (
            type(getattr(self, f"{part}_posterior_fn")) is MeanFieldNormalFn
            and getattr(self, f"{part}_divergence_fn") is distributions.kl_divergence
        )

    def _is_ordinary(self, name: str) -> bool:
        """Whether a parameter of the layer has no divergence: that of a part that is a point mass
        without a prior, or of the activation."""
        for part in PARTS:
            if name.startswith(f"{part}_posterior"):
                function = getattr(self, f"{part}_posterior_fn")
                is_point = type(function) is MeanFieldNormalFn and function.is_singular
                return is_point and getattr(self, f"{part}_prior_fn") is None
        return name.startswith("activation.")

    def _divergence(self, part: Part) -> Any:
        """The divergence of one part as its function gives it; None where there is none."""
        function = getattr(self, f"{part}_divergence_fn")
        if None in (
            function,
            getattr(self, f"{part}_prior_fn"),
            getattr(self, f"{part}_posterior_fn"),
        ):
            return None
        closed = self._closed_prior(part)
        if closed is not None:
            return self._closed_divergence(part, closed)
        posterior = self._distribution(f"{part}_posterior")
        prior = self._distribution(f"{part}_prior")
        if prior is None:
            return None
        value = arguments.call_function(
            f"{part}_divergence_fn", function, posterior, prior, self._sample_of_last_call(part)
        )
        if value is None:
            raise ValueError(f"{part}_divergence_fn: expected a tensor or a number, got None")
        return value

    def _closed_divergence(self, part: Part, prior: tuple[Any, Any]) -> Tensor:
        loc = to_operator(getattr(self, f"{part}_posterior_loc"))
        if getattr(self, f"{part}_posterior_fn").is_singular:
            out = torch.promote_types(loc.dtype, torch.float32)
            prior = tuple(v.double() if isinstance(v, Tensor) else v for v in prior)
            return -kl.NormalPrior(*prior).log_prob(loc.double()).sum().to(out)
        rho = to_operator(getattr(self, f"{part}_posterior_untransformed_scale"))
        return functional.kl_normal(loc, rho, prior, scale_floor=torch.finfo(loc.dtype).eps)

    def _with_other_divergences(self, total: Tensor, closed: Mapping[str, Any]) -> Tensor:
        """The KL of the fused pass plus the divergences that it does not contain."""
        for part in PARTS:
            if closed.get(part) is None:
                value = self._divergence(part)
                total = total if value is None else total + _scalar(value, total)
        return total

    # --- what users read --------------------------------------------------------------------------

    def kl_loss(self) -> Tensor:
        """The sum of the divergences of kernel and bias in nats, from the variables; 0-dim.

        Raises:
            ValueError: the layer is not built.
        """
        if not self.built:
            raise ValueError(
                f"kl_loss: expected a built layer, got {self.name!r} before its first call; call "
                "layer.build(input_shape) or fastbconv.build(model, input_shape) first"
            )
        dtype = torch.promote_types(self._dtype, torch.float32)
        return self._with_other_divergences(torch.zeros((), dtype=dtype, device=self._device), {})

    @property
    def losses(self) -> list[Any]:
        """Empty before the first call; then kernel divergence, bias divergence, activity loss and
        variable regularisers (the last ones from build on).

        Divergences are computed from the variables at each access and are divided by nothing:
        divide their sum by the number of training examples. The activity loss is that of the last
        call, divided by its batch size.
        """
        divergences = []
        if self._last is not None:
            divergences = [self._divergence(part) for part in PARTS]
        return [value for value in divergences if value is not None] + self.regularization_losses

    @property
    def regularization_losses(self) -> list[Tensor]:
        """The losses that are no divergence: activity loss, then variable regularisers."""
        activity = self._last.activity if self._last is not None else None
        return ([] if activity is None else [activity]) + self._variable_losses()

    def _variable_losses(self) -> list[Tensor]:
        return self._regularization_losses() if self.built else []

    def get_losses_for(self, inputs: Any) -> list[Any]:
        """The losses that depend on ``inputs``: for None divergences and variable regularisers, for
        the input of the last call its activity loss."""
        if inputs is None:
            divergences = [self._divergence(part) for part in PARTS] if self._last else []
            return [value for value in divergences if value is not None] + self._variable_losses()
        last = self._last
        if last is None or last.activity is None or last.inputs is None:
            return []
        candidates = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        known = last.inputs()
        return [last.activity] if any(value is known for value in candidates) else []


def _scalar(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)):
        return like.new_full((), value)  # nothing is copied from the host
    value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else like.dtype)
    return value.sum().to(like)


def _prior_tensor(value: Tensor, loc: Tensor) -> Tensor:
    """A prior's parameter, given for (*window, C, K), so that it broadcasts to (K, C, *window)."""
    if value.dim() and value.dim() < loc.dim():
        value = value.reshape((1,) * (loc.dim() - value.dim()) + tuple(value.shape))
    return to_operator(value).to(loc)


def _is_wrapped(value: Tensor | None) -> bool:
    return value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value)
