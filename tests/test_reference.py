"""The reference against independent float64 formulas: what everything else is compared with."""

from __future__ import annotations

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import distributions

import fastbconv as fb
from fastbconv import activations, kl, noise, reference
from fastbconv.testing import assert_close, assert_ratio, assert_same, plain_bconv2d

SEED = torch.tensor([5, 11])


def _forward(a, **options):
    with fb.algorithm("reference"):
        return cases.call(a, **options)


@pytest.mark.parametrize("name", cases.SMALL)
def test_forward_against_plain_float64(name: str) -> None:
    a = cases.parse(name).arguments(torch.float64)
    # The mirror's noise differs from the kernels' by a few units in the last place of float32.
    assert_close(_forward(a), plain_bconv2d(a, torch.float64), 1e-5, 1e-5, name)


@pytest.mark.parametrize("name", cases.SMALL)
def test_gradients_against_plain_float64(name: str) -> None:
    a = cases.parse(name).arguments(torch.float64)
    leaves = {k: v.clone().requires_grad_() for k, v in a.leaves().items()}
    expected = plain_bconv2d(a, torch.float64, leaves)
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(cotangent)
    for key, value in a.leaves().items():
        setattr(a, key, value.clone().requires_grad_())
    _forward(a).backward(cotangent)
    for key, leaf in leaves.items():
        if leaf.grad is None:
            assert getattr(a, key).grad is None
        else:
            assert_close(getattr(a, key).grad, leaf.grad, 1e-4, 1e-4, f"{name} {key}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["n2c17h8w8_k16r3s3_p1_bb", "n4c3h7w7_k5r3s3_p1_m4_cl"])
def test_low_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    a = cases.parse(name).arguments(dtype)
    exact, own = plain_bconv2d(a, torch.float64), plain_bconv2d(a, dtype)
    assert_ratio(_forward(a), own, exact, 1.0, name)


def test_gradient_passes_the_rounding_of_the_weight_unrounded() -> None:
    a = cases.parse("n2c3h9w7_k5r3s3_p1").arguments(torch.bfloat16)
    a.weight = a.weight.requires_grad_()
    _forward(a).float().pow(2).sum().backward()
    assert a.weight.grad.dtype == torch.float32
    assert not torch.equal(a.weight.grad, a.weight.grad.bfloat16().float())


@pytest.mark.parametrize("rho", [-200.0, -104.0, -20.0, 0.0, 30.0, 200.0])
def test_kl_against_torch_distributions(rho: float) -> None:
    loc = torch.linspace(-2, 2, 9, dtype=torch.float64)
    raw = torch.full_like(loc, rho)
    scale = F.softplus(raw, threshold=500.0) + 2.0**-52
    posterior = distributions.Normal(loc, scale)
    expected = distributions.kl_divergence(posterior, distributions.Normal(0.5, 2.0)).sum()
    got = reference.kl_normal(loc, raw, None, None, prior=(0.5, 2.0), scale_floor=2.0**-52)
    assert_close(got, expected, 1e-12, 0.0)


def test_kl_with_prior_tensors() -> None:
    loc, raw = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    prior_loc, prior_scale = torch.randn(3, 1, 1), torch.rand(4, 1, 1, 1) + 0.5
    expected = distributions.kl_divergence(
        distributions.Normal(loc.double(), F.softplus(raw.double()) + 2.0**-23),
        distributions.Normal(prior_loc.double(), prior_scale.double()),
    ).sum()
    got = reference.kl_normal(
        loc, raw, prior_loc, prior_scale, prior=(0.0, 1.0), scale_floor=2.0**-23
    )
    assert got.dtype == torch.float32
    assert_close(got, expected, 1e-6, 0.0)


def test_kl_gradients_by_gradcheck() -> None:
    tensors = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scale = torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()

    def function(loc, rho, prior_loc, prior_scale):
        return reference.kl_normal(
            loc, rho, prior_loc, prior_scale, prior=(0.0, 1.0), scale_floor=1e-9
        )

    assert torch.autograd.gradcheck(function, (*tensors, scale))


@pytest.mark.parametrize("stream", ["weight", "bias", "rounding"])
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 5, 17])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 2**33 + 1])
def test_a_shard_of_the_noise_is_the_slice(stream: str, numel: int, offset: int) -> None:
    start = max(offset - 6, 0)
    whole = noise.mirror_standard_normal(
        SEED, numel + 6, stream=noise.STREAMS[stream], element_offset=start
    )
    part = noise.mirror_standard_normal(
        SEED, numel, stream=noise.STREAMS[stream], element_offset=offset
    )
    assert_same(part, whole[offset - start : offset - start + numel])


