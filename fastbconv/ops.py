"""Typed wrapper and schema of every operator, side by side; fakes are in ``_fakes.py``.

C++ owns schemas, kernels and autograd (``csrc/bindings``). Arguments are as in the schema;
:mod:`fastbconv.functional` is the interface for users.

Shared arguments. ``seed``: int64 (2,), (key, offset). ``prior``: the (loc, scale) that a prior
tensor of None leaves in force, for the weight and then the bias. ``padding``: top, bottom, left,
right. ``element_offset``: noise number of the first weight and bias element. ``offset_add``: added
to the seed's offset. ``algorithm``: 0 auto, 1 direct, 2 winograd2, 3 winograd4, 4 library,
5 winograd2x4. Results that were not asked for are empty tensors of shape (0,). The ``*_backward``
operators are called by autograd alone and have no wrapper; their fakes quote the schema.

On CUDA nothing waits for the device: tensors are read by the kernels alone, so their values are not
checked there (a scale of the prior that is not positive shows as NaN in the KL, as on the CPU).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _fakes, _native, _transforms

_state: dict[str, bool] = {}
_LOADING = threading.RLock()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the native library can be used. The first call loads it, building it if need be."""
    if "available" not in _state:
        with _LOADING:
            if "available" not in _state:  # else another thread was first
                loaded = _native.load() is not None
                for name, fake in _fakes.FAKES.items() if loaded else ():
                    torch.library.register_fake(f"fastbconv::{name}", fake)
                _state["available"] = loaded  # last: who reads it takes no lock
    return _state["available"]


def native() -> ModuleType | None:
    """The native library, for what is no operator; None: it cannot be used."""
    return _native.load() if available() else None


@torch.compiler.assume_constant_result
def cuda() -> bool:
    """Whether the native library has CUDA kernels."""
    if "cuda" not in _state:
        _state["cuda"] = available() and bool(_native.load().build_info().get("cuda"))
    return _state["cuda"]


@torch.compiler.assume_constant_result
def has_kernel(name: str, device: str) -> bool:
    """Whether an operator computes on a kind of device, CPU or CUDA; on meta tensors all do."""
    if device == "meta":
        return available()
    qualified = f"fastbconv::{name}"
    return available() and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper())


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


