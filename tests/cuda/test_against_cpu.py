"""CUDA against the CPU at the same seed: the same bits of noise, numbers within rounding."""

from __future__ import annotations

from typing import Any

import op_samples as samples
import pytest
import torch
from simt.path_cases import AUTO, DIRECT, PROBLEMS
from torch import Tensor

from fastbconv import ops

samples.native()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Largest difference relative to the largest value. On the GPU float32 products are those of tf32
# (10 bits of fraction) unless that is forbidden; 16-bit results differ by one rounding.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2.0**-6,
    torch.bfloat16: 2.0**-5,
    torch.float16: 2.0**-8,
}


def to_cuda(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [
        t if t is None else t.detach().cuda().requires_grad_(t.requires_grad) for t in arguments
    ]


def assert_near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.stride() == expected.stride(), what
    if expected.numel() == 0:
        return
    got, expected = got.detach(), expected.detach()
    largest = expected.double().abs().max().clamp(min=1e-3)
    error = float((got.cpu().double() - expected.double()).abs().max() / largest)
    assert error <= tolerance, f"{what}: {error:.2e}, at most {tolerance:.2e}"


def assert_same_draws(got: Tensor, expected: Tensor) -> None:
    """The same bits; of float64, whose softplus is the C library's, within rounding."""
    if expected.dtype == torch.float64:
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(got.cpu(), expected)


def run(
    arguments: list[Tensor | None], options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    output, kl, pre, weight = ops.bconv2d(*arguments, **options)
    generator = torch.Generator().manual_seed(1)
    by_output = torch.randn(output.shape, generator=generator).to(output)
    trained = samples.differentiable(arguments)
    grads = torch.autograd.grad([output, kl], trained, [by_output, torch.full_like(kl, 0.01)])
    return [output, kl, pre, weight], list(grads)


def test_a_hundred_million_normals_have_the_same_bits() -> None:
    seed, chunk = samples.noise_seed(), 10_000_000
    for part in range(10):
        place = {"stream": part % 5, "sample": part, "element_offset": part * chunk + part % 4}
        cpu = ops.standard_normal(seed, chunk, **place)
        assert torch.equal(ops.standard_normal(seed.cuda(), chunk, **place).cpu(), cpu), part


def test_generator_and_derived_seeds_have_the_same_bits() -> None:
    counter, key = torch.arange(4000).reshape(-1, 4), torch.arange(2000).reshape(-1, 2)
    assert torch.equal(
        ops.philox4x32_10(counter.cuda(), key.cuda()).cpu(), ops.philox4x32_10(counter, key)
    )
    seed = samples.noise_seed()
    assert torch.equal(ops.derive_seeds(seed.cuda(), 3, 50).cpu(), ops.derive_seeds(seed, 3, 50))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_sampled_weights_have_the_same_bits(dtype: torch.dtype | None) -> None:
    loc, rho = samples.randn(512, 256, 3, 3), samples.randn(512, 256, 3, 3, seed=1) - 3.0
    options = samples.draw_options(dtype=dtype, num_samples=2)
    seed = samples.noise_seed()
    cpu, kl = ops.sample_posterior(loc, rho, seed, None, None, **options)
    cuda, cuda_kl = ops.sample_posterior(loc.cuda(), rho.cuda(), seed.cuda(), None, None, **options)
    assert torch.equal(cuda.cpu(), cpu)
    torch.testing.assert_close(cuda_kl.cpu(), kl, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_list_of_posteriors(dtype: torch.dtype) -> None:
    arguments, options = samples.posterior_list(dtype)
    cuda = tuple(
        [t if t is None else t.detach().cuda().requires_grad_() for t in part]
        if isinstance(part, list)
        else part.cuda()
        for part in arguments
    )
    results = []
    for args in (arguments, cuda):
        drawn, kl = ops.sample_posterior_list(*args, **options)
        trained = [t for part in args if isinstance(part, list) for t in part if t is not None]
        loss = sum(s.to(dtype).square().sum() for s in drawn) + 0.3 * kl.sum()
        results.append((drawn, kl, torch.autograd.grad(loss, trained)))
    for got, expected in zip(results[1][0], results[0][0], strict=True):
        assert_same_draws(got, expected)
    assert_near(results[1][1], results[0][1], 2e-6, "kl")
    for index, (got, expected) in enumerate(zip(results[1][2], results[0][2], strict=True)):
        assert_near(got, expected, 1e-5, f"gradient {index}")


@pytest.mark.parametrize("algorithm", [AUTO, DIRECT], ids=["library", "direct"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_results_and_gradients(problem: str, dtype: torch.dtype, algorithm: int) -> None:
    if algorithm == DIRECT and dtype == torch.float64:
        arguments = to_cuda(samples.tensors(dtype=dtype))
        with pytest.raises(NotImplementedError, match="'direct'"):
            ops.bconv2d(*arguments, **samples.options(algorithm=algorithm))
        return
    sizes, changes = PROBLEMS[problem]
    arguments = samples.tensors(**sizes, dtype=dtype)
    options = samples.options(**changes)
    expected, expected_grads = run(arguments, options)
    options["algorithm"] = algorithm
    got, grads = run(to_cuda(arguments), options)
    assert_same_draws(got[3], expected[3])
    names = ("output", "kl", "pre_activation")
    for name, value, other in zip(names, got, expected, strict=False):
        assert_near(value, other, TOLERANCE[dtype], name)
    for index, (value, other) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_near(value, other, TOLERANCE[dtype], f"gradient {index}")


def test_without_tf32_float32_is_float32_and_direct_says_why_not() -> None:
    torch.backends.cudnn.allow_tf32 = False
    arguments = samples.tensors(2, 16, 9, 9, 24)
    expected, expected_grads = run(arguments, samples.options())
    got, grads = run(to_cuda(arguments), samples.options())
    assert_near(got[0], expected[0], 1e-5, "output")
    for value, other in zip(grads, expected_grads, strict=True):
        assert_near(value, other, 3e-5, "gradient")
    with pytest.raises(NotImplementedError, match="allow_tf32"):
        run(to_cuda(arguments), samples.options(algorithm=DIRECT))


@pytest.mark.parametrize("algorithm", [AUTO, DIRECT], ids=["library", "direct"])
def test_non_contiguous_tensors(algorithm: int) -> None:
    arguments = samples.tensors(2, 8, 9, 10, 12, dtype=torch.bfloat16, grad=False)
    expected = ops.bconv2d(*arguments, **samples.options())[0]
    cuda = to_cuda(arguments)
    cuda[0] = cuda[0].transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.empty(24, 8, 3, 3, device="cuda")
    wide[::2] = cuda[1]
    cuda[1] = wide[::2]
    cuda[2] = cuda[2].contiguous(memory_format=torch.channels_last)
    got = ops.bconv2d(*cuda, **samples.options(algorithm=algorithm))[0]
    assert_near(got.contiguous(), expected.contiguous(), TOLERANCE[torch.bfloat16], "output")
