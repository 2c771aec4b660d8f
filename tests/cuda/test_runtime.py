"""Streams, graphs, autocast, determinism and devices: what only a GPU can show."""

from __future__ import annotations

from typing import Any

import op_samples as samples
import pytest
import torch
from simt.path_cases import AUTO, DIRECT
from torch import Tensor

import fastbconv as fb
from fastbconv import ops

samples.native()
ALGORITHMS = pytest.mark.parametrize("algorithm", [AUTO, DIRECT], ids=["library", "direct"])


def problem(
    dtype: torch.dtype = torch.bfloat16, grad: bool = True, N: int = 8, C: int = 32, K: int = 48
) -> list[Tensor | None]:
    arguments = samples.tensors(N, C, 14, 14, K, dtype=dtype, channels_last=True)
    return [
        t if t is None else t.detach().cuda().requires_grad_(grad and t.requires_grad)
        for t in arguments
    ]


def step(arguments: list[Tensor | None], options: dict[str, Any]) -> list[Tensor]:
    output, kl, _, _ = ops.bconv2d(*arguments, **options)
    loss = output.float().square().sum() + 0.1 * kl
    return [
        output.detach(),
        kl.detach(),
        *torch.autograd.grad(loss, samples.differentiable(arguments)),
    ]


@ALGORITHMS
@pytest.mark.parametrize("num_samples", [1, 8])
def test_two_runs_are_bitwise_equal(algorithm: int, num_samples: int) -> None:
    torch.backends.cudnn.deterministic = True
    options = samples.options(algorithm=algorithm, num_samples=num_samples)
    arguments = problem()
    first = step(arguments, options)
    for _ in range(3):
        for a, b in zip(step(arguments, options), first, strict=True):
            assert torch.equal(a, b)


