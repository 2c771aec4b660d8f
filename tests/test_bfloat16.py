"""bfloat16 by the direct kernels: products of pairs where the processor has them."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbconv as fb
from fastbconv import _native
from fastbconv import functional as f

NATIVE = _native.load()
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# Around pairs, vectors of 16 and blocks of 64, on either side; the first layers of networks.
CHANNELS = [(c, k) for c in (1, 3, 5, 17, 31, 32, 33) for k in (1, 5, 32, 33)]
CHANNELS += [(64, 65), (65, 64), (130, 7)]
PROBLEMS = [f"n3c{c}h7w9_k{k}r3s3_p1_cl" for c, k in CHANNELS]
PROBLEMS += [name for name in cases.SMALL if not name.startswith("n1c1h1w1") and "tanh" not in name]
PROBLEMS += [
    "n7c33h5w4_k31r3s3_p1_cl",  # lines across images
    "n7c17h4w4_k40r2s3_p2x1_d2x1",
    "n5c3h15w13_k33r5s5_st2x3_p2_cl",
    "n4c3h14w14_k16r7s7_st2_p3_cl",
    "n1c300h6w6_k130r3s3_p1_cl",  # several chunks of weights
    "n64c40h1w1_k24r1s1_cl",
    "n6c34h6w6_k66r3s3_g2_p1_cl",
    "n12c9h6w7_k10r3s3_p1_m6_share_cl_bb",
]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, a: Any) -> Tensor:
    """PyTorch's, one group of rows for each draw, of the last draw's weight for all."""
    top, bottom, left, right = a.padding
    rows = x.repeat(a.num_samples, 1, 1, 1) if a.share_input else x
    padded = F.pad(rows, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, a.stride, 0, a.dilation, a.groups)


def _step(y: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_integers_are_exact(name: str) -> None:
    """Small integers: every sum is exact, and rounded once where it is stored in bfloat16."""
    a = cases.parse(name).arguments(torch.bfloat16, integer=True)
    leaves = [t.requires_grad_() for t in (a.input, a.weight, a.bias) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = _convolve(wide[0], wide[1], wide[2] if len(wide) > 2 else None, a)
    exact = exact.relu() if a.activation == "relu" else exact
    grad = torch.randint(-3, 4, exact.shape).bfloat16()
    expected = _step(exact, wide, grad.double())
    with fb.algorithm("direct"):
        got = _step(cases.call(a), leaves, grad)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other.to(mine.dtype))


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "size", [(4, 3, 16, 32, 3), (5, 33, 9, 70, 3), (8, 64, 16, 64, 3), (6, 96, 5, 40, 5)]
)
def test_errors_are_no_larger_than_twice_pytorchs(
    size: tuple[int, ...], layout: torch.memory_format
) -> None:
    n, c, h, k, s = size
    torch.manual_seed(0)
    x = torch.randn(n, c, h, h).bfloat16().contiguous(memory_format=layout).requires_grad_()
    loc = (torch.randn(k, c, s, s) / (s * s * c) ** 0.5).requires_grad_()
    rho, bias = torch.full_like(loc, -3.0), torch.randn(k).requires_grad_()
    weight = f.sample_posterior(loc, rho, seed=7)[0].detach().bfloat16()
    grad = torch.randn(n, k, h, h).bfloat16()

    def plain(dtype: torch.dtype, form: torch.memory_format) -> list[Tensor]:
        ours = (x.detach().contiguous(memory_format=form), weight, bias.detach())
        leaves = [t.to(dtype).requires_grad_() for t in ours]
        return _step(F.conv2d(*leaves, padding=s // 2), leaves, grad.to(dtype))

    def errors(got: list[Tensor]) -> list[float]:
        return [(a.double() - b).abs().max().item() for a, b in zip(got, exact, strict=True)]

    exact = plain(torch.float64, layout)
    exact[3] = grad.double().sum((0, 2, 3))
    theirs = [errors(plain(torch.bfloat16, form)) for form in FORMATS.values()]
    with fb.algorithm("direct"):
        y = f.bayes_conv2d(x, loc, rho, bias, padding=s // 2, seed=7)
        ours = errors(_step(y, [x, loc, bias], grad))
    for name, error, *bars in zip(["output", "x", "loc", "bias"], ours, *theirs, strict=True):
        assert error <= 2.0 * max(bars), (name, error, bars)


def _random(name: str, layout: torch.memory_format) -> tuple[Any, list[Tensor]]:
    a = cases.parse(name).arguments(torch.bfloat16)
    a = type(a)(**{**vars(a), "input": a.input.contiguous(memory_format=layout)})
    given = (a.input, a.weight, a.weight_rho, a.bias)
    return a, [t.requires_grad_() for t in given if t is not None]


NAMES = (
    "n3c3h9w7_k20r3s3_p1",
    "n5c33h8w9_k70r3s3_p1_silu",
    "n7c17h4w5_k33r3s3_p1_relu",
    "n4c16h9w9_k32r3s3_st2_p1_m2_relu",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_changes_no_bit(name: str) -> None:
    results = []
    for layout in FORMATS.values():
        a, leaves = _random(name, layout)
        with fb.algorithm("direct"):
            y = cases.call(a)
            results.append(_step(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(name: str) -> None:
    a, leaves = _random(name, torch.channels_last)
    y = cases.call(a)
    grad = torch.randn(y.shape).bfloat16()
    together = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        assert torch.equal(torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_goes_where_it_goes_in_float32(name: str, bad: float) -> None:
    """And nowhere else: no zero of a padding or of an unused lane multiplies it."""
    masks = []
    for dtype in (torch.bfloat16, torch.float32):
        a, leaves = _random(name, torch.channels_last)
        image = a.input.detach().to(dtype)
        image[1, -1, -1, -1] = image[1, 0, 2, 0] = bad
        a = type(a)(**{**vars(a), "input": image.requires_grad_()})
        leaves[0] = image
        with fb.algorithm("direct"):
            y = cases.call(a)
            grad = torch.ones_like(y)
            grad[0, -1, 1, 1] = bad
            masks.append([~t.isfinite() for t in _step(y, leaves, grad)])
    for one, other in zip(*masks, strict=True):
        assert torch.equal(one, other)
    assert masks[0][0].any()


def test_slices_are_read_where_they_are() -> None:
    a, _ = _random("n4c34h10w12_k20r3s3_p1", torch.channels_last)
    whole = a.input.detach()
    for view in (
        whole[:, ::2],
        whole[:, 1:],
        whole[:, :, 1::2, 2:],
        whole[:, :, :, :1].expand(4, 34, 10, 6),
        whole[::2].transpose(2, 3),
    ):
        weight = a.weight.detach()[:, : view.size(1)]
        with fb.algorithm("direct"):
            got, expected = (
                f.bayes_conv2d(x, weight, None, padding=1) for x in (view, view.clone())
            )
        assert torch.equal(got, expected)


def test_the_choice_follows_the_processor() -> None:
    """Without AVX-512 PyTorch takes ten times its own time of float32, sixteen times ours."""
    x = torch.zeros(8, 64, 16, 16, dtype=torch.bfloat16)
    before = NATIVE.current_isa()
    try:
        NATIVE.limit_isa("avx2")
        rows = fb.explain(x, torch.zeros(64, 64, 3, 3), padding=1)
        assert [row.algorithm for row in rows if row.chosen] == ["winograd2x4"] * 3
    finally:
        NATIVE.limit_isa(before)
