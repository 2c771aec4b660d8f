"""Our estimators on the noise of one call, by plain PyTorch: what ``--check`` compares with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastbconv import estimators, noise


def replayed(
    drawn: Tensor,
    estimator: str,
    apply: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    loc: Tensor,
    scale: Tensor,
) -> Tensor:
    """The pre-activation without bias of a call that drew a seed, in the dtype of its tensors.

    Args:
        drawn: the seed, as ``noise.draw_seed()`` gave it.
        estimator: "reparameterization", "flipout" or "local".
        apply: ``apply(input, weight)``, the linear map.
        input: (N, C, ...).
        loc: posterior mean of the weight.
        scale: its standard deviation.

    Returns:
        (N, K, ...).
    """
    if estimator == "local":
        mean, deviation = estimators.local_moments(apply, input, loc, scale)
        channels_last = mean.movedim(1, -1)
        eps = noise.standard_normal(drawn, tuple(channels_last.shape), stream="local")
        return mean + deviation * eps.movedim(-1, 1).to(mean.dtype)
    delta = scale * noise.weight_eps(drawn, tuple(loc.shape)).to(scale.dtype)
    if estimator == "reparameterization":
        return apply(input, loc + delta)
    rows, C, *space = input.shape
    sides = (("sign_input", C), ("sign_output", loc.shape[0]))
    signs = (
        noise.random_signs(drawn, (rows, channels), stream=stream)
        .view(rows, channels, *(1 for _ in space))
        .to(input.dtype)
        for stream, channels in sides
    )
    return estimators.flipout(apply, input, loc, delta, *signs)
