"""What every variational layer of the TFP face shares, whatever its rank and estimator.

A layer has two parts, kernel and bias. Each part has a posterior, a tensor function, a prior and a
divergence, given as functions. A part whose posterior and tensor function are built-in goes to the
operators as (loc, rho): no distribution is built, the noise comes from a seed and can be made
again. Any other part is sampled through its distribution and goes to the operators as a given
tensor. Divergences are computed when they are read.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastbconv import activations, noise, regularizers
from fastbconv.contexts import LayerContext, Sampled
from fastbconv.estimators import Estimator

from . import tfp_arguments as arguments
from .tfp_config import Configurable, NamedActivation
from .tfp_distribution_classes import reparameterized
from .tfp_distributions import MeanFieldNormalFn, VariableFn
from .tfp_draws import DrawLoop
from .tfp_keras import KerasSurface, layer_name
from .tfp_losses import LossBook
from .tfp_sampling import PARTS, Call, Part, Sampler
from .tfp_variables import VariableStore, to_operator

DEFAULT_POSTERIOR: Final = MeanFieldNormalFn()
DEFAULT_POINT_MASS: Final = MeanFieldNormalFn(is_singular=True)
_LINEAR: Final = activations.resolve(None)
_MISSING: Final = object()


class VariationalLayer(DrawLoop, LossBook, Sampler, Configurable, VariableStore, KerasSurface):
    """Base of the TFP face. Subclasses say what the kernel's shape is and how it is applied."""

    is_bayesian = True
    rank: int  # number of spatial axes
    _channel_axis: int
    activation: Any
    activity_regularizer: Callable[[Tensor], Tensor] | None
    _fb_context: LayerContext | None
    _short_name = ""
    _estimator: Estimator = "reparameterization"
    _options: tuple[str, ...] = arguments.LAYER_OPTIONS
    # Used by the other estimators, whose layers form no kernel sample.
    kernel_posterior_affine = None
    kernel_posterior_affine_tensor = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives a class the documented signature; one with its own ``__init__`` has that one's."""
        super().__init_subclass__(**options)
        cls.__signature__ = None if "__init__" in vars(cls) else cls._documented_signature()

    @classmethod
    def _documented_signature(cls) -> inspect.Signature:
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        takes_seed = "seed" in cls._options
        return inspect.Signature([p for p in parameters if takes_seed or p.name != "seed"])

    def __init__(
        self, activation: Any, activity_regularizer: Any, functions: dict[str, Any], options: Any
    ) -> None:
        arguments.reject_unknown(options, self._options)
        trainable = bool(options.get("trainable", True))
        dtype = arguments.dtype(options.get("dtype"))
        kind = type(self).__dict__.get("_short_name") or type(self).__name__
        name = layer_name(options.get("name"), kind)
        regularizer = regularizers.get(activity_regularizer, "activity_regularizer")
        activations.resolve(activation, face="keras")  # an unknown name fails here
        functions = self._checked_functions(functions)
        super().__init__(trainable, dtype, options.get("device"))
        self._name = name
        self._read_options(options)
        self._fb_context = self._last = None
        self._user_variables: list[str] = []
        self.activation = (
            NamedActivation(activation or "linear")
            if activation is None or isinstance(activation, str)
            else activation
        )
        self.activity_regularizer = regularizer
        for key, function in functions.items():
            setattr(self, key, function)
        self.input_spec = self._input_spec(None)
        self._reserve_variables()

    def _read_options(self, options: dict[str, Any]) -> None:
        self._dynamic = bool(options.get("dynamic", False))
        self._autocast = bool(options.get("autocast", True))
        self._batch_input_shape = arguments.batch_input_shape(options)
        self._initial_weights = options.get("weights")

    @staticmethod
    def _checked_functions(functions: dict[str, Any]) -> dict[str, Any]:
        without_bias = functions["bias_posterior_fn"] is None
        required = {"kernel_posterior_fn", "kernel_posterior_tensor_fn"}
        required |= set() if without_bias else {"bias_posterior_tensor_fn"}
        return {
            key: arguments.function(key, value, optional=key not in required)
            for key, value in functions.items()
        }

    # --- what a subclass says ---------------------------------------------------------------------

    def _input_spec(self, channels: int | None) -> arguments.InputSpec:
        raise NotImplementedError

    def _shape_of(self, part: Part, channels: int) -> tuple[int, ...]:
        raise NotImplementedError

    def _to_operators(self, inputs: Tensor) -> Tensor:
        """The view of an input, or of an output, that the operators take: channels before space."""
        raise NotImplementedError

    def _from_operators(self, output: Tensor) -> Tensor:
        """The inverse view."""
        raise NotImplementedError

    def _affine_map(
        self, inputs: Tensor, weight: Tensor, rho: Tensor | None, *bias: Any, **options: Any
    ) -> Any:
        """The affine map in the operators' layout: an output, or the pair (output, kl)."""
        raise NotImplementedError

    # --- build ------------------------------------------------------------------------------------

    def _roles(self) -> Iterator[tuple[str, Part, Any]]:
        """Name, part and function of the four distributions, in order of creation."""
        for part in PARTS:
            for kind in ("posterior", "prior"):
                function = getattr(self, f"{part}_{kind}_fn")
                if function is not None:
                    yield f"{part}_{kind}", part, function

    def _reserve_variables(self) -> None:
        for role, _, function in self._roles():
            if type(function) is MeanFieldNormalFn:
                for suffix in function.suffixes:
                    self._reserve(f"{role}_{suffix}")

    def build(self, input_shape: Any) -> None:
        """Creates the variables for inputs of this shape; only the channel entry matters.

        A second call with the same number of channels does nothing.

        Args:
            input_shape: tuple with None for unknown sizes.

        Raises:
            ValueError: wrong rank, unknown number of channels, or another one than before.
        """
        shape = arguments.shape_tuple("input_shape", input_shape)
        arguments.check_rank(self.name, shape, self._input_spec(None))
        channels = shape[self._channel_axis]
        if not channels:
            raise ValueError(
                f"input_shape: expected a known, positive number of channels, got {channels} in "
                f"{shape}"
            )
        if self.built:
            arguments.check_channels(self.name, channels, self._channels)
            return
        self._build_for_channels(channels)

    def _build_for_channels(self, channels: int) -> None:
        former = dict(self._parameters)
        self._channels, self._kernel_shape = channels, self._shape_of("kernel", channels)
        try:
            for role, part, function in self._roles():
                self._create(role, part, function, self.add_variable, torch.no_grad())
        except BaseException:
            self._records.clear()
            self._parameters.clear()
            self._parameters.update(former)
            raise
        self._user_variables = [name for name in self._records if name not in former]
        ordered = {name: self._parameters.pop(name) for name in self._records}
        ordered.update(self._parameters)
        self._parameters.clear()
        self._parameters.update(ordered)
        self.built = True
        self.input_spec = self._input_spec(channels)
        if self._initial_weights is not None:
            self.set_weights(self._initial_weights)
            self._initial_weights = None

    def _build_in_call(self, shape: torch.Size) -> None:
        self.build(tuple(shape))
        if self._user_variables and self.training and torch.is_grad_enabled():
            warnings.warn(
                f"layer {self.name!r}: its variables {self._user_variables} were made by functions "
                "of your own in its first call; an optimiser made before that does not hold them. "
                "Call layer.build(input_shape) or fastbconv.build(model, input_shape) first",
                stacklevel=6,
            )

    def _create(
        self, role: str, part: Part, function: Any, add: VariableFn, mode: Any = None
    ) -> Any:
        """Calls a posterior or prior function on the layer's device."""
        device = contextlib.nullcontext() if self._device.type == "cpu" else self._device
        shape = self._shape_of(part, self._channels)
        with device, mode or contextlib.nullcontext():
            if mode is not None and type(function) is MeanFieldNormalFn:
                return function.add_variables(self._dtype, shape, role, self._trainable, add)
            made = function(self._dtype, shape, role, self._trainable, add)
        return arguments.distribution(f"{role}_fn", made, optional=role.endswith("prior"))

    # --- distributions ----------------------------------------------------------------------------

    def _distribution(self, role: str) -> Any:
        part: Part = "kernel" if role.startswith("kernel") else "bias"
        if not self.built:
            raise AttributeError(
                f"{role}: expected a built layer, got {self.name!r} before its first call; call "
                "layer.build(input_shape) first"
            )
        function = getattr(self, f"{role}_fn")
        if function is None:
            return None
        made = self._create(role, part, function, self._existing_variable)
        return reparameterized(made, role) if role.endswith("posterior") else made

    @property
    def kernel_posterior(self) -> Any:
        """The kernel's posterior, built from the variables at each access."""
        return self._distribution("kernel_posterior")

    @property
    def kernel_prior(self) -> Any:
        """The kernel's prior or None, built at each access."""
        return self._distribution("kernel_prior")

    @property
    def bias_posterior(self) -> Any:
        """The bias's posterior or None, built from the variables at each access."""
        return self._distribution("bias_posterior")

    @property
    def bias_prior(self) -> Any:
        """The bias's prior or None, built at each access."""
        return self._distribution("bias_prior")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the variables; follows ``.to()``."""
        return self._dtype

    # --- the forward pass -------------------------------------------------------------------------

    def forward(
        self,
        inputs: Any = _MISSING,
        *,
        seed: int | Tensor | None = None,
        training: bool | None = None,
        **unknown: Any,
    ) -> Tensor:
        """One stochastic pass; every call draws anew, in training and inference alike.

        Args:
            inputs: floating-point tensor or NumPy array; cast to the layer's dtype.
            seed: of the noise, an int or an int64 tensor (2,); None draws one from PyTorch's
                generator, or from that of a Flipout layer with a seed of its own.
            training: accepted and ignored, as in TFP.

        Returns:
            The output, in the layout of the input.

        Raises:
            ValueError: no input, integers, or a shape that does not fit.
            TypeError: neither a tensor nor an array, or an unknown keyword.
        """
        del training
        if unknown:
            arguments.reject_unknown(unknown, ("seed", "training"))
        x = self._checked_input(inputs)
        context = self._fb_context if seed is None else None
        mode = None if context is None else context.mode
        found: Sampled | Tensor | int | None = context.seed if mode == "seed" else seed
        grouped = context is not None and context.group is not None and mode != "mean"
        if grouped and not torch.compiler.is_compiling():
            found = context.group.take(self, x, found, not self._has_draws)
        sampled = found if type(found) is Sampled else None
        found = found if sampled is None else sampled.seed
        one_kernel = mode == "seed" or self._has_draws
        call = Call(
            seed=None if found is None else noise.seed_tensor(found, x.device),
            given=found is not None,
            mean=mode == "mean",
            estimator="reparameterization" if one_kernel else self._estimator,
        )
        output, total, priors = self._run_draws(x, call, sampled)
        self._remember(call, inputs, output)
        if total is not None:
            if sampled is not None and sampled.kl is not None:
                total, priors = sampled.kl, dict.fromkeys(sampled.kl_parts, True)
            self._fb_context.record(self._with_other_divergences(total, priors))
        bound = self._fb_context if self._has_draws else context
        return output if bound is None else bound.bind(output)

    def _run(
        self, x: Tensor, call: Call, sampled: Sampled | None
    ) -> tuple[Tensor, Tensor | None, dict[Part, Any]]:
        """Output, and the KL that the pass sums where a collector waits for it, with its priors."""
        if sampled is None:
            posteriors = self._draw_posteriors(call, x.device)
        else:
            posteriors = self._posteriors_of(sampled)
        wants_kl = self._fb_context is not None and self._fb_context.wants_kl
        priors = {
            part: self._closed_prior(part)
            for part, (_, rho) in posteriors.items()
            if wants_kl and rho is not None
        }
        resolved = activations.resolve(self._activation_spec, face="keras")
        fused = resolved if resolved.fn is None else _LINEAR
        loc, rho = posteriors["kernel"]
        rho = None if rho is None else to_operator(rho)
        weights = (to_operator(loc), rho, *posteriors.get("bias", (None, None)))
        both = (priors.get("kernel"), priors.get("bias"))
        x = self._to_operators(x)
        result = self._quick_map(x, weights, fused, both if wants_kl else None, call)
        if result is None:
            result = self._affine_map(
                x,
                *weights,
                activation=fused,
                prior=both[0],
                bias_prior=both[1],
                seed=call.seed,
                num_samples=call.num_samples,
                share_input=call.share_input,
                scale_floor=torch.finfo(self._dtype).eps,
                return_kl=wants_kl,
                estimator=call.estimator,
            )
        output, total = result if wants_kl else (result, None)
        output = self._from_operators(output)
        if resolved.fn is not None:
            output = arguments.activated(resolved.fn, output)
        return output, total, priors

    @property
    def _activation_spec(self) -> Any:
        activation = self.activation
        return activation.name if isinstance(activation, NamedActivation) else activation

    def _checked_input(self, inputs: Any) -> Tensor:
        if inputs is _MISSING:
            raise ValueError("inputs: expected a tensor as the first argument, got none")
        if isinstance(inputs, np.ndarray):
            inputs = torch.tensor(inputs, device=self._device)
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"inputs: expected a tensor or a NumPy array, got {type(inputs).__name__}"
            )
        if not inputs.is_floating_point():
            raise arguments.InputDtypeError(
                f"inputs: expected a floating-point dtype, got {inputs.dtype}"
            )
        if not self.built:
            self._build_in_call(inputs.shape)
        arguments.check_rank(self.name, inputs.shape, self.input_spec)
        if inputs.dtype == self._dtype or not self._autocast:
            return inputs
        device = inputs.device.type
        narrow = inputs.dtype in (torch.float16, torch.bfloat16)
        if narrow and device != "meta" and torch.is_autocast_enabled(device):
            return inputs  # the operator casts under autocast; a detour through float32 is waste
        return inputs.to(self._dtype)

    def _repr_options(self) -> list[str]:
        options = []
        if self.activation != NamedActivation("linear"):
            options.append(f"activation={self.activation!r}")
        if self.bias_posterior_fn is None:
            options.append("bias_posterior_fn=None")
        return options

    # --- module plumbing --------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state without what belongs to this process: contexts and the last call."""
        state = super().__getstate__()
        state["_fb_context"] = state["_last"] = None
        return state
