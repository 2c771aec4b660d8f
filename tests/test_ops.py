"""The operators as PyTorch sees them: registration, fakes, compile, autocast, torch.func."""

from __future__ import annotations

import inspect
from typing import Any

import op_samples as samples
import pytest
import torch
from op_catalog import SAMPLES
from op_samples import ALGORITHMS, LIBRARY, RELU, SILU, WINOGRAD, WINOGRAD4, options, tensors
from torch import Tensor

import fastbconv as fb
from fastbconv import _fakes, ops, reference

samples.native()
NAMES = sorted(
    name.removeprefix("fastbconv::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastbconv::")
)
LAYOUTS = {"contiguous": False, "channels_last": True}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def op(name: str) -> Any:
    return getattr(torch.ops.fastbconv, name).default


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_complete(name: str) -> None:
    qualified = f"fastbconv::{name}"
    quoted = " ".join((inspect.getsource(ops) + inspect.getsource(_fakes)).split())
    schema = str(op(name)._schema).replace("fastbconv::", "").replace(".default", "")
    # Results without a name print as such; text wrapping may add a blank after a bracket.
    assert schema.replace(" ", "") in quoted.replace(" ", ""), schema
    assert torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None
    for key in ("CPU", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), key
    assert name in {sample[0] for sample in SAMPLES}


def test_names_are_those_of_the_contract() -> None:
    differentiable = [
        "bconv2d",
        "bconv2d_affine",
        "kl_normal",
        "sample_posterior",
        "sample_posterior_list",
    ]
    backward = [f"{name}_backward" for name in differentiable]
    draws = ["derive_seeds", "philox4x32_10", "random_signs", "standard_normal"]
    assert sorted(differentiable + backward + draws) == NAMES


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [pytest.param(s[0], s[2], s[3], id=f"{s[0]}-{s[1]}") for s in SAMPLES],
)
def test_opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.library.opcheck(op(name), args, kwargs)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7), (1, 1, 5, 7), (2, 6, 1, 1), (1, 1, 1, 1), (0, 6, 5, 7)]
)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("filters", [1, 4])
def test_fake_and_native_agree_on_strides(
    algorithm: int, shape: tuple[int, ...], permuted: bool, filters: int
) -> None:
    N, C, H, W = shape
    args = tensors(N, C, H, W, filters, grad=False)
    if permuted:  # an arbitrary view: neither contiguous nor channels_last
        args[0] = args[0].transpose(2, 3).contiguous().transpose(2, 3)
    kwargs = options(
        algorithm=algorithm, keep_weight=True, save_pre_activation=True, activation=SILU
    )
    got = [_layout(t) for t in ops.bconv2d(*args, **kwargs)]
    meta = [None if t is None else t.to("meta") for t in args]
    assert got == [_layout(t) for t in ops.bconv2d(*meta, **kwargs)]
    backward_args, backward_kwargs = samples.backward_arguments(args, kwargs)
    got = [_layout(t) for t in op("bconv2d_backward")(*backward_args, **backward_kwargs)]
    meta = [None if t is None else t.to("meta") for t in backward_args]
    assert got == [_layout(t) for t in op("bconv2d_backward")(*meta, **backward_kwargs)]


def test_meta_among_real_tensors_is_refused() -> None:
    args = tensors(grad=False)
    args[1] = args[1].to("meta")
    with pytest.raises(ValueError, match="expected all on one device, got cpu, meta"):
        ops.bconv2d(*args, **options())


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
@pytest.mark.parametrize("channels_last", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_output_has_the_layout_of_the_input_and_never_of_the_weight(
    algorithm: int, channels_last: bool
) -> None:
    args = tensors(channels_last=channels_last)
    for index in (1, 2):  # parameters in the other layout
        other = torch.contiguous_format if channels_last else torch.channels_last
        args[index] = args[index].detach().contiguous(memory_format=other).requires_grad_()
    output = ops.bconv2d(*args, **options(algorithm=algorithm))[0]
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=wanted)
    output.sum().backward()
    assert args[0].grad.is_contiguous(memory_format=wanted)
    assert args[1].grad.stride() == args[1].stride()
    assert args[2].grad.stride() == args[2].stride()


