"""The functional interface: exact, replayed, by ratio; padding, strides, dtypes, samples."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F

import fastbconv as fb
from fastbconv import activations
from fastbconv.testing import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    assert_close,
    assert_ratio,
    assert_same,
    plain_bconv2d,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
bayes_conv2d = fb.functional.bayes_conv2d


def _gradients(function, leaves: dict[str, torch.Tensor], cotangent: torch.Tensor):
    fresh = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    output = function(fresh)
    output.backward(cotangent.to(output.dtype))
    return {name: value.grad for name, value in fresh.items()}


def _ours(a, **options):
    def run(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        b = type(a)(**{**vars(a), **leaves})
        return cases.call(b, **options)

    return run


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.SMALL)
def test_integers_without_scale_are_exact(name: str, dtype: torch.dtype) -> None:
    problem = cases.parse(name)
    a = problem.arguments(dtype, integer=True)
    a.activation = "relu" if problem.activation == "tanh" else problem.activation
    # Sums stay below 2^24, and the output is rounded once.
    assert_same(cases.call(a), plain_bconv2d(a, torch.float64).to(dtype), name)


@pytest.mark.parametrize("name", cases.SMALL)
def test_integer_gradients_are_exact(name: str) -> None:
    a = cases.parse(name).arguments(torch.float32, integer=True)
    a.activation = "relu"
    leaves = a.leaves()
    exact = plain_bconv2d(a, torch.float64)
    cotangent = torch.randint(-2, 3, exact.shape).double()
    expected = _gradients(lambda t: plain_bconv2d(a, torch.float64, t), leaves, cotangent)
    for key, got in _gradients(_ours(a), leaves, cotangent).items():
        assert_same(got, expected[key].to(got.dtype), f"{name} {key}")


# --- replayed, by ratio ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases.RATIO)
def test_forward_is_as_accurate_as_pytorch(name: str, dtype: torch.dtype) -> None:
    a = cases.parse(name).arguments(dtype)
    exact = plain_bconv2d(a, torch.float64)
    if dtype == torch.float64:  # both are float64: its noise is float32 all the same
        assert_close(cases.call(a), exact, 1e-5, 1e-5, name)
    else:
        assert_ratio(cases.call(a), plain_bconv2d(a, dtype), exact, FORWARD_FACTOR, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cases.RATIO)
def test_gradients_are_as_accurate_as_pytorch(name: str, dtype: torch.dtype) -> None:
    a = cases.parse(name).arguments(dtype)
    a.activation = "linear" if a.activation == "relu" else a.activation  # no kink to flip
    leaves = a.leaves()
    exact = plain_bconv2d(a, torch.float64)
    cotangent = torch.randn(exact.shape, dtype=torch.float64).to(dtype).double()
    wanted = _gradients(lambda t: plain_bconv2d(a, torch.float64, t), leaves, cotangent)
    own = _gradients(lambda t: plain_bconv2d(a, dtype, t), leaves, cotangent)
    for key, got in _gradients(_ours(a), leaves, cotangent).items():
        assert got.dtype == leaves[key].dtype
        assert_ratio(got, own[key], wanted[key], GRADIENT_FACTOR, f"{name} {key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    a = cases.parse(f"n2c8h9w7_k24r3s3_p1_bb_{activation}").arguments(dtype)
    exact = plain_bconv2d(a, torch.float64)
    tolerance = 1e-5 if dtype == torch.float64 else 0.0
    if tolerance:
        assert_close(cases.call(a), exact, tolerance, tolerance)
    else:
        assert_ratio(cases.call(a), plain_bconv2d(a, dtype), exact, FORWARD_FACTOR)
    if dtype == torch.bfloat16:  # a saturated output has lost what its derivative needs
        return
    leaves, cotangent = a.leaves(), torch.ones_like(exact)
    wanted = _gradients(lambda t: plain_bconv2d(a, torch.float64, t), leaves, cotangent)
    own = _gradients(lambda t: plain_bconv2d(a, dtype, t), leaves, cotangent)
    for key, got in _gradients(_ours(a), leaves, cotangent).items():
        if tolerance:
            assert_close(got, wanted[key], 1e-4, 1e-4, key)
        else:
            assert_ratio(got, own[key], wanted[key], GRADIENT_FACTOR, key)


@pytest.mark.parametrize("activation", ["softmax", "log_softmax", torch.sin, torch.nn.PReLU()])
def test_other_activations_run_after_the_operator(activation) -> None:
    a = cases.parse("n2c3h5w5_k6r3s3_p1").arguments()
    z = cases.call(a)
    a.activation = activation
    expected = {
        "softmax": lambda: F.softmax(z, 1),
        "log_softmax": lambda: F.log_softmax(z, 1),
    }.get(activation if isinstance(activation, str) else "", lambda: activation(z))()
    assert_same(cases.call(a), expected)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (None, "linear"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (torch.nn.ReLU(), "relu"),
        (torch.nn.ReLU(inplace=True), "relu"),
        (torch.tanh, "tanh"),
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU("tanh"), "gelu_tanh"),
        (torch.nn.LeakyReLU(0.3), "leaky_relu"),
        (torch.nn.ELU(0.5), "elu"),
        (torch.nn.Hardsigmoid(), "hard_sigmoid"),
        ("swish", "silu"),
    ],
)
def test_what_is_fused(activation, name: str) -> None:
    resolved = activations.resolve(activation)
    assert (resolved.name, resolved.fn) == (name, None)
    z = torch.linspace(-4, 4, 9)
    expected = z if activation is None or isinstance(activation, str) else activation(z.clone())
    if not isinstance(activation, str):
        assert_close(activations.apply(resolved.id, z, resolved.param), expected, 1e-6, 1e-7)


@pytest.mark.parametrize("module", [torch.nn.LeakyReLU(-0.1), torch.nn.ELU(-1.0), torch.nn.PReLU()])
def test_what_is_not_fused(module: torch.nn.Module) -> None:
    assert activations.resolve(module).fn is module


def test_keras_constants() -> None:
    z = torch.linspace(-4, 4, 9)
    slope = activations.resolve("leaky_relu", "keras")
    assert_same(activations.apply(slope.id, z, slope.param), F.leaky_relu(z, 0.2))
    hard = activations.resolve("hard_sigmoid", "keras")
    assert_same(activations.apply(hard.id, z, 0.0), (0.2 * z + 0.5).clamp(0, 1))


# --- padding and extents --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "s", "d", "out", "pads"),
    [
        (7, 3, 2, 1, 4, (1, 1)),
        (8, 3, 2, 1, 4, (0, 1)),
        (7, 2, 1, 1, 7, (0, 1)),
        (8, 3, 3, 1, 3, (0, 1)),
        (7, 2, 3, 1, 3, (0, 1)),
        (10, 1, 3, 1, 4, (0, 0)),
        (10, 2, 1, 3, 10, (1, 2)),
        (1, 5, 2, 1, 1, (2, 2)),
    ],
)
def test_same_is_tensorflows(n: int, k: int, s: int, d: int, out: int, pads) -> None:
    x, w = torch.randn(1, 2, n, n + 1), torch.randn(3, 2, k, k)
    assert fb._arguments.same_padding(n, k, s, d) == pads
    y = bayes_conv2d(x, w, None, stride=s, dilation=d, padding="same")
    assert y.shape[2] == out
    columns = fb._arguments.same_padding(n + 1, k, s, d)
    assert_same(y, bayes_conv2d(x, w, None, stride=s, dilation=d, padding=(pads, columns)))


@pytest.mark.parametrize("padding", [2, (1, 2), "valid", "same", ((1, 1), (0, 0))])
def test_symmetric_padding_is_torchs(padding) -> None:
    x, w = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 5)
    torchs = padding if not isinstance(padding, tuple) or isinstance(padding[0], int) else (1, 0)
    assert_close(
        bayes_conv2d(x, w, None, padding=padding), F.conv2d(x, w, padding=torchs), 1e-5, 1e-5
    )


def test_an_empty_output_is_legal() -> None:
    x = torch.randn(2, 4, 2, 3, requires_grad=True)
    w = torch.randn(5, 4, 3, 2, requires_grad=True)
    y, kl = bayes_conv2d(x, w, w.detach(), seed=1, return_kl=True)
    assert y.shape == (2, 5, 0, 2)
    (y.sum() + 0.0 * kl).backward()
    assert_same(x.grad, torch.zeros_like(x))
    assert_same(w.grad, torch.zeros_like(w))


def test_an_empty_batch_keeps_the_kl() -> None:
    x, w = torch.randn(0, 4, 5, 5), torch.randn(5, 4, 3, 3, requires_grad=True)
    y, kl = bayes_conv2d(x, w, w.detach() - 2, return_kl=True)
    assert y.shape == (0, 5, 3, 3)
    assert_close(kl, fb.functional.kl_normal(w, w.detach() - 2), 1e-6, 0.0)
    kl.backward()
    assert_close(w.grad, w.detach(), 1e-6, 0.0)


def test_an_image_without_batch() -> None:
    x, w = torch.randn(3, 6, 6), torch.randn(4, 3, 3, 3)
    assert_same(bayes_conv2d(x, w, w, seed=1), bayes_conv2d(x[None], w, w, seed=1)[0])


# --- layout ---------------------------------------------------------------------------------------


def _layouts(t: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)
    return [
        t,
        t.contiguous(memory_format=torch.channels_last),
        t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),  # HWIO memory
        t.transpose(2, 3).contiguous().transpose(2, 3),
        wide,
    ]


def test_parameters_of_any_strides_give_the_same_result() -> None:
    x = torch.randn(2, 5, 7, 7)
    weight, rho = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3) - 2
    prior_loc = torch.randn(6, 5, 3, 3)
    results = []
    for w, r, p in zip(*map(_layouts, (weight, rho, prior_loc)), strict=True):
        leaves = [t.detach().requires_grad_() for t in (w, r)]
        y, kl = bayes_conv2d(x, *leaves, padding=1, seed=4, prior=(p, 1.0), return_kl=True)
        (y.square().sum() + kl).backward()
        results.append((y.detach(), kl.detach(), *(leaf.grad for leaf in leaves)))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_close(got, expected, 1e-5, 1e-4)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
def test_output_has_the_memory_format_of_the_input(weight_format, groups: int) -> None:
    weight = torch.randn(4, 6 // groups, 3, 3).contiguous(memory_format=weight_format)
    x = torch.randn(2, 6, 7, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.contiguous(memory_format=layout).detach().requires_grad_()
        y = bayes_conv2d(image, weight, weight, groups=groups, seed=1)
        assert y.is_contiguous(memory_format=layout)
        y.sum().backward()
        assert image.grad.stride() == image.stride()


def test_inputs_of_any_strides() -> None:
    weight = torch.randn(4, 6, 3, 3)
    x = torch.randn(2, 6, 8, 9)
    expected = bayes_conv2d(x, weight, weight, padding=1, seed=1)
    for image in (*_layouts(x), x[:, :, :1].expand(2, 6, 8, 9), x.flip(3)):
        got = bayes_conv2d(image, weight, weight, padding=1, seed=1)
        want = bayes_conv2d(image.contiguous(), weight, weight, padding=1, seed=1)
        assert_close(got, want, 1e-5, 1e-5)
    assert_close(bayes_conv2d(x, weight, weight, padding=1, seed=1), expected, 0, 0)


# --- samples and seeds ----------------------------------------------------------------------------


def test_groups_of_rows_use_consecutive_draws() -> None:
    a = cases.parse("n6c3h7w7_k5r3s3_p1_m3_bb").arguments()
    whole = cases.call(a)
    for s in range(3):
        part = bayes_conv2d(
            a.input[2 * s : 2 * s + 2],
            a.weight,
            a.weight_rho,
            a.bias,
            a.bias_rho,
            padding=1,
            seed=a.seed + torch.tensor([0, s]),
        )
        assert_close(whole[2 * s : 2 * s + 2], part, 1e-6, 1e-6)


def test_share_input_is_the_input_repeated() -> None:
    a = cases.parse("n2c3h7w7_k5r3s3_p1_m3_share_bb").arguments()
    shared = cases.call(a)
    a.input, a.share_input = a.input.repeat(3, 1, 1, 1), False
    assert_close(shared, cases.call(a), 1e-6, 1e-6)


def test_an_int_seed_is_the_key() -> None:
    w = torch.randn(3, 2, 3, 3)
    x = torch.randn(1, 2, 5, 5)
    assert_same(bayes_conv2d(x, w, w, seed=9), bayes_conv2d(x, w, w, seed=torch.tensor([9, 0])))
    high = bayes_conv2d(x, w, w, seed=2**64 - 1)
    assert_same(high, bayes_conv2d(x, w, w, seed=torch.tensor([-1, 0])))


def test_seeds_come_from_the_generators() -> None:
    w = torch.randn(3, 2, 3, 3)
    x = torch.randn(1, 2, 5, 5)
    torch.manual_seed(1)
    first, second = bayes_conv2d(x, w, w), bayes_conv2d(x, w, w)
    torch.manual_seed(1)
    assert_same(bayes_conv2d(x, w, w), first)
    assert not torch.equal(first, second)
    own = [bayes_conv2d(x, w, w, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert_same(*own)


def test_a_point_mass_draws_nothing() -> None:
    state = torch.get_rng_state()
    y = bayes_conv2d(
        torch.randn(1, 2, 5, 5, generator=torch.Generator()), torch.ones(1, 2, 3, 3), None
    )
    assert y.shape == (1, 1, 3, 3)
    assert_same(torch.get_rng_state(), state)


def test_element_offset_is_a_shard() -> None:
    x = torch.randn(2, 3, 6, 6)
    w, b = torch.randn(8, 3, 3, 3), torch.randn(8)
    whole = bayes_conv2d(x, w, w, b, b, seed=2)
    shard = bayes_conv2d(x, w[5:], w[5:], b[5:], b[5:], seed=2, element_offset=(5 * 27, 5))
    assert_close(shard, whole[:, 5:], 1e-5, 1e-5)


# --- algorithms and precision ---------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["auto", "direct", "library", "reference"])
@pytest.mark.parametrize("keep_weight", [False, True])
def test_every_algorithm_computes_the_same(algorithm: str, keep_weight: bool) -> None:
    a = cases.parse("n2c17h9w8_k20r3s3_p1_bb_silu").arguments()
    with fb.algorithm(algorithm, keep_weight=keep_weight):
        output = cases.call(a)
        exact = plain_bconv2d(a, torch.float64)
        cotangent = torch.ones_like(exact)
        got = _gradients(_ours(a), a.leaves(), cotangent)
    assert_close(output, exact, 1e-4, 1e-4)
    wanted = _gradients(lambda t: plain_bconv2d(a, torch.float64, t), a.leaves(), cotangent)
    for key, value in got.items():
        assert_close(value, wanted[key], 1e-3, 1e-3, key)


def test_algorithm_restores_the_former_choice() -> None:
    with fb.algorithm("direct"):
        with pytest.raises(RuntimeError, match="out"), fb.algorithm("reference", keep_weight=True):
            raise RuntimeError("out")
        assert (fb.selection.CHOICE.name, fb.selection.CHOICE.keep_weight) == ("direct", False)
    assert fb.selection.CHOICE.name == "auto"


def test_autocast_casts_the_activation_only() -> None:
    a = cases.parse("n2c8h9w8_k9r3s3_p1").arguments()
    a.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, kl = cases.call(a, return_kl=True)
    assert (y.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert a.weight.grad.dtype == torch.float32
    plain = cases.call(type(a)(**{**vars(a), "input": a.input.bfloat16()}))
    assert_close(y, plain, 1e-2, 1e-2)


def test_low_precision_parameters_are_upcast_with_one_warning() -> None:
    fb._arguments._Warned.low_precision = False
    x = torch.randn(1, 2, 5, 5, dtype=torch.bfloat16)
    w = torch.randn(3, 2, 3, 3).bfloat16().requires_grad_()
    with pytest.warns(UserWarning, match="hardly moves"):
        y, kl = bayes_conv2d(x, w, w, seed=1, return_kl=True)
    assert (y.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    (y.float().sum() + kl).backward()  # and no second warning: warnings are errors here
    assert w.grad.dtype == torch.bfloat16
    bayes_conv2d(x, w, w, seed=1)


def test_double_precision_gradcheck() -> None:
    a = cases.parse("n2c2h3w3_k2r2s2_g2_p1x0x0x1_m2_bb_gelu").arguments(torch.float64)
    names = list(a.leaves())

    def function(*leaves):
        b = type(a)(**{**vars(a), **dict(zip(names, leaves, strict=True))})
        return cases.call(b, return_kl=True, bias_prior=(0.1, 0.7))

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in a.leaves().values()])
