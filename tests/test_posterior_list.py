"""A list of posteriors against the same posteriors one by one, and weights sampled before."""

from __future__ import annotations

from typing import Any

import op_samples as samples
import pytest
import torch
from op_samples import SILU, options, tensors
from torch import Tensor

from fastbconv import noise, ops

samples.native()


def one_by_one(
    args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    locs, rhos, seeds, prior_locs, prior_scales = args
    drawn, kls = [], []
    for i, loc in enumerate(locs):
        sample, kl = ops.sample_posterior(
            loc,
            rhos[i],
            seeds[i],
            prior_locs[i],
            prior_scales[i],
            prior=keywords["prior"][2 * i : 2 * i + 2],
            with_kl=keywords["with_kl"][i],
            scale_floor=keywords["scale_floor"],
            stream=keywords["stream"][i],
            num_samples=1,
            offset_add=keywords["offset_add"],
            element_offset=keywords["element_offset"][i],
            dtype=keywords["dtype"] if keywords["cast"][i] else None,
        )
        drawn.append(sample[0])
        kls.append(kl if keywords["with_kl"][i] else loc.new_zeros(()))
    return drawn, kls


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    return [t for part in args if isinstance(part, list) for t in part if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_equals_its_posteriors(dtype: torch.dtype) -> None:
    args, keywords = samples.posterior_list(dtype)
    drawn, kl = ops.sample_posterior_list(*args, **keywords)
    expected, kls = one_by_one(args, keywords)
    for got, want in zip(drawn, expected, strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    assert torch.equal(kl, torch.stack(kls))
    assert kl[3] == 0
    assert drawn[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("unused", [(), (0,), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_list_equal_those_of_its_posteriors(
    dtype: torch.dtype, unused: tuple[int, ...]
) -> None:
    args, keywords = samples.posterior_list(dtype)

    def loss(drawn: list[Tensor], kls: Any) -> Tensor:
        used = (s for i, s in enumerate(drawn) if i not in unused)
        return sum(s.to(dtype).square().sum() for s in used) + 0.25 * sum(kls)

    trained = leaves(args)
    together = loss(*ops.sample_posterior_list(*args, **keywords))
    alone = loss(*one_by_one(args, keywords))
    got = torch.autograd.grad(together, trained, allow_unused=True)
    want = torch.autograd.grad(alone, trained, allow_unused=True)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), index
        if a is not None and b is not None:
            assert torch.equal(a, b), index
            assert a.stride() == trained[index].stride()


def test_only_the_kl_or_only_samples() -> None:
    args, keywords = samples.posterior_list()
    trained = leaves(args)
    kl = ops.sample_posterior_list(*args, **keywords)[1]
    by_kl = torch.autograd.grad(kl.sum(), trained, allow_unused=True)
    want = torch.autograd.grad(sum(one_by_one(args, keywords)[1]), trained, allow_unused=True)
    for a, b in zip(by_kl, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    kl = ops.sample_posterior_list(*args, **{**keywords, "with_kl": [False] * 4})[1]
    assert torch.equal(kl, torch.zeros(4))
    kl.sum().backward()  # a constant
    assert all(t.grad is None for t in trained)


def test_second_derivatives_and_forward_mode_are_refused() -> None:
    args, keywords = samples.posterior_list()
    drawn, _ = ops.sample_posterior_list(*args, **keywords)
    grad = torch.autograd.grad(drawn[2].square().sum(), args[0][2], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"list_backward.*second one"):
        grad.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0][1].detach(), torch.ones(5, 7))
        locs = [args[0][0], dual, *args[0][2:]]
        with pytest.raises(NotImplementedError, match="reverse-mode"):
            ops.sample_posterior_list(locs, *args[1:], **keywords)


def test_five_dimensions_and_empty_entries() -> None:
    loc, rho = samples.randn(2, 3, 2, 3, 2), samples.randn(2, 3, 2, 3, 2, seed=1)
    prior = samples.randn(3, 1, 1, 1, seed=2)
    loc.requires_grad_()
    prior.requires_grad_()
    empty = torch.empty(0, 3)
    seeds = torch.tensor([[1, 2], [3, 4]])
    keywords = {
        "prior": [0.0, 1.0] * 2,
        "with_kl": [True, True],
        "scale_floor": samples.FLOOR,
        "stream": [0, 0],
        "offset_add": 0,
        "element_offset": [0, 0],
        "cast": [False, False],
        "dtype": None,
    }
    args = ([loc, empty], [rho, empty], seeds, [prior, None], [None, None])
    drawn, kl = ops.sample_posterior_list(*args, **keywords)
    expected, kls = one_by_one(args, keywords)
    assert torch.equal(drawn[0], expected[0])
    assert drawn[1].shape == (0, 3)
    assert torch.equal(kl, torch.stack(kls))
    got = torch.autograd.grad((drawn[0].sum() + kl.sum()), (loc, prior))
    want = torch.autograd.grad((expected[0].sum() + sum(kls)), (loc, prior))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_inside_torch_func() -> None:
    args, keywords = samples.posterior_list()
    flat = tuple(
        [None if t is None else t.detach() for t in part] for part in args if isinstance(part, list)
    )

    def loss(locs: list[Tensor]) -> Tensor:
        drawn, kl = ops.sample_posterior_list(locs, flat[1], args[2], *flat[2:], **keywords)
        return sum(s.float().square().sum() for s in drawn) + kl.sum()

    got = torch.func.grad(loss)(flat[0])
    trained = [t.requires_grad_() for t in flat[0]]
    for a, b in zip(got, torch.autograd.grad(loss(trained), trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": [0]}, "stream: expected 4 values, got 1"),
        ({"prior": [0.0, 1.0]}, "prior: expected 8 values, got 2"),
        ({"cast": [True]}, "cast: expected 4 values, got 1"),
        ({"element_offset": [0, 0, 0, -1]}, "element_offset: expected a value of at least 0"),
        ({"prior": [0.0, 1.0] * 3 + [0.0, 0.0]}, "prior_scale: expected a positive scale, got 0"),
    ],
)
def test_wrong_lists_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    args, keywords = samples.posterior_list()
    with pytest.raises(ValueError, match=message):
        ops.sample_posterior_list(*args, **{**keywords, **change})


def test_wrong_tensors_say_what_is_wrong() -> None:
    args, keywords = samples.posterior_list()
    with pytest.raises(ValueError, match=r"seed: expected shape \[4, 2\], got \[2\]"):
        ops.sample_posterior_list(*args[:2], samples.noise_seed(), *args[3:], **keywords)
    with pytest.raises(ValueError, match="rho: expected 4 values, got 1"):
        ops.sample_posterior_list(args[0], args[1][:1], *args[2:], **keywords)
    rhos = [*args[1][:3], args[1][3].double()]
    with pytest.raises(TypeError, match="rho: expected dtype Float, got Double"):
        ops.sample_posterior_list(args[0], rhos, *args[2:], **keywords)
    none = torch.empty(0, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one tensor"):
        torch.ops.fastbconv.sample_posterior_list(
            [],
            [],
            none,
            [],
            [],
            **{
                **keywords,
                "prior": [],
                "with_kl": [],
                "stream": [],
                "element_offset": [],
                "cast": [],
            },
        )


def test_derived_seeds_are_those_of_python() -> None:
    seed = samples.noise_seed()
    got = ops.derive_seeds(seed, 3, 5)
    assert torch.equal(got, torch.stack([noise.derive(seed, 3 + i) for i in range(5)]))
    assert ops.derive_seeds(seed, 0, 0).shape == (0, 2)
    with pytest.raises(ValueError, match="first: expected a value of at least 0, got -1"):
        ops.derive_seeds(seed, -1, 2)


# A weight that was sampled before: weight_loc in the dtype of the input, no rho.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", ["none", "point", "normal", "rounded"])
@pytest.mark.parametrize("algorithm", samples.ANY_SHAPE.values(), ids=samples.ANY_SHAPE.keys())
def test_a_sampled_weight_gives_what_sampling_inside_gives(
    algorithm: int, bias: str, dtype: torch.dtype
) -> None:
    args = tensors(2, 6, 7, 8, bias="point" if bias == "rounded" else bias, dtype=dtype)
    keywords = options(algorithm=algorithm, activation=SILU, keep_weight=True)
    output, _, _, weight = ops.bconv2d(*args, **keywords)
    given = list(args)
    given[1] = weight[0].detach().requires_grad_()
    given[2] = None
    if bias == "rounded":  # a bias in the 16-bit dtype too
        args[3] = args[3].detach().to(dtype).float().requires_grad_()
        output = ops.bconv2d(*args, **keywords)[0]
        given[3] = args[3].detach().to(dtype).requires_grad_()
    got, got_kl, _, kept = ops.bconv2d(*given, **keywords)
    assert torch.equal(got, output)
    assert torch.equal(kept, weight)
    assert got_kl.dtype == torch.float32
    trained = samples.differentiable(given)
    grads = torch.autograd.grad(got.float().square().sum() + got_kl, trained)
    assert [g.dtype for g in grads] == [t.dtype for t in trained]
    inside = torch.autograd.grad(output.float().square().sum(), (args[0], args[1]))
    torch.testing.assert_close(grads[0], inside[0])
    torch.testing.assert_close(grads[1].float(), inside[1], rtol=2**-7, atol=1e-3)


def test_a_narrow_weight_must_fit_the_input_and_have_no_rho() -> None:
    args = tensors(dtype=torch.bfloat16, grad=False)
    narrow = args[1].bfloat16()
    with pytest.raises(
        TypeError, match="weight_loc: expected dtype float32 or float64, got BFloat"
    ):
        ops.bconv2d(args[0], narrow, args[2], *args[3:], **options())
    with pytest.raises(TypeError, match="weight_loc: expected dtype float32 or float64, got Half"):
        ops.bconv2d(args[0], narrow.half(), None, *args[3:], **options())
    with pytest.raises(
        TypeError, match="weight_loc: expected dtype float32 or float64, got BFloat"
    ):
        ops.bconv2d(args[0].float(), narrow, None, *args[3:], **options())


def test_the_gradient_goes_through_a_list_into_a_convolution() -> None:
    """Sampling by a list and convolving gives what the fused convolution gives."""
    args = tensors(2, bias="none")
    keywords = options(weight_kl=True)
    output, kl, _, _ = ops.bconv2d(*args, **keywords)
    want = torch.autograd.grad(output.square().sum() + kl, args[:3])
    (weight,), kls = ops.sample_posterior_list(
        [args[1]],
        [args[2]],
        args[5][None],
        [None],
        [None],
        prior=[0.0, 1.0],
        with_kl=[True],
        scale_floor=samples.FLOOR,
        stream=[0],
        offset_add=0,
        element_offset=[0],
        cast=[False],
        dtype=None,
    )
    given = [args[0], weight, None, *args[3:]]
    again = ops.bconv2d(*given, **options(weight_kl=False))[0]
    assert torch.equal(again, output)
    got = torch.autograd.grad(again.square().sum() + kls.sum(), args[:3])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
