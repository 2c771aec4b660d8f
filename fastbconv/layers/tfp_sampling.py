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

from . import tfp_arguments as arguments
from . import tfp_distributions as distributions
from ._base import _rank_seed
from .tfp_distributions import MeanFieldNormalFn
from .tfp_variables import from_operator, to_operator

Part = Literal["kernel", "bias"]
Posterior = tuple[Tensor, Tensor | None]
PARTS: Final[tuple[Part, ...]] = ("kernel", "bias")
STREAMS: Final[dict[Part, str]] = {"kernel": "weight", "bias": "bias"}


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
        if type(getattr(self, f"{part}_posterior_fn")) is not MeanFieldNormalFn:
            return False
        tensor_fn = getattr(self, f"{part}_posterior_tensor_fn")
        return mean or tensor_fn in (distributions.posterior_sample, distributions.posterior_mean)

    def _is_noisy(self, mean: bool) -> bool:
        """Whether a call needs a seed; without need the generator is left alone."""
        if mean:
            return False
        for part in PARTS:
            function = getattr(self, f"{part}_posterior_fn")
            if function is None:
                continue
            fixed = self._is_built_in(part) and (
                function.is_singular
                or getattr(self, f"{part}_posterior_tensor_fn") is distributions.posterior_mean
            )
            if not fixed:
                return True
        return False

    def _built_in_posterior(self, part: Part, mean: bool) -> Posterior:
        """(loc, rho) of a built-in posterior; rho None where its mean is used."""
        function = getattr(self, f"{part}_posterior_fn")
        tensor_fn = getattr(self, f"{part}_posterior_tensor_fn")
        loc = getattr(self, f"{part}_posterior_loc")
        if mean or function.is_singular or tensor_fn is distributions.posterior_mean:
            return loc, None
        return loc, getattr(self, f"{part}_posterior_untransformed_scale")

    def _posterior_in_call(
        self, part: Part, draw: Tensor | None, given: bool, mean: bool, held: dict[str, Tensor]
    ) -> Posterior:
        """What the operators use: (loc, rho), or (a sample by the user's functions, None)."""
        if self._is_built_in(part, mean):
            return self._built_in_posterior(part, mean)
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
        return held[part].to(self._dtype), None

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
            return self._posterior_in_call(part, None, False, mean, {})[0]
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
        """The kernel of the last call, (*window, C, filters), made again from its seed."""
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
    devices = [] if seed.device.type == "cpu" else [seed.device]
    with torch.random.fork_rng(devices, device_type=seed.device.type if devices else "cuda"):
        # The CPU generator reads 32 bits of its seed: mix the 128 of ours into those.
        mixed = (key * 0x9E3779B97F4A7C15 ^ offset * 0xC2B2AE3D27D4EB4F) % 2**64
        torch.manual_seed((mixed >> 32) ^ (mixed & 0xFFFFFFFF))
        yield
