"""The samples of a call: from (loc, rho) and a seed where they can be made again, else held.

A part (kernel, bias) with a built-in posterior and tensor function goes to the operators as
(loc, rho): no distribution is built. Any other part is sampled through its distribution, under the
layer's seed where one is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fastbconv import functional, noise
from fastbconv.contexts import Entry, Sampled
from fastbconv.estimators import Estimator
from fastbconv.kl import NormalPrior

from . import tfp_arguments as arguments
from . import tfp_distributions as distributions
from ._base import _rank_seed
from .tfp_distributions import MeanFieldNormalFn
from .tfp_variables import from_operator, to_operator

Part = Literal["kernel", "bias"]
Posterior = tuple[Tensor, Tensor | None]
PARTS: Final[tuple[Part, ...]] = ("kernel", "bias")
STREAMS: Final[dict[Part, str]] = {"kernel": "weight", "bias": "bias"}
# Names spelled once: the forward pass of a small layer is short.
_POSTERIOR_FN: Final[dict[Part, str]] = {part: f"{part}_posterior_fn" for part in PARTS}
_TENSOR_FN: Final[dict[Part, str]] = {part: f"{part}_posterior_tensor_fn" for part in PARTS}
_VARIABLES: Final[dict[Part, tuple[str, str]]] = {
    part: (f"{part}_posterior_loc", f"{part}_posterior_untransformed_scale") for part in PARTS
}
_BUILT_IN_TENSOR_FNS: Final = (distributions.posterior_sample, distributions.posterior_mean)


@dataclass
class Call:
    """What a call draws from; afterwards, what is known of the last call.

    Attributes:
        seed: int64 (2,) of the noise; None: no noise was drawn.
        given: the seed was given, so that distributions which draw by themselves obey it.
        mean: the posterior means are used.
        estimator: how noise enters; "reparameterization" also where a context asks for one draw of
            the weights that all calls share.
        num_samples: draws of the call; ``seed`` is that of the first, and the sample of the last
            call is the first one.
        share_input: every draw reads all rows.
        tensors: what cannot be made again, the results of the user's own functions: "kernel" and
            "bias" samples, or "affine", what another estimator's tensor function returned.
        activity: the activity loss.
        inputs: weak reference to the input.
        version: the input's count of changes in place, where it has one and a layer needs it.
    """

    seed: Tensor | None = None
    given: bool = False
    mean: bool = False
    estimator: Estimator = "reparameterization"
    num_samples: int = 1
    share_input: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    activity: Tensor | None = None
    inputs: Callable[[], Any] | None = None
    version: int | None = None


class Sampler(nn.Module):
    """Draws the kernel and the bias of a call, and draws them again."""

    _last: Call | None = None

    def _is_built_in(self, part: Part, mean: bool = False) -> bool:
        """Whether the operators can draw this part themselves."""
        if type(getattr(self, _POSTERIOR_FN[part])) is not MeanFieldNormalFn:
            return False
        return mean or self._has_built_in_tensor_fn(part)

    def _has_built_in_tensor_fn(self, part: Part) -> bool:
        return getattr(self, _TENSOR_FN[part]) in _BUILT_IN_TENSOR_FNS

    def _fresh_seed(self, device: torch.device) -> Tensor:
        """The seed of a call to which none is given."""
        return _rank_seed(None, device)

    def _draw_posteriors(
        self, call: Call, device: torch.device, parts: Sequence[Part] = PARTS
    ) -> dict[Part, Posterior]:
        """What the operators use of each part: (loc, rho), or (a sample by the user's functions,
        None).

        Without need of noise no seed is drawn: PyTorch's generator is left alone.
        """
        mean = call.mean
        found: dict[Part, Posterior | None] = {
            part: self._built_in_posterior(part, mean) if self._is_built_in(part, mean) else None
            for part in parts
            if getattr(self, _POSTERIOR_FN[part]) is not None
        }
        noisy = any(p is None or p[1] is not None for p in found.values())
        if call.seed is None and noisy and not mean:
            call.seed = self._fresh_seed(device)
        return {
            part: (self._sample_by_functions(part, call), None) if posterior is None else posterior
            for part, posterior in found.items()
        }

    def _built_in_posterior(self, part: Part, mean: bool) -> Posterior:
        """(loc, rho) of a built-in posterior; rho None where its mean is used."""
        loc_name, rho_name = _VARIABLES[part]
        loc = getattr(self, loc_name)
        fixed = mean or getattr(self, _TENSOR_FN[part]) is distributions.posterior_mean
        if fixed or getattr(self, _POSTERIOR_FN[part]).is_singular:
            return loc, None
        return loc, getattr(self, rho_name)

    def _group_entries(self, with_kl: bool) -> list[Entry] | None:
        """What a group draws for this layer; None where the layer has to draw by itself."""
        if not self.built:
            return None
        entries = []
        for part in PARTS:
            if getattr(self, _POSTERIOR_FN[part]) is None:
                continue
            if not self._is_built_in(part):
                return None
            loc, rho = self._built_in_posterior(part, False)
            if rho is None and part == "kernel":
                return None
            if rho is not None:
                closed = self._closed_prior(part) if with_kl else None
                prior = None if closed is None else NormalPrior(*closed)
                floor = torch.finfo(loc.dtype).eps
                entries.append(Entry(to_operator(loc), to_operator(rho), part, prior, floor))
        return entries

    def _posteriors_of(self, sampled: Sampled) -> dict[Part, Posterior]:
        """What a group has drawn, in the form of ``_draw_posteriors``."""
        posteriors: dict[Part, Posterior] = {"kernel": (from_operator(sampled.weight), None)}
        if self.bias_posterior_fn is not None:
            bias = sampled.bias
            fixed = self._built_in_posterior("bias", False)
            posteriors["bias"] = fixed if bias is None else (bias, None)
        return posteriors

    def _sample_by_functions(self, part: Part, call: Call) -> Tensor:
        """The sample of a part through its distribution and tensor function."""
        distribution = self._distribution(f"{part}_posterior")
        shape = self._shape_of(part, self._channels)
        if call.mean:
            value = distribution.mean
            value = value() if callable(value) and not isinstance(value, Tensor) else value
            value = arguments.sample_tensor(f"mean of {part}_posterior", value, shape)
        else:
            if call.seed is not None:
                give_noise(distribution, part, call.seed)
            value = self._call_tensor_fn(part, distribution, shape, call)
        call.tensors[part] = value
        return value.to(self._dtype)

    def _call_tensor_fn(
        self, part: Part, distribution: Any, shape: Sequence[int], call: Call
    ) -> Tensor:
        """What the tensor function of a part makes of a distribution."""
        name = _TENSOR_FN[part]
        with seeded_generator(call.seed if call.given else None):
            value = arguments.call_function(name, getattr(self, name), distribution)
        return arguments.sample_tensor(name, value, shape)

    # --- the last call ----------------------------------------------------------------------------

    def _sample_of_last_call(self, part: Part) -> Tensor | None:
        """The sample of the last call in its documented shape; a fresh one before the first."""
        if getattr(self, f"{part}_posterior_fn") is None:
            return None
        last = self._last
        if last is not None and part in last.tensors:
            return last.tensors[part]
        mean = last is not None and last.mean
        if not self._is_built_in(part, mean):
            return self._sample_by_functions(part, Call(mean=mean))
        loc, rho = self._built_in_posterior(part, mean)
        if rho is None:
            return loc
        seed = last.seed if last is not None else None
        draws = functional.sample_posterior(
            to_operator(loc),
            to_operator(rho),
            seed=_rank_seed(None, loc.device) if seed is None else seed.to(loc.device),
            stream=STREAMS[part],
            scale_floor=torch.finfo(loc.dtype).eps,
        )
        return from_operator(draws[0])

    def _last_call(self, what: str) -> Call:
        if self._last is None:
            raise AttributeError(
                f"{what}: expected a layer that has been called, got {self.name!r} before its "
                "first call"
            )
        return self._last

    @property
    def kernel_posterior_tensor(self) -> Tensor | None:
        """The kernel of the last call, (*window, C, filters).

        Made again from the call's seed and the present variables; the very tensor of the call where
        the user's own functions drew it.
        """
        self._last_call("kernel_posterior_tensor")
        return self._sample_of_last_call("kernel")

    @property
    def bias_posterior_tensor(self) -> Tensor | None:
        """The bias of the last call, or None without a bias."""
        self._last_call("bias_posterior_tensor")
        return self._sample_of_last_call("bias")


def give_noise(distribution: Any, part: Part, draw: Tensor) -> None:
    """Lets a built-in posterior draw from the layer's seed: the noise of the fused path."""
    base = getattr(distribution, "base_dist", None)
    if not isinstance(base, distributions.SeededNormal):
        return
    shape = to_operator(base.loc).shape

    def eps(number: int) -> Tensor:
        return from_operator(noise.weight_eps(draw, shape, number, stream=STREAMS[part]))

    base.eps_source = eps


@contextlib.contextmanager
def seeded_generator(seed: Tensor | None) -> Iterator[None]:
    """PyTorch's generators under a given seed, for distributions that draw from them."""
    if seed is None:
        yield
        return
    key, offset = seed.tolist()
    # The CPU generator reads 32 bits of its seed: mix the 128 of ours into those.
    mixed = (key * 0x9E3779B97F4A7C15 ^ offset * 0xC2B2AE3D27D4EB4F) % 2**64
    value = (mixed >> 32) ^ (mixed & 0xFFFFFFFF)
    if seed.device.type == "cpu":
        with torch.random.fork_rng(()):
            torch.default_generator.manual_seed(value)
            yield
        return
    # torch.manual_seed would seed the generators of all devices, and only ours is put back.
    module = torch.get_device_module(seed.device)
    with torch.random.fork_rng([seed.device], device_type=seed.device.type):
        torch.default_generator.manual_seed(value)
        with module.device(seed.device):
            module.manual_seed(value)
        yield
