"""bayes_conv_transpose2d: exact, replayed, by ratio; its noise, samples and estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastbconv as fb
from fastbconv import kl, noise
from fastbconv.testing import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    assert_close,
    assert_ratio,
    assert_same,
)

bayes_conv_transpose2d = fb.functional.bayes_conv_transpose2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = torch.tensor([0x243F6A8885A308D3, 7])
FLOOR = 2.0**-23
PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "pairs": {"stride": (3, 1), "padding": (0, 2), "output_padding": (2, 0)},
    "dilation": {"dilation": (2, 3), "padding": 1, "output_padding": (1, 2)},
    "groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 4, "padding": 1},
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def _draw(weight: torch.Tensor, rho: torch.Tensor | None, sample: int = 0) -> torch.Tensor:
    """The weights in use, in plain PyTorch, in the dtype of the parameters."""
    if rho is None:
        return weight
    eps = noise.weight_eps(SEED, weight.shape, sample).to(weight.dtype)
    return weight + kl.posterior_scale(rho, FLOOR) * eps


class _Data:
    """Tensors of one problem: x (4, 4, 5, 6), weight (4, K / groups, 3, 2) with K = 8."""

    def __init__(self, name: str, dtype: torch.dtype, *, integer: bool = False) -> None:
        self.geometry = PROBLEMS[name]
        filters = 8 // self.geometry.get("groups", 1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def make(*shape: int) -> torch.Tensor:
            if integer:
                return torch.randint(-3, 4, shape).double()
            return torch.randn(shape, dtype=torch.float64)

        self.x = make(4, 4, 5, 6).to(dtype)
        self.weight = make(4, filters, 3, 2).to(wide)
        self.rho = None if integer else (make(4, filters, 3, 2) * 0.5 - 2).to(wide)
        self.bias = make(8).to(wide)

    def leaves(self) -> list[torch.Tensor]:
        given = (self.x, self.weight, self.bias, self.rho)
        return [value.detach().clone().requires_grad_() for value in given if value is not None]

    def ours(self, *leaves: torch.Tensor, **options: Any) -> Any:
        x, weight, bias, *rho = leaves or (self.x, self.weight, self.bias, self.rho)
        tensors = (x, weight, *(rho or [None]), bias)
        return bayes_conv_transpose2d(*tensors, seed=SEED, **self.geometry, **options)

    def plain(self, dtype: torch.dtype, *leaves: torch.Tensor) -> torch.Tensor:
        """By PyTorch in ``dtype``; the drawn weight is rounded to the dtype of the input first."""
        x, weight, bias, *rho = leaves or (self.x, self.weight, self.bias, self.rho)
        drawn = _draw(weight.double(), rho[0].double() if rho and rho[0] is not None else None)
        if x.dtype in (torch.bfloat16, torch.float16):
            drawn = drawn + (drawn.detach().to(x.dtype) - drawn.detach())
        z = F.conv_transpose2d(x.to(dtype), drawn.to(dtype), **self.geometry)
        return z + bias.to(dtype).reshape(-1, 1, 1)


# --- numbers --------------------------------------------------------------------------------------


@each_problem
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "library", "reference"])
def test_integers_without_scale_are_exact(name: str, dtype: torch.dtype, algorithm: str) -> None:
    data = _Data(name, dtype, integer=True)
    with fb.algorithm(algorithm):
        got = data.ours(activation="relu")
        assert_same(got, data.plain(torch.float64).relu().to(dtype))
        assert_same(data.ours(data.x[0], data.weight, data.bias, activation="relu"), got[0])


@each_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_pytorchs(name: str, dtype: torch.dtype) -> None:
    data = _Data(name, dtype)
    results = []
    cotangent = torch.randn(data.plain(torch.float64).shape, dtype=torch.float64).to(dtype)
    for function in (
        lambda *leaves: data.ours(*leaves),
        lambda *leaves: data.plain(dtype, *leaves),
        lambda *leaves: data.plain(torch.float64, *leaves),
    ):
        leaves = data.leaves()
        output = function(*leaves)
        output.backward(cotangent.to(output.dtype))
        results.append((output, *(leaf.grad for leaf in leaves)))
    factors = (FORWARD_FACTOR, *[GRADIENT_FACTOR] * 4)
    for got, own, exact, factor in zip(*results, factors, strict=True):
        assert_ratio(got, own, exact, factor)


@pytest.mark.parametrize("estimator", ["reparameterization", "flipout", "local"])
def test_gradcheck(estimator: str) -> None:
    torch.set_num_threads(1)  # many tiny calls
    data = _Data("groups", torch.float64)
    options = {"estimator": estimator, "activation": "tanh", "return_kl": True, "num_samples": 2}

    def function(*leaves: torch.Tensor) -> Any:
        return data.ours(*leaves, **options)

    x, weight, bias, rho = data.leaves()
    x = x.detach()[:2, :, :1, :2].requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weight, bias, rho))


# --- noise ----------------------------------------------------------------------------------------


def _revealed(**options: Any) -> torch.Tensor:
    """The weights in use, read from the output for one pixel in each channel by itself."""
    loc = torch.zeros(3, 4, 2, 3)
    rho = torch.full_like(loc, 0.54132485)  # scale 1
    image = torch.eye(3).reshape(3, 3, 1, 1)
    return bayes_conv_transpose2d(image, loc, rho, seed=SEED, **options)


def test_noise_is_numbered_by_input_channel_tap_and_output_channel() -> None:
    weight = _revealed()  # (C, K, R, S): one row for each channel
    assert weight.shape == (3, 4, 2, 3)
    flat = noise.standard_normal(SEED, weight.numel())
    assert_close(weight, flat.reshape(3, 2, 3, 4).movedim(-1, 1), 1e-5, 1e-6)
    assert_close(weight, noise.weight_eps(SEED, weight.shape), 1e-5, 1e-6)


def test_golden_values() -> None:
    """A change of one of these is a breaking release."""
    weight = _revealed()
    assert_close(weight[0, :, 0, 0], torch.tensor(GOLDEN_FIRST), 1e-5, 1e-6)
    assert_close(weight[2, :, 1, 2], torch.tensor(GOLDEN_LAST), 1e-5, 1e-6)


GOLDEN_FIRST = [1.7150419, -0.2809423, -2.0658455, -0.6167897]
GOLDEN_LAST = [0.4472411, 0.4937605, 0.3893858, 0.4946010]


def test_shards_of_input_channels_sum_to_the_whole() -> None:
    data = _Data("stride", torch.float32)
    whole, total = data.ours(return_kl=True)
    parts = []
    for first in (0, 2):
        rows = slice(first, first + 2)
        tensors = (data.x[:, rows], data.weight[rows], data.rho[rows])
        offset = (first * data.weight[0].numel(), 0)
        parts.append(
            bayes_conv_transpose2d(
                *tensors, seed=SEED, element_offset=offset, return_kl=True, **data.geometry
            )
        )
    assert_close(parts[0][0] + parts[1][0] + data.bias.reshape(-1, 1, 1), whole, 1e-5, 1e-5)
    assert_close(parts[0][1] + parts[1][1], total, 1e-6, 0)
    assert_close(total, fb.functional.kl_normal(data.weight, data.rho), 1e-6, 0)


def test_samples() -> None:
    data = _Data("groups", torch.float32)
    shared = data.ours(num_samples=3, share_input=True)
    for s, part in enumerate(shared.split(4)):
        expected = bayes_conv_transpose2d(
            data.x,
            data.weight,
            data.rho,
            data.bias,
            seed=SEED + torch.tensor([0, s]),
            **data.geometry,
        )
        assert_close(part, expected, 1e-6, 1e-6)
        plain = F.conv_transpose2d(
            data.x, _draw(data.weight, data.rho, s), data.bias, **data.geometry
        )
        assert_close(part, plain, 1e-4, 1e-4)
    halves = data.ours(num_samples=2)
    assert_close(halves, torch.cat([shared[:2], shared[6:8]]), 1e-6, 1e-6)


def test_the_generator_governs_the_draw() -> None:
    data = _Data("plain", torch.float32)
    tensors = (data.x, data.weight, data.rho)
    first, second = (
        bayes_conv_transpose2d(*tensors, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert_same(first, second)
    assert not torch.equal(first, bayes_conv_transpose2d(*tensors))


@pytest.mark.parametrize("name", ["pairs", "groups"])
def test_flipout_gives_every_row_a_weight_of_its_own(name: str) -> None:
    data = _Data(name, torch.float32)
    got = data.ours(estimator="flipout")
    rows, channels, groups = 4, 4, data.geometry.get("groups", 1)
    r = noise.random_signs(SEED, (rows, channels), stream="sign_input")
    t = noise.random_signs(SEED, (rows, 8), stream="sign_output")
    delta = _draw(torch.zeros_like(data.weight), data.rho)
    for row in range(rows):
        # Output channel j of a group's weight is channel g * K / groups + j.
        signs = t[row].reshape(groups, -1).repeat_interleave(channels // groups, 0)
        weight = data.weight + r[row].reshape(-1, 1, 1, 1) * signs[:, :, None, None] * delta
        expected = F.conv_transpose2d(data.x[row], weight, data.bias, **data.geometry)
        assert_close(got[row], expected, 1e-4, 1e-4)


@pytest.mark.parametrize("name", ["pairs", "groups"])
def test_local_has_the_moments_of_every_entry(name: str) -> None:
    data = _Data(name, torch.float32)
    got = data.ours(estimator="local")
    scale = kl.posterior_scale(data.rho, FLOOR)
    mean = F.conv_transpose2d(data.x, data.weight, data.bias, **data.geometry)
    variance = F.conv_transpose2d(data.x.square(), scale.square(), **data.geometry)
    rows, filters, height, width = mean.shape
    eps = noise.standard_normal(SEED, (rows, height, width, filters), stream="local")
    assert_close(got, mean + eps.movedim(-1, 1) * variance.sqrt(), 1e-4, 1e-4)


# --- living with PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["reparameterization", "flipout", "local"])
def test_layout_autocast_and_empty_batch(estimator: str) -> None:
    data = _Data("stride", torch.float32)
    image = data.x.contiguous(memory_format=torch.channels_last)
    want = data.ours(estimator=estimator)
    got = data.ours(image, data.weight, data.bias, data.rho, estimator=estimator)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert want.is_contiguous()
    assert_close(got, want, 1e-5, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = data.ours(estimator=estimator)
    assert low.dtype == torch.bfloat16
    assert_close(low, want, 0.05, 0.1)
    empty = data.ours(data.x[:0], data.weight, data.bias, data.rho, estimator=estimator)
    assert empty.shape == (0, *want.shape[1:])
    on_meta = [value.to("meta") for value in (data.x, data.weight, data.bias, data.rho)]
    assert data.ours(*on_meta, estimator=estimator).shape == want.shape


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        bayes_conv_transpose2d, dynamic=True, fullgraph=True, backend="aot_eager"
    )
    weight = torch.randn(3, 4, 3, 3)
    geometry = {"stride": 2, "padding": 1, "output_padding": 1}
    for extent in (5, 8):
        x = torch.randn(2, 3, extent, extent + 1)
        got = compiled(x, weight, weight - 2, seed=SEED, **geometry)
        want = bayes_conv_transpose2d(x, weight, weight - 2, seed=SEED, **geometry)
        assert_close(got, want, 1e-5, 1e-6)


@pytest.mark.parametrize("seed", [7, torch.tensor([7, 0])], ids=["int", "tensor"])
def test_a_seed_in_the_place_of_the_output_size(seed: int | torch.Tensor) -> None:
    layer, x = fb.BayesConvTranspose2d(2, 3, 3), torch.randn(1, 2, 4, 4)
    with pytest.raises(TypeError, match=r"output_size: expected \(H_out, W_out\), got .*seed="):
        layer(x, seed)
    assert torch.equal(layer(x, [6, 6], seed), layer(x, seed=seed))


def test_compile_of_a_layer_with_an_output_size() -> None:
    torch._dynamo.reset()
    layer = fb.BayesConvTranspose2d(3, 4, 3, 2, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 5, 6)
    assert_close(compiled(x, (10, 12), SEED), layer(x, (10, 12), SEED), 1e-5, 1e-6)


def test_it_is_the_adjoint_of_the_convolution_with_the_same_weight() -> None:
    """<conv(y, w), x> = <y, conv_transpose(x, w)>, with one draw of w."""
    x, y = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 8, 11, 11).double()
    loc, rho = torch.randn(4, 8, 3, 3).double(), torch.randn(4, 8, 3, 3).double() - 2
    geometry = {"stride": 2, "seed": SEED}
    down = fb.functional.bayes_conv2d(y, loc, rho, **geometry)
    up = bayes_conv_transpose2d(x, loc, rho, **geometry)
    assert_close((down * x).sum(), (y * up).sum(), 1e-6, 0)
