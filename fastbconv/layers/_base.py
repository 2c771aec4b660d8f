"""What every layer of the torch face shares: posterior, prior, KL, whole-model contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch.nn.parameter import UninitializedParameter

from fastbconv import _arguments, _call, activations, estimators, functional, noise
from fastbconv import kl as _kl
from fastbconv._quick import Prepared
from fastbconv.contexts import Entry, LayerContext, Sampled
from fastbconv.estimators import Estimator

EvalMode = Literal["sample", "mean"]
INITIAL_SCALE = 0.1  # times 1 / sqrt(fan_in)


def rho_from_scale(scale: float, scale_floor: float) -> float:
    """The rho with floor + softplus(rho) = scale."""
    return math.log(math.expm1(max(scale - scale_floor, _kl.LEAST_SOFTPLUS)))


class BayesLayer(nn.Module):
    """Mixin of the torch face's layers. A subclass has ``weight`` and ``bias``, and calls
    ``_init_posterior`` once they exist.

    Attributes:
        weight_rho: untransformed scale of the weight: scale = floor + softplus(rho).
        bias_rho: untransformed scale of the bias; None: the bias is a point mass.
        estimator: how noise enters, a name of ``fastbconv.estimators``.
        eval_mode: "sample", or "mean": no noise while ``training`` is False.
    """

    is_bayesian = True
    weight: nn.Parameter
    weight_rho: nn.Parameter
    bias: nn.Parameter | None
    bias_rho: nn.Parameter | None
    _fb_context: LayerContext | None
    _last_draw: tuple[Tensor, int] | None
    _prepared: Prepared | None

    def _init_options(
        self,
        activation: functional.ActivationLike,
        estimator: str,
        eval_mode: str,
    ) -> None:
        """Checks the keyword-only options; called after nn.Module is set up."""
        estimators.check(estimator)
        if eval_mode not in ("sample", "mean"):
            raise ValueError(f"eval_mode: expected 'sample' or 'mean', got {eval_mode!r}")
        activations.resolve(activation)  # an unknown name fails here, not at the first call
        self.activation = activation
        self.estimator: Estimator = estimator
        self.eval_mode = eval_mode
        self._fb_context = None
        self._last_draw = None
        self._prepared = None

    def _init_posterior(self, prior: _kl.PriorLike, bayesian_bias: bool) -> None:
        """Adds the scales and the prior, and gives them their first values."""
        self.weight_rho = _parameter_like(self.weight)
        if bayesian_bias and self.bias is None:
            raise ValueError("bayesian_bias: expected False with bias=False, got True")
        if bayesian_bias:
            self.bias_rho = _parameter_like(self.bias)
        else:
            self.register_parameter("bias_rho", None)
        self._init_prior(prior, bayesian_bias)
        if not _arguments.is_lazy(self.weight):
            self._reset_rho()

    def _init_prior(self, prior: _kl.PriorLike, bayesian_bias: bool) -> None:
        """Floats stay attributes, tensors become buffers (saved), Parameters are trained."""
        resolved = _kl.resolve_prior(prior)
        self._prior = resolved
        if isinstance(resolved, _kl.DistributionPrior) and isinstance(resolved.factory, nn.Module):
            self.prior_module = resolved.factory  # its parameters are trained with the layer's
        if not isinstance(resolved, _kl.NormalPrior):
            return
        for part, value in (("loc", resolved.loc), ("scale", resolved.scale)):
            if not isinstance(value, Tensor):
                continue
            self._check_prior_tensor(part, value, bayesian_bias)
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"prior_{part}", value)
            else:
                like = {"device": self.weight.device, "dtype": self.weight.dtype}
                self.register_buffer(f"prior_{part}", value.detach().clone().to(**like))
        # The tensors live in the module only, so that .to() and load_state_dict() reach the prior.
        self._prior = _kl.NormalPrior(
            *(None if isinstance(v, Tensor) else v for v in (resolved.loc, resolved.scale))
        )

    def _check_prior_tensor(self, part: str, value: Tensor, bayesian_bias: bool) -> None:
        if not _arguments.is_lazy(self.weight):
            _arguments.prior_shape(f"prior {part}", value, self.weight)
        if bayesian_bias and value.numel() != 1:
            raise ValueError(
                f"prior {part}: expected a number or one element with bayesian_bias=True, since it "
                f"serves weight and bias, got shape {tuple(value.shape)}"
            )
        if part == "scale" and value.device.type != "meta" and not bool((value > 0).all()):
            raise ValueError(f"prior scale: expected positive values, got {value.min().item()}")

    def _center_prior(self) -> None:
        """Puts the prior, which has to be normal, around the present means: saved as buffers."""
        self._prior = _kl.NormalPrior(None, self._prior.scale)
        self.register_buffer("prior_loc", self.weight.detach().clone())
        if self.bias_rho is not None:
            self.register_buffer("bias_prior_loc", self.bias.detach().clone())

    @property
    def prior(self) -> _kl.Prior | None:
        """The prior of the weight, and of the bias where that is Bayesian; None: no KL."""
        if not isinstance(self._prior, _kl.NormalPrior):
            return self._prior
        loc, scale = self._prior.loc, self._prior.scale
        return _kl.NormalPrior(
            self.prior_loc if loc is None else loc, self.prior_scale if scale is None else scale
        )

    def _bias_prior(self) -> _kl.Prior | None:
        """The prior as the bias takes it: one-element tensors without the weight's dimensions."""
        prior = self.prior
        if self.bias_rho is None or not isinstance(prior, _kl.NormalPrior):
            return None if self.bias_rho is None else prior
        centre = getattr(self, "bias_prior_loc", None)
        return _kl.NormalPrior(
            _without_dimensions(prior.loc) if centre is None else centre,
            _without_dimensions(prior.scale),
        )

    def reset_parameters(self) -> None:
        """loc as in torch.nn, scale 0.1 / sqrt(fan_in)."""
        super().reset_parameters()
        if getattr(self, "weight_rho", None) is not None:
            self._reset_rho()

    def _reset_rho(self) -> None:
        fan_in = math.prod(self.weight.shape[1:])
        floor = _kl.default_scale_floor(self.weight.dtype)
        rho = rho_from_scale(INITIAL_SCALE / math.sqrt(max(fan_in, 1)), floor)
        with torch.no_grad():
            self.weight_rho.fill_(rho)
            if self.bias_rho is not None:
                self.bias_rho.fill_(rho)

    @property
    def weight_scale(self) -> Tensor:
        """Posterior standard deviation of the weight: floor + softplus(weight_rho)."""
        floor = _kl.default_scale_floor(self.weight_rho.dtype)
        return _kl.posterior_scale(self.weight_rho, floor)

    @property
    def bias_scale(self) -> Tensor | None:
        """Posterior standard deviation of the bias, or None for a point mass."""
        if self.bias_rho is None:
            return None
        return _kl.posterior_scale(self.bias_rho, _kl.default_scale_floor(self.bias_rho.dtype))

    def kl_loss(self) -> Tensor:
        """KL(posterior || prior) of weight and bias: a sum in nats, divided by nothing; 0-dim.

        Computed from the parameters at each call. A prior without a closed form gives the
        Monte-Carlo KL of the weights of the last forward pass, made again from its seed.

        Raises:
            ValueError: a lazy layer before its first call.
        """
        if _arguments.is_lazy(self.weight):
            raise ValueError(
                f"kl_loss: expected initialised parameters, got {type(self).__name__} before its "
                "first call; call fastbconv.build(model, input_shape) first"
            )
        prior = self.prior
        if prior is None:
            return self.weight.new_zeros((), dtype=_kl.kl_dtype(self.weight.dtype))
        if not isinstance(prior, _kl.NormalPrior):
            return self._sampled_kl(prior)
        total = functional.kl_normal(self.weight, self.weight_rho, prior)
        if self.bias_rho is not None:
            total = total + functional.kl_normal(self.bias, self.bias_rho, self._bias_prior())
        return total

    def _sampled_kl(self, prior: _kl.Prior) -> Tensor:
        device = self.weight.device
        seed, num_samples = self._last_draw or (_rank_seed(None, device), 1)
        seed, floor = seed.to(device), _kl.default_scale_floor(self.weight.dtype)
        weight, rho = map(_arguments.wide_parameter, (self.weight, self.weight_rho))
        draw = (seed, 0, 0, "weight", num_samples)
        total = _call.monte_carlo_kl(prior, weight, rho, floor, draw)
        if self.bias_rho is not None:
            bias, rho = map(_arguments.wide_parameter, (self.bias, self.bias_rho))
            draw = (seed, 0, 0, "bias", num_samples)
            total = total + _call.monte_carlo_kl(prior, bias, rho, floor, draw)
        return total

    def _is_ordinary(self, name: str) -> bool:
        """Whether a parameter of the layer has no term in the KL: that of a bias that is a point
        mass, or an activation's."""
        return name.startswith("activation.") or (name == "bias" and self.bias_rho is None)

    @property
    def losses(self) -> list[Tensor]:
        """The KL as a list of one scalar; empty without a prior."""
        return [] if self.prior is None else [self.kl_loss()]

    def _call(
        self,
        function: Any,
        input: Tensor,
        seed: int | Tensor | None,
        generator: torch.Generator | None,
        num_samples: int,
        share_input: bool,
        **arguments: Any,
    ) -> Tensor:
        """One forward pass through ``function``, under the layer's context."""
        named = seed is not None or generator is not None  # then the call draws, and from that
        context = None if named else self._fb_context
        mean = self._means_by_itself and not named
        estimator = self.estimator
        bound, own = context, self._fb_context
        if own is not None:
            own.note_call()
        if own is not None and own.num_samples is not None and num_samples == 1:
            bound, num_samples, share_input = own, own.num_samples, own.share_input
            estimator = "reparameterization"  # a group of rows is one function
        if context is not None:
            mean = mean or context.mode == "mean"
            if context.mode == "seed":
                seed, mean = context.seed, False
                estimator = "reparameterization"  # one draw of the weights, whatever the estimator
            grouped = context.group is not None and not mean
            if grouped and not torch.compiler.is_compiling():
                found = context.group.take(self, input, seed, num_samples == 1)
                if type(found) is Sampled:
                    return self._call_sampled(function, input, found, context, arguments)
                seed = found
        wants_kl = self._fb_context is not None and self._fb_context.wants_kl
        returns_kl = wants_kl and not mean
        if self._samples_prior and not mean:
            # The KL of the weights in use needs the seed of this pass afterwards.
            if seed is None:
                seed, generator = _rank_seed(generator, input.device), None
            seed = noise.seed_tensor(seed, input.device)
            if torch.compiler.is_compiling() or not is_wrapped(seed):  # which must not outlive it
                self._last_draw = (seed.detach(), num_samples)
        output = function(
            input,
            self.weight,
            None if mean else self.weight_rho,
            self.bias,
            None if mean else self.bias_rho,
            activation=self.activation,
            prior=self.prior if returns_kl else None,
            bias_prior=self._bias_prior() if returns_kl else None,
            num_samples=num_samples,
            share_input=share_input,
            seed=seed,
            generator=generator,
            return_kl=returns_kl,
            estimator=estimator,
            **arguments,
        )
        if wants_kl:
            output, kl = (output, self.kl_loss()) if mean else output
            self._fb_context.record(kl)
        return output if bound is None else bound.bind(output)

    def _call_sampled(
        self,
        function: Any,
        input: Tensor,
        sampled: Sampled,
        context: LayerContext,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The forward pass with weights that a group has drawn."""
        output = function(
            input,
            sampled.weight,
            None,
            self.bias if sampled.bias is None else sampled.bias,
            None,
            activation=self.activation,
            prior=None,
            seed=sampled.seed,  # not read: without one a tensor of zeros would be made
            **arguments,
        )
        if context.wants_kl:
            context.record(self.kl_loss() if sampled.kl is None else sampled.kl)
        return output

    def _group_entries(self, with_kl: bool) -> list[Entry] | None:
        """What a group draws for this layer; None where the layer has to draw by itself."""
        if self._means_by_itself or self._samples_prior or self.estimator != "reparameterization":
            return None
        floor = _kl.default_scale_floor(self.weight.dtype)
        priors = (self.prior, self._bias_prior()) if with_kl else (None, None)
        entries = [Entry(self.weight, self.weight_rho, "weight", priors[0], floor)]
        if self.bias_rho is not None:
            entries.append(Entry(self.bias, self.bias_rho, "bias", priors[1], floor))
        return entries

    @property
    def _means_by_itself(self) -> bool:
        return self.eval_mode == "mean" and not self.training

    @property
    def _samples_prior(self) -> bool:
        return self._prior is not None and not isinstance(self._prior, _kl.NormalPrior)

    def __getstate__(self) -> dict[str, Any]:
        """The module without what belongs to the process: contexts and the last seed."""
        state = super().__getstate__()
        state["_fb_context"] = None
        state["_last_draw"] = None
        state["_prepared"] = None
        return state

    def _extra_options(self) -> str:
        text = ""
        if self.bias_rho is not None:
            text += ", bayesian_bias=True"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self._prior != _kl.NormalPrior(0.0, 1.0):
            text += f", prior={_prior_text(self._prior)}"
        if self.estimator != "reparameterization":
            text += f", estimator={self.estimator!r}"
        if self.eval_mode != "sample":
            text += f", eval_mode={self.eval_mode!r}"
        return text


def _parameter_like(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter of that shape, dtype and device; of no shape yet where that has none."""
    if _arguments.is_lazy(parameter):
        return UninitializedParameter(device=parameter.device, dtype=parameter.dtype)
    return nn.Parameter(torch.empty_like(parameter))


def _rank_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A drawn seed with the offset of this rank in it."""
    seed, offset = noise.draw_seed(generator, device), noise.rank_offset()
    if offset:
        seed[1:].add_(offset)  # a number, not a tensor: nothing is copied from the host
    return seed


def _without_dimensions(value: float | Tensor) -> float | Tensor:
    return value.reshape(()) if isinstance(value, Tensor) else value


def _prior_text(prior: _kl.Prior | None) -> str:
    if not isinstance(prior, _kl.NormalPrior):
        return repr(prior)
    parts: Sequence[str] = [
        "tensor" if value is None else str(value) for value in (prior.loc, prior.scale)
    ]
    return f"({', '.join(parts)})"