def test_noise_is_standard_normal() -> None:
    z = noise.mirror_standard_normal(SEED, 1 << 18).double()
    assert abs(z.mean().item()) < 4 / math.sqrt(z.numel())
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / z.numel())
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / z.numel())
    assert abs((z[1:] * z[:-1]).mean().item()) < 4 / math.sqrt(z.numel())


def test_sample_one_is_the_next_offset() -> None:
    later = torch.tensor([5, 12])
    assert_same(
        noise.weight_eps(SEED, (4, 3, 2, 2), sample=1), noise.weight_eps(later, (4, 3, 2, 2))
    )


def test_offsets_wrap_modulo_two_to_the_64() -> None:
    last, first = torch.tensor([5, -1]), torch.tensor([5, 0])
    assert_same(noise.weight_eps(last, (7,), sample=1), noise.weight_eps(first, (7,)))


def test_mirror_and_public_generator_agree() -> None:
    counter = torch.randint(0, 2**32, (50, 4))
    key = torch.randint(0, 2**32, (50, 2))
    assert_same(fb.noise.philox4x32_10(counter, key), noise.mirror_philox4x32_10(counter, key))
    mirror = noise.mirror_standard_normal(SEED, 4099, stream=1, sample=3, element_offset=5)
    public = fb.noise.standard_normal(SEED, 4099, stream="bias", sample=3, element_offset=5)
    assert_close(public, mirror, 1e-5, 1e-6)


def test_weight_eps_numbers_elements_in_krsc_order() -> None:
    flat = noise.standard_normal(SEED, 5 * 3 * 2 * 7)
    eps = noise.weight_eps(SEED, (5, 7, 3, 2))
    assert_same(eps.permute(0, 2, 3, 1).reshape(-1), flat)
    assert_same(noise.weight_eps(SEED, (5, 7)).reshape(-1), noise.standard_normal(SEED, 35))


def test_sample_posterior_is_the_weight_of_the_convolution() -> None:
    loc, rho = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    draws = fb.functional.sample_posterior(loc, rho, seed=SEED, num_samples=3)
    for s in range(3):
        expected = loc + kl.posterior_scale(rho, 2.0**-23) * noise.weight_eps(SEED, loc.shape, s)
        assert_close(draws[s], expected, 1e-6, 1e-6)
    assert_same(
        draws[1:2], fb.functional.sample_posterior(loc, rho, seed=SEED, num_samples=1, sample=1)
    )


@pytest.mark.parametrize("entry", activations.FUSED, ids=lambda entry: entry.name)
def test_activation_derivatives_by_gradcheck(entry: activations.Activation) -> None:
    param = {"leaky_relu": 0.1, "elu": 1.3}.get(entry.name, 0.0)
    # Away from the kinks at 0, 6, +-2.5 and +-3.
    z = torch.linspace(-6.7, 6.9, 27, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: activations.apply(entry.id, t, param), (z,))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)])
def test_float64_gradients_for_every_order_of_strides(order: tuple[int, ...]) -> None:
    x, weight = torch.randn(2, 3, 7, 6).double(), torch.randn(4, 3, 3, 2).double()
    inverse = [order.index(dim) for dim in range(4)]

    def gradients(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        with fb.algorithm("reference"):
            y = fb.functional.bayes_conv2d(x, weight, weight, seed=0)
        return torch.autograd.grad(y.square().sum(), (x, weight))

    expected = gradients(x.clone(), weight.clone())
    image = x.contiguous(memory_format=torch.channels_last)
    strided = weight.permute(order).contiguous().permute(inverse)
    torch.testing.assert_close(gradients(image, strided), expected)
