"""The samples of a call: from (loc, rho) and a seed where they can be made again, else held.

A part (kernel, bias) with a built-in posterior and tensor function goes to the operators as
(loc, rho): no distribution is built. Any other part is sampled through its distribution, under the
layer's seed where one is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fastbconv import functional, noise
from fastbconv.contexts import Entry, Sampled
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
class LastCall:
    """What is known of the last call.

    Attributes:
        seed: int64 (2,) of the noise; None: no noise was drawn.
        mean: the posterior means were used.
        tensors: samples that cannot be made again, by part.
        activity: the activity loss.
        inputs: weak reference to the input.
    """

    seed: Tensor | None
    mean: bool
    tensors: dict[str, Tensor]
    activity: Tensor | None
    inputs: Callable[[], Any] | None


class Sampler(nn.Module):
    """Draws the kernel and the bias of a call, and draws them again."""

    _last: LastCall | None = None

    def _is_built_in(self, part: Part, mean: bool = False) -> bool:
        """Whether the operators can draw this part themselves."""
        if type(getattr(self, _POSTERIOR_FN[part])) is not MeanFieldNormalFn:
            return False
        return mean or getattr(self, _TENSOR_FN[part]) in _BUILT_IN_TENSOR_FNS

    def _draw_posteriors(
        self, seed: int | Tensor | None, mean: bool, device: torch.device, held: dict[str, Tensor]
    ) -> tuple[dict[Part, Posterior], Tensor | None]:
        """What the operators use of each part, and the seed of its noise.

        A part is (loc, rho), or (a sample by the user's functions, None), which goes to ``held``
        too. Without need of noise no seed is drawn: PyTorch's generator is left alone.
        """
        found: dict[Part, Posterior | None] = {
            part: self._built_in_posterior(part, mean) if self._is_built_in(part, mean) else None
            for part in PARTS
            if getattr(self, _POSTERIOR_FN[part]) is not None
        }
        given = seed is not None
        draw = noise.seed_tensor(seed, device) if given else None
        if not (given or mean) and any(p is None or p[1] is not None for p in found.values()):
            draw = _rank_seed(None, device)
        posteriors = {
            part: (self._sample_by_functions(part, draw, given, mean, held), None)
            if posterior is None
            else posterior
            for part, posterior in found.items()
        }
        return posteriors, draw

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

    def _sample_by_functions(
        self, part: Part, draw: Tensor | None, given: bool, mean: bool, held: dict[str, Tensor]
    ) -> Tensor:
        """The sample of a part through its distribution and tensor function."""
        distribution = self._distribution(f"{part}_posterior")
        if mean:
            value = distribution.mean
            value = value() if callable(value) and not isinstance(value, Tensor) else value
        else:
            if draw is not None:
                self._give_noise(distribution, part, draw)
            with seeded_generator(draw if given else None):
                value = distributions.call_function(
                    f"{part}_posterior_tensor_fn",
                    getattr(self, f"{part}_posterior_tensor_fn"),
                    distribution,
                )
        shape = self._shape_of(part, self._channels)
        held[part] = arguments.sample_tensor(f"{part}_posterior_tensor_fn", value, shape)
        return held[part].to(self._dtype)

    def _give_noise(self, distribution: Any, part: Part, draw: Tensor) -> None:
        """Lets a built-in posterior draw from the layer's seed: the noise of the fused path."""
        base = getattr(distribution, "base_dist", None)
        if not isinstance(base, distributions.SeededNormal):
            return
        shape = to_operator(base.loc).shape

        def eps(number: int) -> Tensor:
            drawn = noise.weight_eps(draw, shape, number, stream=STREAMS[part])
            return from_operator(drawn)

        base.eps_source = eps

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
            return self._sample_by_functions(part, None, False, mean, {})
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

    def _sample_after_call(self, part: Part) -> Tensor | None:
        if self._last is None:
            raise AttributeError(
                f"{part}_posterior_tensor: expected a layer that has been called, got "
                f"{self.name!r} before its first call"
            )
        return self._sample_of_last_call(part)

    @property
    def kernel_posterior_tensor(self) -> Tensor | None:
        """The kernel of the last call, (*window, C, filters).

        Made again from the call's seed and the present variables; the very tensor of the call where
        the user's own functions drew it.
        """
        return self._sample_after_call("kernel")

    @property
    def bias_posterior_tensor(self) -> Tensor | None:
        """The bias of the last call, or None without a bias."""
        return self._sample_after_call("bias")


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
