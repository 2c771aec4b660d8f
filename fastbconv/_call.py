"""The one call behind every layer: checked arguments to the operator, or to the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _arguments, _composite, activations, kl, noise, ops, reference, selection
from .kl import NormalPrior, Prior


def run(
    input: Tensor,
    posterior: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    priors: tuple[Prior | None, Prior | None],
    resolved: activations.Resolved,
    source: tuple[int | Tensor | None, torch.Generator | None],
    *,
    num_samples: int,
    share_input: bool,
    return_kl: bool,
    scale_floor: float | None,
    element_offset: tuple[int, int],
    estimator: int,
    row_offset: int,
    **convolution: Any,
) -> tuple[Tensor, Tensor]:
    """Checked arguments -> output and KL, by an operator, the reference or the composite.

    ``convolution``: stride, padding, dilation, groups; with output_padding a transposed one.
    """
    _arguments.integer("num_samples", num_samples, 1)
    row_offset = _arguments.row_offset(row_offset)
    element_offset = _arguments.element_offsets(element_offset)
    if not share_input:
        _arguments.rows(input, num_samples)
    weight, weight_rho, bias, bias_rho = _parameters(input, posterior)
    _arguments.dtypes(input, "weight", weight)
    noisy = weight_rho is not None or (bias is not None and bias_rho is not None)
    seed, offset_add = _seed(source, noisy, input.device)
    floor = floor_of(scale_floor, weight)
    wanted = tuple(
        prior if return_kl and rho is not None else None
        for prior, rho in zip(priors, (weight_rho, bias_rho), strict=True)
    )
    closed = [isinstance(prior, NormalPrior) for prior in wanted]
    weight_numbers, weight_tensors = split_prior(wanted[0], weight, "prior")
    bias_numbers, bias_tensors = split_prior(wanted[1], bias, "bias_prior")
    estimator = estimator if weight_rho is not None else 0  # a point mass has one
    plane = input.ndim == 4 and "output_padding" not in convolution
    operator, options = _operator(input, plane, estimator, row_offset)
    output, total, _, _ = operator(
        input,
        weight,
        weight_rho,
        bias,
        bias_rho,
        seed,
        *weight_tensors,
        *bias_tensors,
        prior=(*weight_numbers, *bias_numbers),
        weight_kl=closed[0],
        bias_kl=closed[1],
        scale_floor=floor,
        activation=resolved.id,
        activation_param=resolved.param,
        num_samples=num_samples,
        share_input=share_input,
        offset_add=offset_add,
        element_offset=element_offset,
        algorithm=selection.ALGORITHM_ID[selection.CHOICE.name],
        save_pre_activation=False,
        **options,
        **convolution,
    )
    if return_kl and not any(closed):
        total = torch.zeros((), dtype=_arguments.wide_dtype(weight.dtype), device=weight.device)
    if wanted[0] is not None and not closed[0]:
        draw = (seed, offset_add, element_offset[0], "weight", num_samples)
        total = total + monte_carlo_kl(wanted[0], weight, weight_rho, floor, draw)
    if wanted[1] is not None and not closed[1]:
        draw = (seed, offset_add, element_offset[1], "bias", num_samples)
        total = total + monte_carlo_kl(wanted[1], bias, bias_rho, floor, draw)
    return output, total


def _operator(
    input: Tensor, plane: bool, estimator: int, row_offset: int
) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]:
    """What computes the call, and the options that only it has.

    One and two dimensions (``plane``) have operators of their own, those of Flipout and local
    reparameterisation on CPUs; everything else, transposed ones too, is composed.
    """
    own = backend(input)
    if plane and not estimator:
        return own.bconv2d, {"keep_weight": selection.CHOICE.keep_weight}
    options = {"estimator": estimator, "row_offset": row_offset}
    if own is reference:
        return _composite.bind(own), options
    has_kernel = plane and ops.has_kernel("bconv2d_affine", input.device.type)
    if has_kernel and selection.CHOICE.name != "library":
        return own.bconv2d_affine, options
    selection.check_composed(input)
    return _composite.bind(own), options


def _parameters(
    input: Tensor, posterior: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
) -> list[Tensor | None]:
    """float32 or float64; a weight without noise stays as it is where products take it so."""
    wide = [None if value is None else _arguments.wide_parameter(value) for value in posterior[1:]]
    weight = posterior[0]
    if posterior[1] is not None or weight.dtype != _arguments.compute_dtype(input):
        weight = _arguments.wide_parameter(weight)
    return [weight, *wide]


def monte_carlo_kl(
    prior: Prior,
    loc: Tensor,
    rho: Tensor,
    scale_floor: float,
    draw: tuple[Tensor, int, int, str, int],
) -> Tensor:
    """Mean over draws of log q(w) - log p(w); the draws are made again from their address.

    Args:
        prior: any prior with a log density.
        loc: posterior mean.
        rho: untransformed scale.
        scale_floor: added to softplus(rho).
        draw: (seed, number of the first draw, first element, stream, number of draws).
    """
    seed, first, element_offset, stream, num_samples = draw
    total = loc.new_zeros(())
    for s in range(num_samples):
        eps = noise.mirror_weight_eps(
            seed,
            loc.shape,
            first + s,
            stream=noise.STREAMS[stream],
            element_offset=element_offset,
        )
        total = total + kl.kl_of_sample(prior, loc, rho, eps.to(loc.dtype), scale_floor)
    return total / num_samples


def backend(tensor: Tensor) -> ModuleType:
    if not selection.use_native(tensor):
        return reference
    return ops


def _seed(
    source: tuple[int | Tensor | None, torch.Generator | None], noisy: bool, device: torch.device
) -> tuple[Tensor, int]:
    """The seed tensor, and what moves the draws of this rank: drawn seeds only."""
    seed, generator = source
    if seed is not None:
        if generator is not None:
            raise ValueError("generator: expected None where a seed is given, got a generator")
        return noise.seed_tensor(seed, device), 0
    if not noisy:  # a point mass reads no noise: leave the generator alone
        return torch.zeros(2, dtype=torch.int64, device=device), 0
    return noise.draw_seed(generator, device), noise.rank_offset()


def floor_of(scale_floor: float | None, loc: Tensor) -> float:
    if scale_floor is None:
        return kl.default_scale_floor(loc.dtype)
    if not scale_floor > 0.0:
        raise ValueError(f"scale_floor: expected a positive number, got {scale_floor}")
    return scale_floor


def split_prior(
    prior: Prior | None, parameter: Tensor | None, name: str
) -> tuple[tuple[float, float], tuple[Tensor | None, Tensor | None]]:
    """A prior as the operators take it: two numbers, and two tensors that replace them."""
    if not isinstance(prior, NormalPrior) or parameter is None:
        return (0.0, 1.0), (None, None)
    numbers, tensors = [], []
    for part, value, default in (("loc", prior.loc, 0.0), ("scale", prior.scale, 1.0)):
        if isinstance(value, Tensor):
            tensors.append(_arguments.prior_tensor(f"{name} {part}", value, parameter))
            if part == "scale":
                _arguments.prior_scale(f"{name} scale", tensors[-1])
            numbers.append(default)
        else:
            tensors.append(None)
            numbers.append(value)
    return tuple(numbers), tuple(tensors)


def reshaped(output: Tensor, shape: Sequence[int]) -> Tensor:
    """An operator's result under another shape.

    Not a view as autograd sees it, for FSDP2 warns of modules that return one. The operator may
    have saved its result for backward: both share a version, so that an in-place function after
    the layer is an error where it would change what was saved, and works where nothing was.
    """
    if torch.compiler.is_compiling():  # in-place functions are made functional
        return torch.ops.aten._unsafe_view.default(output, list(shape))
    if type(output) is Tensor and not torch._C._are_functorch_transforms_active():
        native = ops.native()
        if native is not None:
            return native.reshaped(output, list(shape))
    return output.view(shape)