@ALGORITHMS
def test_nothing_waits_for_the_device(algorithm: int) -> None:
    arguments = problem()
    options = samples.options(algorithm=algorithm)
    step(arguments, options)  # cuDNN's own set-up may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(arguments, options)
        loc, rho, seed = arguments[1], arguments[2], arguments[5]
        drawn, kl = ops.sample_posterior(
            loc, rho, seed, None, None, **samples.draw_options(num_samples=2)
        )
        (drawn.sum() + kl).backward()
        ops.derive_seeds(seed, 0, 4)
        ops.standard_normal(seed, 100, stream=0, sample=0, element_offset=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ALGORITHMS
def test_a_captured_step_replays_with_fresh_noise(algorithm: int) -> None:
    arguments = problem()
    options = samples.options(algorithm=algorithm, weight_kl=True)
    seed, one = arguments[5], torch.tensor([1, 0], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(arguments, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed.add_(one)
        results = step(arguments, options)
    outputs = []
    for _ in range(4):
        graph.replay()
        outputs.append(results[0].clone())
        replayed = [r.clone() for r in results]
        for a, b in zip(step(arguments, options), replayed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert torch.equal(step(arguments, options)[0], replayed[0])
    assert len({float(output.float().sum()) for output in outputs}) == 4


def test_a_layer_draws_its_seed_inside_a_graph() -> None:
    layer = fb.BayesConv2d(16, 16, 3, padding=1, device="cuda")
    x = torch.randn(4, 16, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_autocast() -> None:
    arguments = problem(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        output, kl, _, weight = ops.bconv2d(*arguments, **samples.options(keep_weight=True))
    assert (output.dtype, kl.dtype, weight.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    plain = [arguments[0].detach().bfloat16(), *arguments[1:]]
    assert torch.equal(output, ops.bconv2d(*plain, **samples.options(keep_weight=True))[0])
    output.float().sum().backward()
    assert [t.grad.dtype for t in arguments[:5]] == [torch.float32] * 5


@ALGORITHMS
def test_other_streams(algorithm: int) -> None:
    arguments, options = problem(), samples.options(algorithm=algorithm)
    expected = step(arguments, options)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append([step(arguments, options) for _ in range(5)])
    torch.cuda.synchronize()
    for runs in results:
        for run in runs:
            assert torch.equal(run[0], expected[0])
            assert torch.equal(run[1], expected[1])


def test_stress_of_the_blocks_that_wait_for_one_another() -> None:
    """Many launches, several streams at once, other work in between: equal bits, no hang."""
    options = samples.options(algorithm=DIRECT)
    cases = [problem(N=n, C=c, K=k) for n, c, k in ((2, 64, 64), (8, 16, 128), (32, 64, 32))]
    expected = [ops.bconv2d(*case, **options)[0] for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    burden = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    differing = []
    with torch.no_grad():
        for _ in range(200):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if index == 3:
                        burden @ burden
                    else:
                        got = ops.bconv2d(*cases[index], **options)[0]
                        differing.append((got != expected[index]).any())
    torch.cuda.synchronize()
    assert not any(bool(flag) for flag in differing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_relu_inside_cudnn_and_ours_agree(dtype: torch.dtype, groups: int) -> None:
    arguments = samples.tensors(4, 32, 9, 9, 48, groups=groups, dtype=dtype, channels_last=True)
    arguments = [t if t is None else t.detach().cuda() for t in arguments]
    options = samples.options(groups=groups)  # relu
    inside = ops.bconv2d(*arguments, **options)[0]
    ours = ops.bconv2d(*arguments, **{**options, "save_pre_activation": True})[0]
    assert inside.stride() == ours.stride()
    error = (inside.float() - ours.float()).abs().max() / ours.float().abs().max()
    assert float(error) < max(2.0**-9, 4 * torch.finfo(dtype).eps)


def test_library_and_direct_agree() -> None:
    for num_samples, share_input in ((1, False), (4, False), (3, True)):
        options = samples.options(
            num_samples=num_samples, share_input=share_input, activation=samples.SILU
        )
        by_library = step(problem(), options)
        by_direct = step(problem(), {**options, "algorithm": DIRECT})
        for a, b in zip(by_direct, by_library, strict=True):
            largest = b.float().abs().max()
            assert float((a.float() - b.float()).abs().max() / largest) < 2.0**-5


def test_deterministic_algorithms_are_allowed() -> None:
    torch.use_deterministic_algorithms(True)
    options = samples.options()
    arguments = problem()
    first, second = step(arguments, options), step(arguments, options)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with fb.algorithm("library"):  # refused on a CPU alone
        fb.functional.bayes_conv2d(*arguments[:3]).sum().backward()


@pytest.mark.parametrize("device", range(1, torch.cuda.device_count()))
def test_the_device_of_the_tensors_counts(device: int) -> None:
    arguments = [t if t is None else t.detach().to(f"cuda:{device}") for t in problem()]
    output = ops.bconv2d(*arguments, **samples.options())[0]
    assert output.device.index == device
    assert torch.equal(output.cpu(), ops.bconv2d(*problem(), **samples.options())[0].cpu())


def test_tensors_on_two_devices_are_refused() -> None:
    arguments = problem(grad=False)
    arguments[1] = arguments[1].cpu()
    with pytest.raises(ValueError, match="weight_loc: expected a tensor on cuda:0"):
        ops.bconv2d(*arguments, **samples.options())
    arguments = problem(grad=False)
    arguments[5] = arguments[5].cpu()
    with pytest.raises(ValueError, match="seed: expected a tensor on cuda:0"):
        ops.bconv2d(*arguments, **samples.options())


def test_grouped_layers_replay_in_a_graph() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        fb.BayesConv2d(8, 16, 3, padding=1), fb.BayesConv2d(16, 8, 3, padding=1)
    ).cuda()
    x = torch.randn(4, 8, 12, 12, device="cuda")

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16), fb.grouped(model):
            return model(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = forward()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def grouped_pair() -> tuple[torch.nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(fb.BayesConv2d(8, 8, 3), fb.BayesConv2d(8, 8, 3)).cuda()
    return model, torch.randn(4, 8, 12, 12, device="cuda")


def test_a_grouped_layer_on_another_stream_draws_for_itself() -> None:
    model, x = grouped_pair()
    side = torch.cuda.Stream()
    other = x.clone()
    side.wait_stream(torch.cuda.current_stream())
    with fb.grouped(model, seed=1), torch.no_grad():
        model[0](x)  # draws for both, on this stream
        with torch.cuda.stream(side):
            got = model[1](other)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, model[1](other, seed=fb.noise.derive(1, 1)))


def test_a_graph_does_not_read_what_was_drawn_before_it() -> None:
    model, x = grouped_pair()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side), fb.grouped(model):
            model(x)
        graph = torch.cuda.CUDAGraph()
        with fb.grouped(model):
            with torch.cuda.stream(side):
                model[0](x)  # leaves a weight of the second layer
            with torch.cuda.graph(graph, stream=side):
                y = model[1](x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_gradients_of_other_dtypes_are_read_as_what_they_are() -> None:
    loc, seed = torch.linspace(-1, 1, 12, device="cuda").reshape(4, 3), problem()[5]
    options = samples.draw_options(num_samples=1)
    rest = {name: value for name, value in options.items() if name not in ("with_kl", "dtype")}

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops.fastbconv.sample_posterior_backward
        mask = [True, True, False, False]
        return op(grad, None, loc, loc - 1, seed, None, None, **rest, output_mask=mask)

    grad = torch.arange(12.0, device="cuda").reshape(1, 4, 3)
    for got, want in zip(backward(grad.double()), backward(grad), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match="grad_sample: expected dtype"):
        backward(grad.to(torch.int8))
