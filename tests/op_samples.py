"""Arguments of the operators, for the tests that call torch.ops.fastbconv directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbconv import ops

DIRECT, WINOGRAD2, WINOGRAD4, LIBRARY, WINOGRAD2X4 = 1, 2, 3, 4, 5
WINOGRAD = {"winograd2": WINOGRAD2, "winograd2x4": WINOGRAD2X4, "winograd4": WINOGRAD4}
ALGORITHMS = {"direct": DIRECT, **WINOGRAD, "library": LIBRARY}
ANY_SHAPE = {name: ALGORITHMS[name] for name in ("direct", "library")}
FLOOR = 2.0**-23
RELU, SILU, GELU_TANH = 1, 13, 16


def native() -> Any:
    """The loaded native module; the operators are registered from here on."""
    assert ops.available(), "these tests need the native library"
    from fastbconv import _native

    return _native.load()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype)


def noise_seed() -> Tensor:
    return torch.tensor([0x243F6A8885A308D3, 7], dtype=torch.int64)


def options(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of bconv2d: a 3 x 3 filter with padding 1 and relu."""
    defaults: dict[str, Any] = {
        "prior": [0.0, 1.0, 0.0, 1.0],
        "weight_kl": True,
        "bias_kl": True,
        "scale_floor": FLOOR,
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "activation": RELU,
        "activation_param": 0.0,
        "num_samples": 1,
        "share_input": False,
        "offset_add": 0,
        "element_offset": [0, 0],
        "algorithm": 0,
        "keep_weight": False,
        "save_pre_activation": False,
    }
    assert changes.keys() <= defaults.keys()
    return {**defaults, **changes}


def tensors(
    N: int = 2,
    C: int = 6,
    H: int = 5,
    W: int = 7,
    K: int = 4,
    R: int = 3,
    S: int = 3,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: str = "normal",
    prior: str = "float",
    channels_last: bool = False,
    grad: bool = True,
) -> list[Tensor | None]:
    """The ten tensors of bconv2d. bias: none, point, normal; prior: float, tensor, trainable."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    image = randn(N, C, H, W, dtype=dtype, seed=1)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    shape = (K, C // groups, R, S)
    loc, rho = 0.3 * randn(*shape, dtype=wide, seed=2), randn(*shape, dtype=wide, seed=3) - 1.0
    bias_loc = None if bias == "none" else randn(K, dtype=wide, seed=4)
    bias_rho = randn(K, dtype=wide, seed=5) - 1.0 if bias == "normal" else None
    priors: list[Tensor | None] = [None] * 4
    if prior != "float":
        priors = [
            randn(K, 1, R, S, dtype=wide, seed=6),
            randn(1, dtype=wide, seed=7).abs() + 0.5,
            randn(K, dtype=wide, seed=8) if bias == "normal" else None,
            randn(1, dtype=wide, seed=9).abs() + 0.5 if bias == "normal" else None,
        ]
    trained = [image, loc, rho, bias_loc, bias_rho, *(priors if prior == "trainable" else [])]
    for tensor in trained:
        if tensor is not None:
            tensor.requires_grad_(grad)
    return [image, loc, rho, bias_loc, bias_rho, noise_seed(), *priors]


def differentiable(arguments: list[Tensor | None]) -> list[Tensor]:
    return [t for t in arguments if t is not None and t.requires_grad]


def backward_arguments(
    arguments: list[Tensor | None], keywords: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of bconv2d_backward for the forward call given."""
    with torch.no_grad():
        output, _, pre, weight = ops.bconv2d(
            *arguments, **{**keywords, "save_pre_activation": True}
        )
    linear, from_pre = keywords["activation"] == 0, keywords["activation"] >= SILU
    saved = None if linear else (pre if from_pre else output)
    kept = weight if keywords["keep_weight"] else None
    rest = [t if t is None else t.detach() for t in arguments]
    dropped = ("keep_weight", "save_pre_activation")
    keywords = {name: value for name, value in keywords.items() if name not in dropped}
    mask = [rest[i] is not None for i in (0, 1, 2, 3, 4, 6, 7, 8, 9)]
    grads = [torch.ones_like(output), torch.tensor(0.5, dtype=rest[1].dtype)]
    positional = [*grads, rest[0], saved, kept, *rest[1:]]
    return positional, {**keywords, "output_mask": mask}


