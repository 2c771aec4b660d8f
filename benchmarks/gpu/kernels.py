"""Stage 4: kernels alone, cold caches: sampling, its gradients, epilogues, convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbconv as fb

from . import clock as clocks
from .expected import PREDICTED, compare, conv_seconds
from .facts import ceilings
from .shapes import LAYERS, RESNET18, RESNET50, TINY_LAYERS, Layer
from .stage import Bench, Item, NotAvailable, outcome

SAMPLE_BYTES = 10  # loc and rho read in float32, the weight written in bfloat16
BACKWARD_BYTES = 18  # a bfloat16 gradient, loc and rho read, two float32 gradients written
FLOOR = 2.0**-23
DETERMINISTIC = ("det", "cudnn-relu")  # convolution then relu; both in one call of cuDNN
Shape = tuple[int, ...]
SINGLE = {"1M": (512, 228, 3, 3), "11M": (1024, 1216, 3, 3), "25M": (2048, 1360, 3, 3)}


def operator(name: str) -> Callable[..., Any]:
    """An operator of the native library."""
    fb.build_info()  # loads it
    try:
        return getattr(torch.ops.fastbconv, name).default
    except AttributeError:
        raise NotAvailable(f"there is no operator fastbconv::{name}") from None


def _replays(bench: Bench) -> int:
    return 2 if bench.dry else 50


def _posterior(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    loc = torch.randn(shape, device=device) * 0.1
    rho = torch.randn(shape, device=device) * 0.3 - 3.0
    return _krsc(loc), _krsc(rho)


def _krsc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _with_rates(
    bench: Bench, key: str, found: dict[str, Any], moved: float, flop: float = 0.0
) -> dict[str, Any]:
    """Rates, shares of the measured ceilings, and the prediction."""
    seconds, ceiling = found["seconds"]["median"], ceilings(bench)
    found.update(bytes=moved, bytes_per_second=moved / seconds)
    if ceiling["bytes"]:
        found["of copy"] = moved / seconds / ceiling["bytes"]
    if flop:
        found.update(flop=flop, flop_per_second=flop / seconds)
        if ceiling["flop"]:
            found["of matmul"] = flop / seconds / ceiling["flop"]
    if bench.dry:
        return found | bench.instead(f"{moved:.0f} bytes, called, not captured")
    return found | compare(PREDICTED.get(key), seconds)


def _shapes(bench: Bench, which: str | Sequence[Shape]) -> list[Shape]:
    shapes = [SINGLE[which]] if isinstance(which, str) else list(which)
    return [(4, 3, 3, 3)] * min(len(shapes), 3) if bench.dry else shapes


def _list_options(shapes: Sequence[Shape]) -> dict[str, Any]:
    count = len(shapes)
    return {
        "prior": [0.0, 1.0] * count,
        "scale_floor": FLOOR,
        "stream": [0] * count,
        "offset_add": 0,
        "element_offset": [0] * count,
    }


def _single_options() -> dict[str, Any]:
    options = {"prior": [0.0, 1.0], "scale_floor": FLOOR, "stream": 0, "num_samples": 1}
    return {**options, "offset_add": 0, "element_offset": 0}


def _copies(bench: Bench, bytes_per_call: float) -> range:
    return range(2 if bench.dry else clocks.copies(bytes_per_call))


def sample(bench: Bench, key: str, which: str | Sequence[Shape]) -> dict[str, Any]:
    """Weights and KL from loc and rho: of one tensor, or of a list in one call."""
    bench.need_ours()
    single = isinstance(which, str)
    op = operator("sample_posterior" if single else "sample_posterior_list")
    shapes = _shapes(bench, which)
    moved = SAMPLE_BYTES * sum(map(math.prod, shapes))
    calls = []
    for number in _copies(bench, moved):
        pairs = [_posterior(shape, bench.device) for shape in shapes]
        seed = torch.tensor([[number, 0]] * len(pairs), device=bench.device)
        if single:
            options = {**_single_options(), "with_kl": True, "dtype": torch.bfloat16}
            calls.append(partial(op, *pairs[0], seed[0], None, None, **options))
        else:
            each = [True] * len(pairs)
            options = {"with_kl": each, "cast": each, "dtype": torch.bfloat16}
            options = {**_list_options(shapes), **options}
            loc, rho = map(list, zip(*pairs, strict=True))
            nothing = [None] * len(pairs)
            calls.append(partial(op, loc, rho, seed, nothing, nothing, **options))
    with torch.no_grad():
        found = clocks.sweep(bench.clock, calls, _replays(bench))
    return _with_rates(bench, f"kernels/{key}", {"weights": moved // SAMPLE_BYTES, **found}, moved)


def backward(bench: Bench, key: str, which: str | Sequence[Shape]) -> dict[str, Any]:
    """Gradients of loc and rho from the weight's, with the KL's."""
    bench.need_ours()
    single = isinstance(which, str)
    op = operator("sample_posterior_backward" if single else "sample_posterior_list_backward")
    shapes = _shapes(bench, which)
    moved = BACKWARD_BYTES * sum(map(math.prod, shapes))
    calls = []
    for number in _copies(bench, moved):
        pairs = [_posterior(shape, bench.device) for shape in shapes]
        grads = [_krsc(torch.randn_like(loc).bfloat16()) for loc, _ in pairs]
        seed = torch.tensor([[number, 0]] * len(pairs), device=bench.device)
        grad_kl = torch.full((len(pairs),), 1e-5, device=bench.device)
        if single:
            tensors = (grads[0][None], grad_kl[0], *pairs[0], seed[0], None, None)
            options = {**_single_options(), "output_mask": [True, True, False, False]}
        else:
            loc, rho = map(list, zip(*pairs, strict=True))
            nothing, count = [None] * len(pairs), len(pairs)
            tensors = (grads, grad_kl, loc, rho, seed, nothing, nothing)
            mask = [True] * (2 * count) + [False] * (2 * count)
            options = {**_list_options(shapes), "output_mask": mask}
        calls.append(partial(op, *tensors, **options))
    with torch.no_grad():
        found = clocks.sweep(bench.clock, calls, _replays(bench))
    weights = moved // BACKWARD_BYTES
    return _with_rates(bench, f"kernels/{key}", {"weights": weights, **found}, moved)


def _image(bench: Bench, layer: Layer) -> Tensor:
    image = torch.randn(layer.N, layer.C, layer.H, layer.H, device=bench.device)
    return image.bfloat16().contiguous(memory_format=torch.channels_last)


def _conv_options(layer: Layer) -> dict[str, Any]:
    return {
        "stride": [layer.stride] * 2,
        "padding": [layer.padding] * 4,
        "dilation": [1, 1],
        "groups": 1,
    }


def bias_gradient(bench: Bench, layer: Layer) -> dict[str, Any]:
    """The gradient by the bias alone, through relu: reads gradient and output, writes a sum.

    The launch also writes the gradient by the pre-activation where others need it (2 B more).
    """
    bench.need_ours()
    op = operator("bconv2d_backward")
    moved = 4 * layer.pixels * layer.K
    calls = []
    from fastbconv import activations

    for _ in _copies(bench, moved):
        image = _image(bench, layer)
        loc = _krsc(torch.randn(layer.K, layer.C, layer.k, layer.k, device=bench.device))
        bias = torch.zeros(layer.K, device=bench.device)
        output = torch.randn(layer.N, layer.K, layer.P, layer.P, device=bench.device)
        output = output.bfloat16().contiguous(memory_format=torch.channels_last)
        tensors = (torch.randn_like(output), None, image, output.relu_(), None, loc, None, bias)
        seed = torch.zeros(2, dtype=torch.int64, device=bench.device)
        tensors += (None, seed, None, None, None, None)
        relu = activations.resolve("relu")
        options = {**_conv_options(layer), "prior": [0.0, 1.0, 0.0, 1.0], "scale_floor": FLOOR}
        options |= {"weight_kl": False, "bias_kl": False, "num_samples": 1, "share_input": False}
        options |= {"activation": relu.id, "activation_param": relu.param, "offset_add": 0}
        options |= {"element_offset": [0, 0], "algorithm": 0}
        options["output_mask"] = [number == 3 for number in range(9)]  # bias_loc alone
        calls.append(partial(op, *tensors, **options))
    with torch.no_grad():
        found = clocks.sweep(bench.clock, calls, _replays(bench))
    return _with_rates(bench, "", found, moved)


def _conv_call(
    layer: Layer, variant: str, image: Tensor, pair: tuple[Tensor, Tensor], bias: Tensor
) -> Callable[[], object]:
    if variant in DETERMINISTIC:
        weight, bias = pair[0].bfloat16(), bias.bfloat16()
        if variant == "cudnn-relu":
            if not image.is_cuda:
                raise NotAvailable("cuDNN needs a GPU")
            steps = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], 1)
            return lambda: torch.cudnn_convolution_relu(image, weight, bias, *steps)
        return lambda: F.relu_(F.conv2d(image, weight, bias, layer.stride, layer.padding))
    seed = torch.zeros(2, dtype=torch.int64, device=image.device)
    options = {"stride": layer.stride, "padding": layer.padding, "activation": "relu"}

    def call() -> object:
        with fb.algorithm(variant):
            return fb.functional.bayes_conv2d(
                image, *pair, bias, seed=seed, return_kl=True, **options
            )

    return call


def _one_variant(bench: Bench, layer: Layer, variant: str) -> dict[str, Any]:
    if variant not in DETERMINISTIC:
        bench.need_ours()
    calls = []
    moved = layer.image_bytes + layer.weights * (2 if variant in DETERMINISTIC else 8)
    shape = (layer.K, layer.C, layer.k, layer.k)
    for _ in _copies(bench, moved):
        pair = _posterior(shape, bench.device)
        bias = torch.randn(layer.K, device=bench.device)
        calls.append(_conv_call(layer, variant, _image(bench, layer), pair, bias))
    with torch.no_grad(), bench.part(variant, 25.0):
        found = clocks.sweep(bench.clock, calls, _replays(bench))
    found = _with_rates(bench, "", found, moved, layer.flop)
    if not bench.dry:
        found |= compare(conv_seconds(layer, variant), found["seconds"]["median"])
    return found


def convolution(bench: Bench, layer: Layer) -> dict[str, Any]:
    """One layer forward, with bias and relu: cuDNN in two launches or one; ours, with the KL."""
    rows = {}
    for variant in (*DETERMINISTIC, "auto", "direct"):
        rows[variant] = outcome(bench, partial(_one_variant, bench, layer, variant))
    found = {"pixels": layer.pixels, "weights": layer.weights, "variants": rows}
    found |= bench.instead("a tiny layer, called, not captured")
    times = {name: row["seconds"]["median"] for name, row in rows.items() if "seconds" in row}
    if "auto" in times and "direct" in times:
        found["direct speed"] = times["auto"] / times["direct"]
    return found


def items(bench: Bench) -> list[Item]:
    """Stage 4."""
    listed = []
    for name, call in (("sample", sample), ("backward", backward)):
        models = {"list resnet18": RESNET18, "list resnet50": RESNET50}
        for size, which in {**{size: size for size in SINGLE}, **models}.items():
            key = f"{name} {size}"
            listed.append(Item(key, partial(call, key=key, which=which)))
    layers = TINY_LAYERS if bench.dry else LAYERS[:8] if bench.quick else LAYERS
    for layer in layers[:5]:
        listed.append(Item(f"bias gradient {layer.name}", partial(bias_gradient, layer=layer)))
    for layer in layers:
        listed.append(Item(f"conv {layer.name}", partial(convolution, layer=layer), limit=90.0))
    return listed
