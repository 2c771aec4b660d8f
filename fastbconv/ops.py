"""Typed wrapper, fake and schema of every operator, side by side.

C++ owns schemas, kernels and autograd (``csrc/bindings``). The fakes here tell torch.compile the
shape, strides and dtype of every result, by the same rule as the native allocation. Arguments are
as in the schema; :mod:`fastbconv.functional` is the interface for users.

Shared arguments. ``seed``: int64 (2,), (key, offset). ``prior``: the (loc, scale) that a prior
tensor of None leaves in force, for the weight and then the bias. ``padding``: top, bottom, left,
right. ``element_offset``: noise number of the first weight and bias element. ``offset_add``: added
to the seed's offset. ``algorithm``: 0 auto, 1 direct, 2 winograd2, 3 winograd4, 4 library. Results
that were not asked for are empty tensors of shape (0,). The ``*_backward`` operators are called by
autograd alone and have no wrapper; their fakes quote the schema.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _native, _transforms

_FAKES: dict[str, Callable[..., Any]] = {}
_state: dict[str, bool] = {}
_LOADING = threading.RLock()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the native library can be used. The first call loads it, building it if need be."""
    if "available" not in _state:
        with _LOADING:
            if "available" not in _state:  # else another thread was first
                loaded = _native.load() is not None
                for name, fake in _FAKES.items() if loaded else ():
                    torch.library.register_fake(f"fastbconv::{name}", fake)
                _state["available"] = loaded  # last: who reads it takes no lock
    return _state["available"]


def _op(name: str) -> Any:
    if not available():
        raise RuntimeError(
            f"fastbconv::{name}: expected the native library, got none; see "
            "fastbconv.build_info(), or use fastbconv.algorithm('reference')"
        )
    return getattr(torch.ops.fastbconv, name).default


