"""Derivatives of the operators: gradcheck in float64 through every provider, what is refused, and
what backward keeps alive."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import op_samples as samples
import pytest
import torch
from op_samples import ALGORITHMS, ANY_SHAPE, GELU_TANH, RELU, SILU, WINOGRAD, options, tensors
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

import fastbconv as fb
from fastbconv import ops

samples.native()
STRIDES = ([1, 1], [2, 3])
PADDINGS = ([0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 1, 3])
DILATIONS = ([1, 1], [2, 1])
GROUPS = (1, 2)
GEOMETRIES = list(itertools.product(STRIDES, PADDINGS, DILATIONS, GROUPS))
BIASES = ("none", "point", "normal")
DRAWS = ((1, False), (2, False), (2, True))
PRIORS = ("float", "tensor", "trainable")
EPS64 = 2.0**-52


def _output_and_kl(arguments: list[Tensor | None], keywords: dict[str, Any]) -> Any:
    """bconv2d as a function of its differentiable tensors alone."""
    inputs = samples.differentiable(arguments)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(values)
        full = [next(remaining) if t is not None and t.requires_grad else t for t in arguments]
        return ops.bconv2d(*full, **keywords)[:2]

    return function, inputs


@pytest.mark.parametrize("algorithm", ANY_SHAPE.values(), ids=ANY_SHAPE.keys())
@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
def test_gradcheck(geometry: int, algorithm: int) -> None:
    """Every geometry with every pair of bias kind and draws; the prior kinds take turns."""
    torch.set_num_threads(1)  # sums of a dozen numbers
    stride, padding, dilation, groups = GEOMETRIES[geometry]
    for (i, bias), (j, (num_samples, share_input)) in itertools.product(
        enumerate(BIASES), enumerate(DRAWS)
    ):
        prior = PRIORS[(i + j + geometry) % 3]
        arguments = tensors(
            2, 4, 5, 6, 4, 3, 2, groups=groups, dtype=torch.float64, bias=bias, prior=prior,
            channels_last=(i + j) % 2 == 0,
        )  # fmt: skip
        keywords = options(
            scale_floor=EPS64, stride=stride, padding=padding, dilation=dilation, groups=groups,
            num_samples=num_samples, share_input=share_input, algorithm=algorithm,
            activation=0 if i == 0 else 7, keep_weight=j == 1,
        )  # fmt: skip
        function, inputs = _output_and_kl(arguments, keywords)
        assert gradcheck(function, inputs, fast_mode=True), (bias, num_samples, share_input, prior)


@pytest.mark.parametrize("algorithm", WINOGRAD.values(), ids=WINOGRAD)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bias", BIASES)
def test_gradcheck_of_winograd(padding: list[int], bias: str, algorithm: int) -> None:
    torch.set_num_threads(1)
    for (num_samples, share_input), prior in itertools.product(DRAWS, PRIORS):
        arguments = tensors(2, 3, 5, 6, 4, dtype=torch.float64, bias=bias, prior=prior)
        keywords = options(
            scale_floor=EPS64, padding=padding, num_samples=num_samples, activation=7,
            share_input=share_input, algorithm=algorithm, keep_weight=share_input,
        )  # fmt: skip
        function, inputs = _output_and_kl(arguments, keywords)
        assert gradcheck(function, inputs, fast_mode=True), (num_samples, share_input, prior)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
@pytest.mark.parametrize("activation", range(GELU_TANH + 1))
def test_gradcheck_of_every_activation(activation: int, algorithm: int) -> None:
    arguments = tensors(1, 2, 3, 3, 3, dtype=torch.float64)
    keywords = options(
        scale_floor=EPS64, activation=activation, activation_param=0.7, algorithm=algorithm
    )
    function, inputs = _output_and_kl(arguments, keywords)
    # exp reaches 8000, and winograd4 rounds all pixels of a tile by its largest: a smaller step
    # would show that as a gradient of pixels that do not meet.
    assert gradcheck(function, inputs, eps=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_gradcheck_of_sampling_and_kl(prior: str) -> None:
    loc, rho, *priors = samples.posterior(torch.float64)
    if prior == "float":
        priors = [None, None]
    elif prior == "tensor":
        priors = [p.detach() for p in priors]
    seed = samples.noise_seed()
    draw = samples.draw_options(num_samples=2, scale_floor=EPS64)
    inputs = (loc, rho, *priors)
    assert gradcheck(lambda a, b, c, d: ops.sample_posterior(a, b, seed, c, d, **draw), inputs)
    kl = {"prior": [0.3, 0.7], "scale_floor": EPS64}
    assert gradcheck(lambda a, b, c, d: ops.kl_normal(a, b, c, d, **kl), inputs)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 4, 2), (3, 2, 2, 1, 3)])
def test_sampling_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """Element (k, c, tap) has number (k * taps + tap) * C + c; gradients keep their strides."""
    loc = samples.randn(*shape, dtype=torch.float64, seed=2).requires_grad_()
    rho = samples.randn(*shape, dtype=torch.float64, seed=3).requires_grad_()
    seed, draw = samples.noise_seed(), samples.draw_options(num_samples=2, scale_floor=EPS64)
    sample, kl = ops.sample_posterior(loc, rho, seed, None, None, **draw)
    scale = EPS64 + torch.nn.functional.softplus(rho)
    for s in range(2):
        eps = ops.standard_normal(seed, loc.numel(), stream=0, sample=s, element_offset=0)
        order = (shape[0], *shape[2:], shape[1]) if len(shape) > 1 else shape
        eps = eps.double().reshape(order)
        eps = eps.movedim(-1, 1) if len(shape) > 1 else eps
        torch.testing.assert_close(sample[s], loc + scale * eps)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    torch.testing.assert_close(kl, expected)
    function = lambda a, b: ops.sample_posterior(a, b, seed, None, None, **draw)  # noqa: E731
    assert gradcheck(function, (loc, rho))


@pytest.mark.parametrize("algorithm", ANY_SHAPE.values(), ids=ANY_SHAPE.keys())
@pytest.mark.parametrize("sizes", [{"N": 0}, {"H": 2, "R": 5}], ids=["no-rows", "no-pixels"])
def test_work_of_size_zero_still_has_its_kl(algorithm: int, sizes: dict[str, int]) -> None:
    arguments = tensors(**sizes)
    output, kl, _, weight = ops.bconv2d(
        *arguments, **options(algorithm=algorithm, keep_weight=True)
    )
    assert output.numel() == 0
    assert bool(weight.isfinite().all())
    (output.sum() + 2.0 * kl).backward()
    twin = [t.detach().clone().requires_grad_() for t in arguments[1:5]]
    kwargs = {"prior": [0.0, 1.0], "scale_floor": samples.FLOOR}
    expected = sum(ops.kl_normal(*pair, None, None, **kwargs) for pair in (twin[:2], twin[2:]))
    (2.0 * expected).backward()
    torch.testing.assert_close(kl, expected)
    for got, want in zip(arguments[1:5], twin, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    assert not bool(arguments[0].grad.any())


def test_only_the_kl_is_used() -> None:
    arguments = tensors(prior="trainable")
    ops.bconv2d(*arguments, **options())[1].backward()
    assert arguments[0].grad is None
    twin = [
        t.detach().clone().requires_grad_() if t is not None and t.requires_grad else t
        for t in arguments
    ]
    kwargs = {"scale_floor": samples.FLOOR, "prior": [0.0, 1.0]}
    kl = ops.kl_normal(twin[1], twin[2], twin[6], twin[7], **kwargs)
    (kl + ops.kl_normal(twin[3], twin[4], twin[8], twin[9], **kwargs)).backward()
    for index in (1, 2, 3, 4, 6, 7, 8, 9):
        assert torch.equal(arguments[index].grad, twin[index].grad)


def test_only_what_needs_a_gradient_is_computed() -> None:
    full = tensors()
    ops.bconv2d(*full, **options())[0].sum().backward()
    for index in range(5):
        arguments = tensors(grad=False)
        arguments[index].requires_grad_()
        ops.bconv2d(*arguments, **options())[0].sum().backward()
        torch.testing.assert_close(arguments[index].grad, full[index].grad)


def test_two_forwards_before_one_backward() -> None:
    """Each call regenerates its own noise: a layer that kept the last sample would mix them up."""
    arguments = tensors()
    separate = []
    for sample in (0, 1):
        output, _, _, _ = ops.bconv2d(*arguments, **options(offset_add=sample))
        separate.append(torch.autograd.grad(output.square().sum(), arguments[2])[0])
    outputs = [ops.bconv2d(*arguments, **options(offset_add=s))[0] for s in (0, 1)]
    both = torch.autograd.grad(sum(y.square().sum() for y in outputs), arguments[2])[0]
    torch.testing.assert_close(both, separate[0] + separate[1])
    assert not torch.allclose(separate[0], separate[1])


def _calls() -> list[Any]:
    rho, fixed = samples.posterior()[1], tensors(grad=False)
    seed, kl = samples.noise_seed(), {"prior": [0.0, 1.0], "scale_floor": samples.FLOOR}
    return [
        ("bconv2d", lambda w: ops.bconv2d(fixed[0], w, *fixed[2:], **options())[0]),
        (
            "sample_posterior",
            lambda w: ops.sample_posterior(w, rho, seed, None, None, **samples.draw_options())[0],
        ),
        ("kl_normal", lambda w: ops.kl_normal(w, rho, None, None, **kl)),
    ]


@pytest.mark.parametrize(("name", "call"), _calls(), ids=[c[0] for c in _calls()])
def test_double_backward_and_forward_mode_raise(name: str, call: Any) -> None:
    weight = tensors()[1]
    (grad,) = torch.autograd.grad(call(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=f"fastbconv::{name}_backward: .* double backward"
    ):
        grad.sum().backward()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"fastbconv::{name}: .*forward-mode"),
    ):
        call(forward_ad.make_dual(weight.detach(), torch.ones_like(weight)))
    with pytest.raises(NotImplementedError, match=f"fastbconv::{name}: .*forward-mode"):
        torch.func.jvp(call, (weight.detach(),), (torch.ones_like(weight),))
    plain = weight.detach()
    with pytest.raises(
        NotImplementedError, match=f"fastbconv::{name}_backward: .* double backward"
    ):
        torch.func.grad(lambda v: torch.func.grad(lambda w: call(w).square().sum())(v).sum())(plain)


# memory


@pytest.mark.parametrize("algorithm", [0, *ALGORITHMS.values()], ids=["auto", *ALGORITHMS])
@pytest.mark.parametrize("activation", [0, RELU, SILU])
@pytest.mark.parametrize("keep_weight", [False, True])
def test_backward_keeps_input_output_parameters_and_seed(
    algorithm: int, activation: int, keep_weight: bool
) -> None:
    arguments = tensors(4, 8, 6, 6, 16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keywords = options(algorithm=algorithm, activation=activation, keep_weight=keep_weight)
        output = ops.bconv2d(*arguments, **keywords)[0]
    wanted = sum(t.numel() * t.element_size() for t in arguments if t is not None)
    assert arguments[5].numel() * arguments[5].element_size() == 16
    if activation != 0:
        wanted += output.numel() * output.element_size()
    if keep_weight:
        wanted += arguments[1].numel() * 4
    assert sum(kept.values()) == wanted


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_nothing_is_alive_after_backward(algorithm: int) -> None:
    arguments = tensors()
    leaf = arguments[0]
    arguments[0] = leaf * 1.0
    keywords = options(algorithm=algorithm, activation=SILU, keep_weight=True)
    output, kl, _, weight = ops.bconv2d(*arguments, **keywords)
    watched = [weakref.ref(t) for t in (arguments[0], weight, output)]
    (output.sum() + kl).backward()
    arguments[0] = None
    del output, kl, weight, _
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    assert leaf.grad is not None


def test_an_output_changed_in_place_is_noticed() -> None:
    output = ops.bconv2d(*tensors(), **options())[0]
    output.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    linear = ops.bconv2d(*tensors(), **options(activation=0))[0]
    linear.mul_(2.0).sum().backward()


def test_a_compiled_transform_is_the_transform() -> None:
    """torch.compile used to trace the operator itself there, and failed within PyTorch."""
    x, loc = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def loss(loc: torch.Tensor) -> torch.Tensor:
        y, kl = fb.functional.bayes_conv2d(
            x, loc, loc - 3, activation="silu", seed=3, return_kl=True
        )
        return y.square().sum() + kl

    slope = torch.func.grad(loss)
    torch.testing.assert_close(torch.compile(slope, backend="aot_eager")(loc), slope(loc))


def _sample_backward(grad: Tensor) -> tuple[Tensor, ...]:
    loc = torch.linspace(-1, 1, 12).reshape(4, 3)
    return torch.ops.fastbconv.sample_posterior_backward(
        grad, None, loc, loc - 1, torch.tensor([1, 2]), None, None, prior=[0.0, 1.0],
        scale_floor=EPS64, stream=0, num_samples=1, offset_add=0, element_offset=0,
        output_mask=[True, True, False, False],
    )  # fmt: skip


def _list_backward(grad: Tensor) -> tuple[Tensor, ...]:
    loc = torch.linspace(-1, 1, 12).reshape(4, 3)
    return torch.ops.fastbconv.sample_posterior_list_backward(
        [grad[0]], None, [loc], [loc - 1], torch.tensor([[1, 2]]), [None], [None],
        prior=[0.0, 1.0], scale_floor=EPS64, stream=[0], offset_add=0, element_offset=[0],
        output_mask=[True, True, False, False],
    )  # fmt: skip


@pytest.mark.parametrize("backward", [_sample_backward, _list_backward])
def test_dtypes_of_the_gradient_by_a_sample(backward: Any) -> None:
    grad = torch.arange(12.0).reshape(1, 4, 3)  # exact in every dtype
    expected = backward(grad)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for got, want in zip(backward(grad.to(dtype)), expected, strict=True):
            assert torch.equal(got, want)
    for dtype in (torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"grad_sample: expected dtype float32.*got"):
            backward(grad.to(dtype))
