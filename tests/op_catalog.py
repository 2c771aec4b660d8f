"""Calls of every operator, for opcheck: (operator, name of the sample, args, kwargs)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_samples as samples
import torch
from op_samples import SILU, options, tensors

from fastbconv import estimators, ops

samples.native()
LAYOUTS = {"contiguous": False, "channels_last": True}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _conv_samples() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    for dtype in DTYPES:
        for layout, channels_last in LAYOUTS.items():
            for N in (0, 1, 2):
                name = f"{str(dtype)[6:]}-{layout}-batch{N}"
                yield name, tensors(N, dtype=dtype, channels_last=channels_last), options()
    yield "linear-no-bias", tensors(bias="none"), options(activation=0)
    yield "silu-kept", tensors(prior="trainable"), options(activation=SILU, keep_weight=True)
    yield "samples", tensors(4, bias="point"), options(num_samples=2, save_pre_activation=True)
    yield "shared", tensors(2, prior="tensor"), options(num_samples=3, share_input=True)
    sampled = tensors(bias="point", dtype=torch.bfloat16)
    sampled[1], sampled[2] = sampled[1].detach().bfloat16().requires_grad_(), None
    yield "sampled-weight", sampled, options(weight_kl=False)
    yield "empty-output", tensors(2, H=2, R=5), options(padding=[1, 1, 1, 1])


def _samples() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """(operator, name of the sample, args, kwargs)."""
    for name, args, kwargs in _conv_samples():
        yield "bconv2d", name, tuple(args), kwargs
        backward_args, backward_kwargs = samples.backward_arguments(args, kwargs)
        yield "bconv2d_backward", name, tuple(backward_args), backward_kwargs
    for name, args, kwargs in _affine_samples():
        yield "bconv2d_affine", name, tuple(args), kwargs
        backward_args, backward_kwargs = samples.affine_backward_arguments(args, kwargs)
        yield "bconv2d_affine_backward", name, tuple(backward_args), backward_kwargs
    seed = samples.noise_seed()
    for dtype in (torch.float32, torch.float64):
        loc, rho, *priors = samples.posterior(dtype)
        kwargs = samples.draw_options(num_samples=2)
        yield "sample_posterior", str(dtype), (loc, rho, seed, *priors), kwargs
        kl = {"prior": [0.0, 1.0], "scale_floor": samples.FLOOR}
        yield "kl_normal", str(dtype), (loc, rho, *priors), kl
        flat = [t.detach() for t in (loc, rho, *priors)]
        grad, one = torch.ones(2, *loc.shape, dtype=dtype), torch.ones((), dtype=dtype)
        mask = {"output_mask": [True] * 4}
        rest = {k: v for k, v in kwargs.items() if k not in ("with_kl", "dtype")}
        args = (grad, one, flat[0], flat[1], seed, *flat[2:])
        yield "sample_posterior_backward", str(dtype), args, {**rest, **mask}
        yield "kl_normal_backward", str(dtype), (one, *flat), {**kl, **mask}
        yield from _list_samples(dtype)
    yield "derive_seeds", "plain", (seed, 3, 5), {}
    signs = {"stream": 2, "sample": 1, "element_offset": 3}
    yield "random_signs", "plain", (seed, 37), signs
    yield "standard_normal", "plain", (seed, 37), {"stream": 0, "sample": 1, "element_offset": 3}
    counter, key = torch.arange(12).reshape(3, 4), torch.arange(6).reshape(3, 2)
    yield "philox4x32_10", "plain", (counter, key), {}


def _affine_samples() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    if not ops.has_kernel("bconv2d_affine", "cpu"):  # the library of tests/test_cuda_path.py
        return
    for estimator, kind in ((estimators.FLIPOUT, "flipout"), (estimators.LOCAL, "local")):
        for dtype in DTYPES:
            for layout, channels_last in LAYOUTS.items():
                for N in (0, 2):
                    name = f"{kind}-{str(dtype)[6:]}-{layout}-batch{N}"
                    args = tensors(N, dtype=dtype, channels_last=channels_last)
                    yield name, args, samples.affine_options(estimator)
        # One pixel: two products for Flipout.
        pixel = tensors(2, H=1, W=1, R=1, S=1, bias="none")
        kwargs = samples.affine_options(estimator, activation=0, padding=[0] * 4)
        yield f"{kind}-pixel", pixel, kwargs
        kwargs = samples.affine_options(
            estimator, num_samples=2, save_pre_activation=True, row_offset=3, activation=SILU
        )
        yield f"{kind}-samples", tensors(4, bias="point", prior="trainable"), kwargs
        kwargs = samples.affine_options(estimator, num_samples=3, share_input=True)
        yield f"{kind}-shared", tensors(2, prior="tensor"), kwargs
        yield f"{kind}-empty-output", tensors(2, H=2, R=5), samples.affine_options(estimator)


def _list_samples(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    args, kwargs = samples.posterior_list(dtype)
    yield "sample_posterior_list", str(dtype), args, kwargs
    args, kwargs = samples.list_backward_arguments(args, kwargs)
    yield "sample_posterior_list_backward", str(dtype), args, kwargs


SAMPLES = list(_samples())
