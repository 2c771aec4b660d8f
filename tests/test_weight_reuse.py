"""What one pass leaves for another changes no bit.

Noise is shared inside a backward call, weights are kept, rows of contiguous parameters are read and
written whole.
"""

from __future__ import annotations

from typing import Any

import op_samples as samples
import pytest
import torch
from op_samples import ALGORITHMS, options, tensors
from torch import Tensor

from fastbconv import ops

NATIVE = samples.native()  # registers the operators

SIZES: dict[str, dict[str, Any]] = {
    "odd": {"N": 3, "C": 19, "H": 9, "W": 7, "K": 37},
    "channels_last": {"N": 2, "C": 32, "H": 8, "W": 8, "K": 64, "channels_last": True},
    "float64": {"N": 2, "C": 6, "H": 7, "W": 5, "K": 9, "dtype": torch.float64},
    "bfloat16": {"N": 4, "C": 16, "H": 9, "W": 9, "K": 17, "dtype": torch.bfloat16},
    # More elements than noise is kept for.
    "large": {"N": 1, "C": 344, "H": 5, "W": 4, "K": 344},
}
CHOICES = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def _gradients(arguments: list[Tensor | None], **changes: Any) -> dict[str, Tensor]:
    output, kl, *_ = ops.bconv2d(*arguments, **options(**changes))
    (output.float().square().sum() + 0.5 * kl.float()).backward()
    names = ("input", "loc", "rho", "bias_loc", "bias_rho")
    return {
        name: t.grad
        for name, t in zip(names, arguments, strict=False)
        if t is not None and t.grad is not None
    }


@CHOICES
@pytest.mark.parametrize("name", SIZES)
def test_noise_drawn_for_the_input_gradient_serves_the_scales(name: str, algorithm: int) -> None:
    """Without an input gradient the noise is drawn for the scales alone."""
    shared = _gradients(tensors(**SIZES[name]), algorithm=algorithm)
    alone = tensors(**SIZES[name])
    assert alone[0] is not None
    alone[0].requires_grad_(False)
    expected = _gradients(alone, algorithm=algorithm)
    assert shared.keys() == {"input", *expected}
    for key, value in expected.items():
        assert torch.equal(shared[key], value), key


DRAWS: dict[str, dict[str, Any]] = {
    "one": {},
    "draws": {"num_samples": 3},
    "shared input": {"num_samples": 8, "share_input": True},
    "groups": {"groups": 2},
}


@pytest.mark.parametrize(
    ("changes", "algorithm"),
    [
        pytest.param(changes, algorithm, id=f"{name}-{choice}")
        for name, changes in DRAWS.items()
        for choice, algorithm in (samples.ANY_SHAPE if name == "groups" else ALGORITHMS).items()
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_kept_weight_gives_the_same_gradients(
    dtype: torch.dtype, changes: dict[str, Any], algorithm: int
) -> None:
    groups = changes.get("groups", 1)
    sizes = {"N": 6, "C": 12, "H": 6, "W": 7, "K": 20, "groups": groups, "dtype": dtype}
    drawn = _gradients(tensors(**sizes), algorithm=algorithm, **changes)
    kept = _gradients(tensors(**sizes), algorithm=algorithm, keep_weight=True, **changes)
    for key, value in drawn.items():
        assert torch.equal(kept[key], value), key


# Channels and taps: fewer than a vector, whole vectors, tails; rows longer than are read whole.
PLANAR = [(1, 3), (2, 3), (15, 3), (16, 3), (17, 3), (33, 5), (48, 1), (64, 7), (330, 5), (960, 3)]


@pytest.mark.parametrize(
    ("channels", "side", "algorithm"),
    [
        pytest.param(*shape, algorithm, id=f"{shape[0]}-{shape[1]}-{choice}")
        for shape in PLANAR
        for choice, algorithm in (ALGORITHMS if shape[1] == 3 else samples.ANY_SHAPE).items()
    ],
)
def test_parameters_in_any_memory_give_the_same_bits(
    channels: int, side: int, algorithm: int
) -> None:
    sizes = {"N": 2, "C": channels, "H": 6, "W": 5, "K": 18, "R": side, "S": side}
    padding = [side // 2] * 4
    results = []
    for place in (
        lambda t: t.contiguous(),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        arguments = tensors(**sizes, prior="tensor")
        arguments[1:3] = [
            place(t.detach()).requires_grad_() for t in arguments[1:3] if t is not None
        ]
        keywords = options(algorithm=algorithm, padding=padding)
        output, kl, *_ = ops.bconv2d(*arguments, **keywords)
        grads = _gradients(arguments, algorithm=algorithm, padding=padding)
        assert grads["loc"].stride() == arguments[1].stride()
        results.append({"output": output.detach(), "kl": kl.detach(), **grads})
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize(("channels", "side"), PLANAR)
def test_a_sample_in_any_memory_has_the_same_bits(channels: int, side: int) -> None:
    loc, rho = (samples.randn(5, channels, side, side, seed=i) for i in range(2))
    seed, rest = samples.noise_seed(), samples.draw_options(num_samples=2)
    expected, kl = ops.sample_posterior(loc, rho, seed, None, None, **rest)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (loc, rho)]
    got, again = ops.sample_posterior(*last, seed, None, None, **rest)
    assert torch.equal(got, expected)
    assert torch.equal(again, kl)