def affine_options(estimator: int, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of bconv2d_affine: FLIPOUT or LOCAL of fastbconv.estimators."""
    own = {"row_offset": changes.pop("row_offset", 0), "estimator": estimator}
    shared = options(**changes)
    del shared["keep_weight"]
    return {**shared, **own}


def affine_backward_arguments(
    arguments: list[Tensor | None], keywords: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of bconv2d_affine_backward for the forward call given."""
    with torch.no_grad():
        output, _, pre, deviation = ops.bconv2d_affine(
            *arguments, **{**keywords, "save_pre_activation": True}
        )
    linear, from_pre = keywords["activation"] == 0, keywords["activation"] >= SILU
    saved = None if linear else (pre if from_pre else output)
    rest = [t if t is None else t.detach() for t in arguments]
    keywords = {k: v for k, v in keywords.items() if k != "save_pre_activation"}
    mask = [rest[i] is not None for i in (0, 1, 2, 3, 4, 6, 7, 8, 9)]
    grads = [torch.ones_like(output), torch.tensor(0.5, dtype=rest[1].dtype)]
    kept = deviation if deviation.ndim == 4 else None
    return [*grads, rest[0], saved, kept, *rest[1:]], {**keywords, "output_mask": mask}


def posterior(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    """loc, rho, prior loc, prior scale of sample_posterior and kl_normal."""
    loc = randn(4, 6, 3, 3, dtype=dtype, seed=2).requires_grad_(grad)
    rho = (randn(4, 6, 3, 3, dtype=dtype, seed=3) - 1.0).requires_grad_(grad)
    prior_loc = randn(4, 1, 1, 1, dtype=dtype, seed=6).requires_grad_(grad)
    prior_scale = (randn(1, dtype=dtype, seed=7).abs() + 0.5).requires_grad_(grad)
    return [loc, rho, prior_loc, prior_scale]


def draw_options(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of sample_posterior."""
    defaults: dict[str, Any] = {
        "prior": [0.0, 1.0],
        "with_kl": True,
        "scale_floor": FLOOR,
        "stream": 0,
        "num_samples": 1,
        "offset_add": 0,
        "element_offset": 0,
        "dtype": None,
    }
    assert changes.keys() <= defaults.keys()
    return {**defaults, **changes}


def posterior_list(dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of sample_posterior_list: a filter in KRSC memory, a matrix, two vectors."""
    loc, rho, prior_loc, prior_scale = (t.detach() for t in posterior(dtype))
    shapes = ((5, 7), (9,), (4,))
    locs = [loc.contiguous(memory_format=torch.channels_last)]
    rhos = [rho]
    for index, shape in enumerate(shapes):
        locs.append(randn(*shape, dtype=dtype, seed=20 + index))
        rhos.append(randn(*shape, dtype=dtype, seed=30 + index) - 1.0)
    for tensor in (*locs, *rhos, prior_loc, prior_scale):
        tensor.requires_grad_()
    seeds = torch.stack([noise_seed() + index for index in range(4)])
    narrow = None if dtype == torch.float64 else torch.bfloat16
    options = {
        "prior": [0.0, 1.0, 0.1, 0.5, 0.0, 2.0, 0.0, 1.0],
        "with_kl": [True, True, True, False],
        "scale_floor": FLOOR,
        "stream": [0, 0, 1, 1],
        "offset_add": 2,
        "element_offset": [0, 12, 0, 0],
        "cast": [True, True, False, False],
        "dtype": narrow,
    }
    return (locs, rhos, seeds, [prior_loc, *[None] * 3], [prior_scale, *[None] * 3]), options


def list_backward_arguments(
    args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of sample_posterior_list_backward for the forward call given."""
    with torch.no_grad():
        drawn, kl = ops.sample_posterior_list(*args, **keywords)
    grads = [torch.ones_like(sample) for sample in drawn]
    grads[1] = None  # a sample that was not used
    flat = [
        [t if t is None else t.detach() for t in part] if isinstance(part, list) else part
        for part in args
    ]
    keywords = {k: v for k, v in keywords.items() if k not in ("with_kl", "cast", "dtype")}
    present = [*flat[0], *flat[1], *flat[3], *flat[4]]
    mask = [tensor is not None for tensor in present]
    return (grads, torch.ones_like(kl), *flat), {**keywords, "output_mask": mask}
