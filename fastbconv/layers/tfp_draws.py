"""Several weight draws in one call of the TFP face: what ``fastbconv.weight_samples`` asks for.

The operators take all draws at once. Distributions and tensor functions of the user's own give one
draw at a time, and so do divergences that read the sample: there the call runs once for each group
of rows, and the divergences are averaged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastbconv import _arguments
from fastbconv._quick import Prepared, quick_map
from fastbconv.activations import Resolved
from fastbconv.contexts import LayerContext, Sampled

from .tfp_losses import LossBook
from .tfp_sampling import PARTS, Call, Part, Sampler

Result = tuple[Tensor, "Tensor | None", dict[Part, Any]]


class DrawLoop(LossBook, Sampler):
    """Runs a call with as many draws as the layer's context asks for."""

    _fb_context: LayerContext | None
    _prepared: Prepared | None = None
    rank: int

    @property
    def _has_draws(self) -> bool:
        """Whether a context asks for a number of draws."""
        return self._fb_context is not None and self._fb_context.num_samples is not None

    def _run(self, x: Tensor, call: Call, sampled: Sampled | None) -> Result:
        raise NotImplementedError

    def _run_draws(self, x: Tensor, call: Call, sampled: Sampled | None) -> Result:
        """Output, KL and its priors, as ``_run`` gives them for one draw."""
        context = self._fb_context
        if context is None or not self._has_draws:
            return self._run(x, call, sampled)
        if not self._draws_at_once(call, context.wants_kl):
            return self._run_by_draw(x, call, context)
        call.num_samples, call.share_input = context.num_samples, context.share_input
        return self._run(x, call, sampled)

    def _geometry(self) -> tuple[Any, ...] | None:
        raise NotImplementedError

    def _quick_map(
        self,
        x: Tensor,
        weights: tuple[Tensor | None, ...],
        activation: Resolved,
        priors: tuple[Any, Any] | None,
        call: Call,
    ) -> Any:
        """The output of the short way, with the KL where priors are given; None: the long way."""
        plain = call.estimator == "reparameterization" and not self._has_draws
        if not plain or call.seed is None or self.rank > 2:
            return None
        return quick_map(self, x, weights, activation, priors, self._geometry(), call.seed)

    def _draws_at_once(self, call: Call, wants_kl: bool) -> bool:
        """Whether the operators draw every part, and know every divergence that is wanted."""
        for part in PARTS:
            if getattr(self, f"{part}_posterior_fn") is None:
                continue
            if not self._is_built_in(part, call.mean):
                return False
            functions = (getattr(self, f"{part}_{kind}_fn") for kind in ("prior", "divergence"))
            if wants_kl and None not in functions and self._closed_prior(part) is None:
                return False
        return True

    def _run_by_draw(self, x: Tensor, call: Call, context: LayerContext) -> Result:
        """One pass for each group of rows; the KL that is returned is complete."""
        n = context.num_samples
        if not context.share_input:
            _arguments.rows(x, n)
        groups = [x] * n if context.share_input else x.chunk(n) if len(x) else [x] * n
        calls, outputs, totals = [], [], []
        for sample, rows in enumerate(groups):
            seed = call.seed
            if seed is not None and sample:
                seed = torch.stack([seed[0], seed[1] + sample])
            calls.append(replace(call, seed=seed, tensors={}))
            output, total, priors = self._run(rows, calls[-1], None)
            outputs.append(output)
            if total is not None:
                self._last = calls[-1]  # whose sample the divergences read
                totals.append(self._with_other_divergences(total, priors))
        call.seed, call.tensors = calls[0].seed, calls[0].tensors
        total = torch.stack(totals).mean() if totals else None
        return torch.cat(outputs), total, dict.fromkeys(PARTS, True)