def _call(name: str, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Any:
    """A differentiable operator, or its Python autograd function inside torch.func transforms."""
    if torch._C._are_functorch_transforms_active():  # a constant to torch.compile
        return _IN_TRANSFORM[name](tensors, options)
    return _op(name)(*tensors, **options)


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers ``_fake_<name>`` when the native library is loaded."""
    _FAKES[function.__name__.removeprefix("_fake_")] = function
    return function


def _empty_unless(wanted: bool, like: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.empty_like(like) if wanted and like is not None else parameter.new_empty((0,))


def _empty_image(shape: Sequence[int], like: Tensor) -> Tensor:
    layout = suggest_memory_format(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _extent(extent: int, pads: int, filter: int, stride: int, dilation: int) -> int:
    return (extent + pads - (filter - 1) * dilation - 1) // stride + 1


def bconv2d(
    input: Tensor,
    weight_loc: Tensor,
    weight_rho: Tensor | None,
    bias_loc: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    bias_prior_loc: Tensor | None,
    bias_prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    weight_kl: bool,
    bias_kl: bool,
    scale_floor: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    activation_param: float,
    num_samples: int,
    share_input: bool,
    offset_add: int,
    element_offset: Sequence[int],
    algorithm: int,
    keep_weight: bool,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Bayesian convolution: output, KL, pre-activation and sampled weight.

    .. code-block:: text

        bconv2d(Tensor input, Tensor weight_loc, Tensor? weight_rho, Tensor? bias_loc,
            Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale,
            Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, float[] prior, bool weight_kl,
            bool bias_kl, float scale_floor, int[] stride, int[] padding, int[] dilation,
            int groups, int activation, float activation_param, int num_samples, bool share_input,
            int offset_add, int[] element_offset, int algorithm, bool keep_weight,
            bool save_pre_activation)
            -> (Tensor output, Tensor kl, Tensor pre_activation, Tensor weight)

    Shape:
        input (N, C, H, W); weight_loc, weight_rho (K, C/groups, R, S); bias_loc, bias_rho (K,);
        output (num_samples * N with share_input, else N, K, P, Q) in the memory format of input;
        kl () in the dtype of the parameters; weight (num_samples, K, C/groups, R, S), KRSC memory.
    Differentiable by input, the parameters and the prior tensors, once, in reverse mode.
    """
    tensors = (input, weight_loc, weight_rho, bias_loc, bias_rho, seed)
    tensors += (prior_loc, prior_scale, bias_prior_loc, bias_prior_scale)
    options = {
        "prior": prior,
        "weight_kl": weight_kl,
        "bias_kl": bias_kl,
        "scale_floor": scale_floor,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "activation_param": activation_param,
        "num_samples": num_samples,
        "share_input": share_input,
        "offset_add": offset_add,
        "element_offset": element_offset,
        "algorithm": algorithm,
        "keep_weight": keep_weight,
        "save_pre_activation": save_pre_activation,
    }
    return _call("bconv2d", tensors, options)


@_fake
def _fake_bconv2d(
    input: Tensor,
    weight_loc: Tensor,
    *parameters: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    num_samples: int,
    share_input: bool,
    keep_weight: bool,
    save_pre_activation: bool,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _one_device(input, weight_loc, *parameters)
    top, bottom, left, right = padding
    rows, _, height, width = input.shape
    filters, channels, filter_h, filter_w = weight_loc.shape
    shape = (
        rows * num_samples if share_input else rows,
        filters,
        _extent(height, top + bottom, filter_h, stride[0], dilation[0]),
        _extent(width, left + right, filter_w, stride[1], dilation[1]),
    )
    output = _empty_image(shape, input)
    kept = input.new_empty((num_samples, filters, filter_h, filter_w, channels))
    return (
        output,
        weight_loc.new_empty(()),
        torch.empty_like(output) if save_pre_activation else input.new_empty((0,)),
        kept.permute(0, 1, 4, 2, 3) if keep_weight else input.new_empty((0,)),
    )


@_fake
def _fake_bconv2d_backward(
    grad_output: Tensor,
    grad_kl: Tensor | None,
    input: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    weight_loc: Tensor,
    weight_rho: Tensor | None,
    bias_loc: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    *priors: Tensor | None,
    output_mask: Sequence[bool],
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of bconv2d by its nine floating-point tensors, those in ``output_mask``.

    .. code-block:: text

        bconv2d_backward(Tensor grad_output, Tensor? grad_kl, Tensor input, Tensor? saved,
            Tensor? weight, Tensor weight_loc, Tensor? weight_rho, Tensor? bias_loc,
            Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale,
            Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, float[] prior, bool weight_kl,
            bool bias_kl, float scale_floor, int[] stride, int[] padding, int[] dilation,
            int groups, int activation, float activation_param, int num_samples, bool share_input,
            int offset_add, int[] element_offset, int algorithm, bool[] output_mask)
            -> (Tensor grad_input, Tensor grad_weight_loc, Tensor grad_weight_rho,
                Tensor grad_bias_loc, Tensor grad_bias_rho, Tensor grad_prior_loc,
                Tensor grad_prior_scale, Tensor grad_bias_prior_loc, Tensor grad_bias_prior_scale)

    ``saved`` is the output, or the pre-activation for silu, mish and gelu; None for linear.
    """
    grad_input = input.new_empty((0,))
    if output_mask[0]:
        grad_input = _empty_image(input.shape, input)
    likes = (weight_loc, weight_rho, bias_loc, bias_rho, *priors)
    return grad_input, *(
        _empty_unless(wanted, like, weight_loc)
        for wanted, like in zip(output_mask[1:], likes, strict=True)
    )


def sample_posterior(
    loc: Tensor,
    rho: Tensor | None,
    seed: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    with_kl: bool,
    scale_floor: float,
    stream: int,
    num_samples: int,
    offset_add: int,
    element_offset: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Draws loc + scale * eps, and the KL.

    .. code-block:: text

        sample_posterior(Tensor loc, Tensor? rho, Tensor seed, Tensor? prior_loc,
            Tensor? prior_scale, *, float[] prior, bool with_kl, float scale_floor, int stream,
            int num_samples, int offset_add, int element_offset, ScalarType? dtype)
            -> (Tensor sample, Tensor kl)

    Shape:
        loc, rho (K, C, *taps) or (K,); sample (num_samples, *loc.shape), contiguous.
    Noise number of element (k, c, tap): (k * taps + tap) * C + c; of element k of a vector: k.
    """
    tensors = (loc, rho, seed, prior_loc, prior_scale)
    options = {
        "prior": prior,
        "with_kl": with_kl,
        "scale_floor": scale_floor,
        "stream": stream,
        "num_samples": num_samples,
        "offset_add": offset_add,
        "element_offset": element_offset,
        "dtype": dtype,
    }
    return _call("sample_posterior", tensors, options)


@_fake
def _fake_sample_posterior(
    loc: Tensor,
    *rest: Tensor | None,
    num_samples: int,
    dtype: torch.dtype | None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    _one_device(loc, *rest)
    return loc.new_empty((num_samples, *loc.shape), dtype=dtype or loc.dtype), loc.new_empty(())


@_fake
def _fake_sample_posterior_backward(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    loc: Tensor,
    rho: Tensor | None,
    seed: Tensor,
    *priors: Tensor | None,
    output_mask: Sequence[bool],
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of sample_posterior by loc, rho and the prior tensors.

    .. code-block:: text

        sample_posterior_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor loc, Tensor? rho,
            Tensor seed, Tensor? prior_loc, Tensor? prior_scale, *, float[] prior,
            float scale_floor, int stream, int num_samples, int offset_add, int element_offset,
            bool[] output_mask)
            -> (Tensor grad_loc, Tensor grad_rho, Tensor grad_prior_loc, Tensor grad_prior_scale)
    """
    likes = (loc, rho, *priors)
    return tuple(_empty_unless(w, like, loc) for w, like in zip(output_mask, likes, strict=True))


def kl_normal(
    loc: Tensor,
    rho: Tensor,
    prior_loc: Tensor | None,
    prior_scale: Tensor | None,
    *,
    prior: Sequence[float],
    scale_floor: float,
) -> Tensor:
    """Sum over elements of KL(N(loc, scale^2) || prior), in nats: 0-dim, in the dtype of loc.

    .. code-block:: text

        kl_normal(Tensor loc, Tensor rho, Tensor? prior_loc, Tensor? prior_scale, *,
            float[] prior, float scale_floor) -> Tensor
    """
    options = {"prior": prior, "scale_floor": scale_floor}
    return _call("kl_normal", (loc, rho, prior_loc, prior_scale), options)


@_fake
def _fake_kl_normal(loc: Tensor, *rest: Tensor | None, **unused: Any) -> Tensor:
    _one_device(loc, *rest)
    return loc.new_empty(())


@_fake
def _fake_kl_normal_backward(
    grad_kl: Tensor, loc: Tensor, *rest: Tensor | None, output_mask: Sequence[bool], **unused: Any
) -> tuple[Tensor, ...]:
    """Gradients of kl_normal by loc, rho and the prior tensors.

    .. code-block:: text

        kl_normal_backward(Tensor grad_kl, Tensor loc, Tensor rho, Tensor? prior_loc,
            Tensor? prior_scale, *, float[] prior, float scale_floor, bool[] output_mask)
            -> (Tensor, Tensor, Tensor, Tensor)
    """
    likes = (loc, *rest)
    return tuple(_empty_unless(w, like, loc) for w, like in zip(output_mask, likes, strict=True))


def standard_normal(
    seed: Tensor, numel: int, *, stream: int, sample: int, element_offset: int
) -> Tensor:
    """float32 draws of elements [element_offset, element_offset + numel): (numel,).

    .. code-block:: text

        standard_normal(Tensor seed, SymInt numel, *, int stream, int sample, int element_offset)
            -> Tensor
    """
    op = _op("standard_normal")
    return op(seed, numel, stream=stream, sample=sample, element_offset=element_offset)


@_fake
def _fake_standard_normal(seed: Tensor, numel: int, **unused: Any) -> Tensor:
    return seed.new_empty((numel,), dtype=torch.float32)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """The generator itself, on int64 tensors that hold uint32: (..., 4), (..., 2) -> (..., 4).

    .. code-block:: text

        philox4x32_10(Tensor counter, Tensor key) -> Tensor
    """
    return _op("philox4x32_10")(counter, key)


@_fake
def _fake_philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    return counter.new_empty(counter.shape)


def _one_device(*tensors: Tensor | None) -> None:
    """Meta tensors among others would give a meta result without a word."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected all on one device, got {', '.join(sorted(devices))}")


def _from_pre_activation(activation: int) -> bool:
    """Whether backward needs the pre-activation and not the output."""
    return _native.load().activations_from_pre_activation()[activation]


_IN_TRANSFORM = _transforms.build(_op, _from_pre_activation)