def test_algorithms_that_cannot_say_why_and_what_can() -> None:
    for name, algorithm in WINOGRAD.items():
        with pytest.raises(NotImplementedError, match=rf"'{name}'.*3x3 filters.*use 'direct' or"):
            ops.bconv2d(*tensors(), **options(algorithm=algorithm, stride=[2, 2]))


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"W": 8}, {"stride": [1, 3]}),  # wrong numbers
        ({"H": 14, "R": 2, "S": 1}, {"padding": [6, 6, 3, 3], "stride": [2, 2]}),  # a crash
    ],
)
def test_library_stays_away_from_wrong_16_bit_convolutions(
    sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    args, kwargs = tensors(**sizes, dtype=torch.bfloat16), options(**changes)
    with pytest.raises(NotImplementedError, match="PyTorch's 16-bit convolution"):
        ops.bconv2d(*args, **{**kwargs, "algorithm": LIBRARY})
    wide = [args[0].detach().float(), *args[1:]]
    expected = ops.bconv2d(*wide, **kwargs)[0]
    torch.testing.assert_close(
        ops.bconv2d(*args, **kwargs)[0].float(), expected, rtol=0.02, atol=0.05
    )


def test_deterministic_algorithms_exclude_the_library() -> None:
    question = {
        "stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1], "groups": 1, "num_samples": 1,
        "share_input": False, "dtype": "float32", "channels_last": False,
    }  # fmt: skip

    def chosen() -> set[str]:
        rows = samples.native().explain_conv([8, 64, 8, 8], [64, 64, 3, 3], **question)
        return {row["algorithm"] for row in rows if row["chosen"]}

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert "library" not in chosen()
        args = tensors(N=2, C=3)
        with (
            fb.algorithm("library"),
            pytest.raises(NotImplementedError, match="got 'library': deterministic algorithms"),
        ):
            fb.functional.bayes_conv2d(args[0], args[1], args[2])
    finally:
        torch.use_deterministic_algorithms(before)


# compile


class _Counter:
    """A backend that counts graphs and runs them through AOTAutograd."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


def _step(x: Tensor, loc: Tensor, rho: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    args = (x, loc, rho, None, None, seed, None, None, None, None)
    output, kl, _, _ = ops.bconv2d(*args, **options(activation=SILU))
    return output, kl


def test_compile_has_the_noise_of_eager_and_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = _Counter()
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=counter)
    for index, N in enumerate((8, 9, 10, 12)):
        seed = torch.tensor([11, index])
        results = []
        for function in (_step, compiled):
            x, loc, rho = tensors(N)[:3]
            output, kl = function(x, loc, rho, seed)
            (output.square().sum() + kl).backward()
            results.append((output, kl, x.grad, loc.grad, rho.grad))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)
        if index == 0:
            first = counter.graphs  # 2: dynamo first tries scale_floor as an input
    assert counter.graphs == first <= 2


def test_the_default_compiler_runs_it_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True)
    args = [*tensors()[:3], samples.noise_seed()]
    assert torch.equal(compiled(*args)[0], _step(*args)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled_autograd_traces_backward() -> None:
    from torch._dynamo import compiled_autograd

    args = [*tensors()[:3], samples.noise_seed()]
    expected = torch.autograd.grad(_step(*args)[0].square().sum(), args[:3])
    output = _step(*args)[0]
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        output.square().sum().backward()
    for argument, grad in zip(args, expected, strict=False):
        assert torch.equal(argument.grad, grad)


@pytest.mark.parametrize("backend", [ops, reference])
def test_no_kl_is_an_empty_tensor(backend: Any) -> None:
    args, keywords = tensors(grad=False), options(weight_kl=False, bias_kl=False)
    assert backend.bconv2d(*args, **keywords)[1].shape == (0,)
    posterior = samples.posterior_list(torch.float32)
    kl = backend.sample_posterior_list(*posterior[0], **posterior[1])[1]
    assert kl.shape == (len(posterior[0][0]),)  # zeros among them
    one = {
        "prior": (0.0, 1.0), "with_kl": False, "scale_floor": 1e-7, "stream": 0,
        "num_samples": 1, "offset_add": 0, "element_offset": 0, "dtype": None,
    }  # fmt: skip
    assert backend.sample_posterior(*args[1:3], args[5], None, None, **one)[1].shape == (0,)
    args[2] = args[4] = None  # a point mass, of which a KL is wanted
    assert backend.bconv2d(*args, **options(weight_kl=True, bias_kl=True))[1].shape == ()


# autocast and torch.func


def test_autocast_casts_the_activation_only() -> None:
    args = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        output, kl, _, weight = ops.bconv2d(*args, **options(keep_weight=True))
    assert (output.dtype, kl.dtype, weight.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    plain = [args[0].detach().bfloat16(), *args[1:]]
    expected, expected_kl, _, _ = ops.bconv2d(*plain, **options())
    assert torch.equal(output, expected)
    assert torch.equal(kl, expected_kl)
    draw = ops.sample_posterior(*args[1:3], args[5], None, None, **samples.draw_options())[0]
    assert torch.equal(weight, draw.bfloat16())  # rounded once, from the float32 weight
    output.float().sum().backward()
    assert [t.grad.dtype for t in args[:5]] == [torch.float32] * 5


def _loss(x: Tensor, loc: Tensor, rho: Tensor, seed: Tensor, activation: int = RELU) -> Tensor:
    args = (x, loc, rho, None, None, seed, None, None, None, None)
    output, kl, _, _ = ops.bconv2d(*args, **options(activation=activation))
    return output.square().sum() + kl


@pytest.mark.parametrize("activation", [0, RELU, SILU])
def test_func_grad_equals_autograd(activation: int) -> None:
    x, loc, rho = tensors()[:3]
    seed = samples.noise_seed()
    expected = torch.autograd.grad(_loss(x, loc, rho, seed, activation), (x, loc, rho))
    detached = [t.detach() for t in (x, loc, rho)]
    got = torch.func.grad(_loss, argnums=(0, 1, 2))(*detached, seed, activation)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_vmap_over_seeds_inputs_and_parameters() -> None:
    x, loc, rho = (t.detach() for t in tensors(2)[:3])
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6]])
    drawn = torch.vmap(lambda seed: _step(x, loc, rho, seed)[0])(seeds)
    assert torch.equal(drawn, torch.stack([_step(x, loc, rho, seed)[0] for seed in seeds]))
    seed = samples.noise_seed()
    per_example = torch.vmap(torch.func.grad(_loss, 1), (0, None, None, None))(
        x[:, None], loc, rho, seed
    )
    expected = torch.stack([torch.func.grad(_loss, 1)(row[None], loc, rho, seed) for row in x])
    assert torch.equal(per_example, expected)
    locs = torch.stack([loc, loc + 1.0])
    outputs = torch.vmap(lambda one: _step(x, one, rho, seed)[0])(locs)
    assert torch.equal(outputs[1], _step(x, loc + 1.0, rho, seed)[0])
    of_all = torch.func.grad(lambda v: torch.vmap(lambda s: _loss(x, v, rho, s))(seeds).sum())(loc)
    one_by_one = sum(torch.func.grad(_loss, 1)(x, loc, rho, seed) for seed in seeds)
    torch.testing.assert_close(of_all, one_by_one)


def test_func_grad_under_autocast() -> None:
    args, keywords = tensors(N=2, C=3, grad=False), options()

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.bconv2d(x, *args[1:], **keywords)[0].float().square().sum()

    leaf = args[0].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(args[0]), leaf.grad)


def test_functional_call() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc, self.rho = (torch.nn.Parameter(t.detach()) for t in tensors()[1:3])

        def forward(self, x: Tensor, seed: Tensor) -> Tensor:
            return _loss(x, self.loc, self.rho, seed)

    layer, x, seed = Layer(), tensors()[0].detach(), samples.noise_seed()
    params = {name: value.detach() for name, value in layer.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x, seed)))(params)
    layer(x, seed).backward()
    assert torch.equal(grads["rho"], layer.rho.grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_providers_agree(dtype: torch.dtype) -> None:
    args = tensors(2, 16, 7, 9, 17, dtype=dtype)
    exact = ops.bconv2d(*_double(args), **options())[0]
    for algorithm in ALGORITHMS.values():
        output = ops.bconv2d(*args, **options(algorithm=algorithm))[0]
        error = (output.double() - exact).abs().max() / exact.abs().max()
        most = 16 if algorithm == WINOGRAD4 else 8  # its constants round
        assert error < most * max(torch.finfo(dtype).eps, 2.0**-23), algorithm


def _double(args: list[Any]) -> list[Any]:
    return [t.detach().double() if t is not None and t.is_floating_point() else t for t in args]


def test_an_image_of_nothing_but_padding() -> None:
    args = tensors(2, 6, 0, 7)
    kwargs = options(padding=[2, 2, 1, 1])
    for algorithm in samples.ANY_SHAPE.values():
        output = ops.bconv2d(*args, **{**kwargs, "algorithm": algorithm})[0]
        assert output.shape == (2, 4, 2, 7)
        assert torch.equal(output, output[:, :, :1, :1].expand_as(output))  # the bias
        output.sum().backward()