def _autocast(input: Tensor) -> Tensor:
    """What the operator's autocast kernel makes of its input. An autograd function in Python stands
    above that kernel, and would give backward an input of another dtype than the gradient."""
    device = input.device.type
    if input.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return input
    return input.to(torch.get_autocast_dtype(device))


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

    A weight sampled before is weight_loc in the dtype of the input (16-bit too), weight_rho None.

    Shape:
        input (N, C, H, W); weight_loc, weight_rho (K, C/groups, R, S); bias_loc, bias_rho (K,);
        output (num_samples * N with share_input, else N, K, P, Q) in the memory format of input;
        kl () in the dtype of the parameters, where weight_kl or bias_kl; weight (num_samples, K,
        C/groups, R, S), KRSC memory.
    Differentiable by input, the parameters and the prior tensors, once, in reverse mode.
    """
    if torch._C._are_functorch_transforms_active():
        input = _autocast(input)
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


def bconv2d_affine(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """One convolution by Flipout or local reparameterisation: output, KL, pre-activation, and the
    deviation of local's pre-activation. Arguments as in bconv2d but for four.

    .. code-block:: text

        bconv2d_affine(Tensor input, Tensor weight_loc, Tensor weight_rho, Tensor? bias_loc,
            Tensor? bias_rho, Tensor seed, Tensor? prior_loc, Tensor? prior_scale,
            Tensor? bias_prior_loc, Tensor? bias_prior_scale, *, int estimator, float[] prior,
            bool weight_kl, bool bias_kl, float scale_floor, int[] stride, int[] padding,
            int[] dilation, int groups, int activation, float activation_param, int num_samples,
            bool share_input, int offset_add, int[] element_offset, int row_offset, int algorithm,
            bool save_pre_activation)
            -> (Tensor output, Tensor kl, Tensor pre_activation, Tensor deviation)

    ``estimator``: 1 Flipout, 2 local (``fastbconv.estimators``). ``row_offset``: number of the
    first row of every draw, for signs and local noise. ``algorithm`` 4 is refused.

    Shape:
        deviation (N, K, P, Q) in NHWC memory and the dtype of the parameters for local, else (0,).
    Differentiable by input, the parameters and the prior tensors, once, in reverse mode.
    """
    if torch._C._are_functorch_transforms_active():
        tensors = (_autocast(tensors[0]), *tensors[1:])
    return _call("bconv2d_affine", tensors, options)


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
        loc, rho (K, C, *taps) or (K,); sample (num_samples, *loc.shape), contiguous; kl ().
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


def sample_posterior_list(
    loc: Sequence[Tensor],
    rho: Sequence[Tensor],
    seed: Tensor,
    prior_loc: Sequence[Tensor | None],
    prior_scale: Sequence[Tensor | None],
    *,
    prior: Sequence[float],
    with_kl: Sequence[bool],
    scale_floor: float,
    stream: Sequence[int],
    offset_add: int,
    element_offset: Sequence[int],
    cast: Sequence[bool],
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor]:
    """One draw of each of n posteriors, and their KLs: one launch on CUDA.

    .. code-block:: text

        sample_posterior_list(Tensor[] loc, Tensor[] rho, Tensor seed, Tensor?[] prior_loc,
            Tensor?[] prior_scale, *, float[] prior, bool[] with_kl, float scale_floor,
            int[] stream, int offset_add, int[] element_offset, bool[] cast, ScalarType? dtype)
            -> (Tensor[] sample, Tensor kl)

    Shape:
        seed (n, 2), a row each; prior (2 n,), loc and scale of each; sample[i] as loc[i], in KRSC
        memory for four dimensions, in ``dtype`` where cast[i]; kl (n,), 0 where not with_kl[i].
    """
    options = {
        "prior": prior,
        "with_kl": with_kl,
        "scale_floor": scale_floor,
        "stream": stream,
        "offset_add": offset_add,
        "element_offset": element_offset,
        "cast": cast,
        "dtype": dtype,
    }
    if torch._C._are_functorch_transforms_active():  # a constant to torch.compile
        return _one_by_one(loc, rho, seed, prior_loc, prior_scale, options)
    op = _op("sample_posterior_list")
    return op(loc, rho, seed, prior_loc, prior_scale, **options)


def _one_by_one(
    loc: Sequence[Tensor],
    rho: Sequence[Tensor],
    seed: Tensor,
    prior_loc: Sequence[Tensor | None],
    prior_scale: Sequence[Tensor | None],
    options: dict[str, Any],
) -> tuple[list[Tensor], Tensor]:
    """sample_posterior_list by sample_posterior."""
    samples, kls = [], []
    for i, tensors in enumerate(zip(loc, rho, prior_loc, prior_scale, strict=True)):
        sample, kl = sample_posterior(
            *tensors[:2],
            seed[i],
            *tensors[2:],
            prior=options["prior"][2 * i : 2 * i + 2],
            with_kl=options["with_kl"][i],
            scale_floor=options["scale_floor"],
            stream=options["stream"][i],
            num_samples=1,
            offset_add=options["offset_add"],
            element_offset=options["element_offset"][i],
            dtype=options["dtype"] if options["cast"][i] else None,
        )
        samples.append(_fakes.in_krsc(sample[0]))
        kls.append(kl if options["with_kl"][i] else loc[i].new_zeros(()))
    return samples, torch.stack(kls)


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


def standard_normal(
    seed: Tensor, numel: int, *, stream: int, sample: int, element_offset: int
) -> Tensor:
    """float32 draws of elements [element_offset, element_offset + numel): (numel,).

    .. code-block:: text

        standard_normal(Tensor seed, SymInt numel, *, int stream, int sample,
            SymInt element_offset) -> Tensor
    """
    op = _op("standard_normal")
    return op(seed, numel, stream=stream, sample=sample, element_offset=element_offset)


def random_signs(
    seed: Tensor, numel: int, *, stream: int, sample: int, element_offset: int
) -> Tensor:
    """float32 signs, +1 or -1, of elements [element_offset, element_offset + numel): (numel,).

    .. code-block:: text

        random_signs(Tensor seed, SymInt numel, *, int stream, int sample,
            SymInt element_offset) -> Tensor
    """
    op = _op("random_signs")
    return op(seed, numel, stream=stream, sample=sample, element_offset=element_offset)


def derive_seeds(seed: Tensor, first: int, count: int) -> Tensor:
    """Independent children of a seed: row i is noise.derive(seed, first + i), (count, 2).

    .. code-block:: text

        derive_seeds(Tensor seed, int first, int count) -> Tensor
    """
    return _op("derive_seeds")(seed, first, count)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """The generator itself, on int64 tensors that hold uint32: (..., 4), (..., 2) -> (..., 4).

    .. code-block:: text

        philox4x32_10(Tensor counter, Tensor key) -> Tensor
    """
    return _op("philox4x32_10")(counter, key)


def _from_pre_activation(activation: int) -> bool:
    """Whether backward needs the pre-activation and not the output."""
    return _native.load().activations_from_pre_activation()[activation]


_IN_TRANSFORM = _transforms.build(_op, _from_pre_activation)
