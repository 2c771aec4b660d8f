"""A first layer's images want no gradient: its weight gradient masks the incoming one for itself.

Everything must be as where the images do want one, and the gradient is made in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import op_samples as samples
import pytest
import torch
from op_samples import ALGORITHMS, DIRECT, GELU_TANH, RELU, SILU, options, tensors
from torch import Tensor

from fastbconv import ops

NAMES = ("loc", "rho", "bias_loc", "bias_rho")

# Few and many filters, one strip and several, rows longer than a run, gaps in every direction.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one-channel": ({"N": 5, "C": 1, "H": 28, "W": 28, "K": 32}, {}),
    "one-filter": ({"N": 2, "C": 1, "H": 9, "W": 7, "K": 1}, {}),
    "colours": ({"N": 4, "C": 3, "H": 17, "W": 19, "K": 70}, {}),
    "colours-nhwc": ({"N": 9, "C": 3, "H": 16, "W": 16, "K": 64, "channels_last": True}, {}),
    "many-filters": ({"N": 1, "C": 2, "H": 3, "W": 5, "K": 1100}, {}),
    "strided": ({"N": 3, "C": 3, "H": 23, "W": 21, "K": 33}, {"stride": [2, 3]}),
    "dilated": ({"N": 3, "C": 4, "H": 13, "W": 14, "K": 20}, {"dilation": [1, 2]}),
    "draws": ({"N": 6, "C": 3, "H": 9, "W": 8, "K": 24}, {"num_samples": 3}),
    "shared": (
        {"N": 2, "C": 3, "H": 9, "W": 8, "K": 24},
        {"num_samples": 3, "share_input": True},
    ),
    "point": ({"N": 2, "C": 4, "H": 6, "W": 6, "K": 7, "R": 1, "S": 1}, {"padding": [0] * 4}),
    "wide-window": ({"N": 3, "C": 4, "H": 5, "W": 40, "K": 20, "R": 1, "S": 13}, {}),
    "stem": (
        {"N": 2, "C": 3, "H": 20, "W": 22, "K": 24, "R": 7, "S": 7},
        {"stride": [2, 2], "padding": [3, 3, 3, 3]},
    ),
    "filters-in-blocks": ({"N": 2, "C": 3, "H": 9, "W": 9, "K": 200}, {"dilation": [1, 2]}),
    "long-rows": ({"N": 2, "C": 1, "H": 2, "W": 400, "K": 40}, {}),
    "one-strip": ({"N": 1, "C": 1, "H": 1, "W": 1500, "K": 80, "R": 1, "S": 10}, {}),
    "beyond-the-bound": ({"N": 1, "C": 1, "H": 1, "W": 5000, "K": 64, "R": 1, "S": 10}, {}),
    "batch-of-none": ({"N": 0, "C": 3, "H": 6, "W": 6, "K": 7}, {}),
}


def _gradients(
    sizes: dict[str, Any], changes: dict[str, Any], incoming: Tensor | None, wants_input: bool
) -> tuple[dict[str, Tensor], Tensor]:
    arguments = tensors(**sizes)
    arguments[0] = arguments[0].detach().requires_grad_(wants_input)
    output, kl, _, _ = ops.bconv2d(*arguments, **options(**changes))
    if incoming is None:
        incoming = samples.randn(*output.shape, dtype=output.dtype, seed=11)
    # The image's gradient is asked for as well: autograd leaves out what nobody asks for.
    wanted = [*arguments[1:5], *([arguments[0]] if wants_input else [])]
    grads = torch.autograd.grad((output, kl), wanted, (incoming, torch.full_like(kl, 0.5)))
    return dict(zip(NAMES, grads[:4], strict=True)), output.detach()


def _assert_alike(sizes: dict[str, Any], changes: dict[str, Any]) -> None:
    """Weights' gradients are equal; the bias's are sums in another order."""
    got, _ = _gradients(sizes, changes, None, False)
    expected, _ = _gradients(sizes, changes, None, True)
    wide = {"one": {**sizes, "dtype": torch.float64}, "changes": {**changes, "algorithm": DIRECT}}
    exact, _ = _gradients(wide["one"], wide["changes"], None, True)
    for name in NAMES:
        if name.startswith("bias"):
            error = (got[name] - exact[name]).abs().amax()
            allowed = 2 * (expected[name] - exact[name]).abs().amax()
            floor = 4e-7 * exact[name].abs().amax() if got[name].dtype == torch.float32 else 0
            assert error <= max(allowed, floor + 1e-13), name
        else:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("activation", [0, RELU, SILU, GELU_TANH])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_an_inner_layer(shape: str, activation: int) -> None:
    sizes, changes = SHAPES[shape]
    _assert_alike(sizes, {**changes, "activation": activation, "algorithm": DIRECT})


@pytest.mark.parametrize("shape", ["one-channel", "stem", "wide-window", "one-strip"])
def test_on_each_instruction_set(shape: str, isa: str) -> None:
    sizes, changes = SHAPES[shape]
    _assert_alike(sizes, {**changes, "activation": SILU, "algorithm": DIRECT})


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
@pytest.mark.parametrize("shape", ["one-channel", "colours-nhwc"])
def test_every_algorithm(shape: str, algorithm: str) -> None:
    sizes, changes = SHAPES[shape]
    got, _ = _gradients(sizes, {**changes, "algorithm": ALGORITHMS.get(algorithm, 0)}, None, False)
    wide = {**sizes, "dtype": torch.float64}
    exact, _ = _gradients(wide, {**changes, "algorithm": DIRECT}, None, True)
    for name in NAMES:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", ["colours", "draws", "strided"])
def test_float64(shape: str) -> None:
    sizes, changes = SHAPES[shape]
    _assert_alike({**sizes, "dtype": torch.float64}, {**changes, "algorithm": DIRECT})


@pytest.mark.parametrize("shape", ["one-channel", "colours", "colours-nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(shape: str, dtype: torch.dtype) -> None:
    sizes, changes = SHAPES[shape]
    sizes, changes = {**sizes, "dtype": dtype}, {**changes, "algorithm": DIRECT}
    got, _ = _gradients(sizes, changes, None, False)
    expected, _ = _gradients(sizes, changes, None, True)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_integers_are_exact(shape: str) -> None:
    """Point masses of integers: no sum is rounded, so every order gives the same."""
    sizes, changes = SHAPES[shape]
    arguments = tensors(bias="point", **sizes)
    for i in (0, 1, 3):
        arguments[i] = (3 * arguments[i].detach()).round().requires_grad_(i > 0)
    arguments[2] = None
    keywords = options(algorithm=DIRECT, weight_kl=False, bias_kl=False, **changes)
    output = ops.bconv2d(*arguments, **keywords)[0]
    incoming = samples.randn(*output.shape, seed=11).mul(2).round()
    got = torch.autograd.grad(output, (arguments[1], arguments[3]), incoming)
    draws = changes.get("num_samples", 1)
    image = arguments[0].double()
    image = torch.cat([image] * draws) if changes.get("share_input") else image
    loc, bias = (arguments[i].detach().double().requires_grad_() for i in (1, 3))
    plain = torch.relu(
        torch.nn.functional.conv2d(
            image,
            loc,
            bias,
            keywords["stride"],
            keywords["padding"][0],
            keywords["dilation"],
        )
    )
    assert torch.equal(output.double(), plain)
    for mine, theirs in zip(
        got, torch.autograd.grad(plain, (loc, bias), incoming.double()), strict=True
    ):
        assert torch.equal(mine.double(), theirs)


@pytest.mark.parametrize("kind", ["expanded", "planes", "pixels", "strided"])
def test_any_memory_of_the_incoming_gradient(kind: str) -> None:
    sizes, changes = SHAPES["colours"]
    changes = {**changes, "algorithm": DIRECT}
    _, output = _gradients(sizes, changes, None, False)
    value = samples.randn(*output.shape, seed=12)
    incoming = {
        "expanded": torch.ones(()).expand(output.shape),
        "planes": value,
        "pixels": value.contiguous(memory_format=torch.channels_last),
        "strided": samples.randn(*output.shape[:3], 2 * output.shape[3], seed=13)[..., ::2],
    }[kind]
    got, _ = _gradients(sizes, changes, incoming, False)
    expected, _ = _gradients(sizes, changes, incoming, True)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=2e-5)


def test_infinite_gradients_of_masked_pixels_are_zero() -> None:
    sizes, changes = SHAPES["colours"]
    changes = {**changes, "algorithm": DIRECT}
    _, output = _gradients(sizes, changes, None, False)
    assert (output == 0).any()
    incoming = torch.where(output == 0, torch.inf, 1.0)
    got, _ = _gradients(sizes, changes, incoming, False)
    assert all(grad.isfinite().all() for grad in got.values())


@pytest.mark.parametrize("shape", ["one-channel", "colours-nhwc", "many-filters", "draws"])
def test_same_bits_for_any_number_of_threads(shape: str) -> None:
    sizes, changes = SHAPES[shape]
    changes = {**changes, "algorithm": DIRECT}
    torch.set_num_threads(1)
    expected, _ = _gradients(sizes, changes, None, False)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        got, _ = _gradients(sizes, changes, None, False)
        assert all(torch.equal(got[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("wanted", [("loc",), ("rho",), ("bias_loc",), ("loc", "bias_rho")])
def test_some_gradients(wanted: tuple[str, ...]) -> None:
    sizes, changes = SHAPES["colours"]
    arguments = [t if t is None else t.detach() for t in tensors(**sizes)]
    everything, _ = _gradients(sizes, {**changes, "algorithm": DIRECT}, None, False)
    leaves = [arguments[1 + NAMES.index(name)].requires_grad_() for name in wanted]
    output, kl, _, _ = ops.bconv2d(*arguments, **options(algorithm=DIRECT, **changes))
    incoming = samples.randn(*output.shape, seed=11)
    grads = torch.autograd.grad((output, kl), leaves, (incoming, torch.full_like(kl, 0.5)))
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=2e-5)
