"""Runs a table of problems through the operators, saves the results: ``path_cases.py OUT LIBRARY``.

test_cuda_path.py runs it twice, with the CPU's library and with that of the CUDA path, and compares
the files: two libraries that register the same operators cannot be in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from fastbconv import _native  # noqa: E402

AUTO, DIRECT, LIBRARY = 0, 1, 4
LINEAR, RELU, ELU, SIGMOID, TANH, SOFTPLUS, SILU = 0, 1, 4, 6, 7, 8, 13
NARROW = (torch.bfloat16, torch.float16)

# name: (sizes of op_samples.tensors, options); every direction of each is compared. Activations are
# smooth but for one: where a rounding moves a value over a kink, its gradient jumps.
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"N": 2, "C": 16, "H": 9, "W": 8, "K": 24}, {"activation": TANH}),
    "channels-last": (
        {"N": 2, "C": 8, "H": 7, "W": 9, "K": 17, "channels_last": True},
        {"activation": SILU, "keep_weight": True, "save_pre_activation": True},
    ),
    "linear-no-bias": (
        {"N": 3, "C": 5, "H": 6, "W": 5, "K": 7, "bias": "none"},
        {"activation": LINEAR},
    ),
    "linear-point-bias": (
        {"N": 2, "C": 3, "H": 11, "W": 10, "K": 6, "R": 5, "S": 5, "bias": "point"},
        {"activation": LINEAR, "stride": [2, 2], "padding": [2, 2, 2, 2]},
    ),
    "asymmetric": (
        {"N": 2, "C": 4, "H": 8, "W": 7, "K": 9, "prior": "trainable"},
        {"activation": ELU, "activation_param": 1.0, "stride": [2, 1],
         "padding": [0, 1, 2, 1]},
    ),
    "dilated-groups": (
        {"N": 2, "C": 12, "H": 9, "W": 9, "K": 8, "groups": 2, "prior": "tensor"},
        {"activation": SIGMOID, "dilation": [2, 2], "padding": [2, 2, 2, 2], "groups": 2},
    ),
    "depthwise": (
        {"N": 2, "C": 6, "H": 6, "W": 6, "K": 6, "groups": 6, "channels_last": True},
        {"activation": SOFTPLUS, "groups": 6},
    ),
    "samples": (
        {"N": 6, "C": 8, "H": 6, "W": 6, "K": 10, "channels_last": True},
        {"activation": TANH, "num_samples": 3, "offset_add": 5},
    ),
    "shared": (
        {"N": 2, "C": 6, "H": 5, "W": 6, "K": 8},
        {"activation": SILU, "num_samples": 3, "share_input": True, "keep_weight": True},
    ),
    "shared-groups": (
        {"N": 2, "C": 6, "H": 5, "W": 6, "K": 8, "groups": 2},
        {"activation": SILU, "num_samples": 2, "share_input": True, "groups": 2},
    ),
    "per-example": (
        {"N": 4, "C": 8, "H": 8, "W": 8, "K": 16, "channels_last": True},
        {"activation": SOFTPLUS, "num_samples": 4, "element_offset": [3, 1]},
    ),
    "one-pixel": (
        {"N": 5, "C": 19, "H": 1, "W": 1, "K": 11, "R": 1, "S": 1},
        {"activation": RELU, "padding": [0, 0, 0, 0]},
    ),
    "one-channel": ({"N": 2, "C": 1, "H": 12, "W": 12, "K": 6}, {"activation": TANH}),
    "padding-only": (
        {"N": 2, "C": 6, "H": 0, "W": 7}, {"activation": TANH, "padding": [2, 2, 1, 1]},
    ),
}  # fmt: skip


def convolution(dtype: torch.dtype, problem: str, algorithm: int) -> dict[str, torch.Tensor]:
    """Results and gradients of one problem."""
    import op_samples as samples

    from fastbconv import ops

    sizes, changes = PROBLEMS[problem]
    arguments = samples.tensors(**sizes, dtype=dtype)
    options = samples.options(**changes, algorithm=algorithm)
    output, kl, pre_activation, weight = ops.bconv2d(*arguments, **options)
    trained = samples.differentiable(arguments)
    generator = torch.Generator().manual_seed(1)
    by_output = torch.randn(output.shape, generator=generator).to(output.dtype)
    grads = torch.autograd.grad([output, kl], trained, [by_output, torch.full_like(kl, 0.01)])
    results = {"output": output, "kl": kl, "pre_activation": pre_activation, "weight": weight}
    results |= {f"grad{i}": grad for i, grad in enumerate(grads)}
    return {name: value.detach().clone() for name, value in results.items()}


def sampled_weight(dtype: torch.dtype, algorithm: int) -> dict[str, torch.Tensor]:
    """A convolution whose weight was rounded before."""
    import op_samples as samples

    from fastbconv import ops

    arguments = samples.tensors(2, 8, 7, 7, 9, dtype=dtype, channels_last=True)
    arguments[1] = arguments[1].detach().to(dtype).requires_grad_()
    arguments[2] = None
    output = ops.bconv2d(*arguments, **samples.options(algorithm=algorithm))[0]
    grads = torch.autograd.grad(output.float().square().sum(), samples.differentiable(arguments))
    results = {"output": output, **{f"grad{i}": grad for i, grad in enumerate(grads)}}
    return {name: value.detach() for name, value in results.items()}


def posteriors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The operators without a convolution."""
    import op_samples as samples

    from fastbconv import ops

    arguments, options = samples.posterior_list(dtype)
    drawn, kl = ops.sample_posterior_list(*arguments, **options)
    flat = [t for part in arguments if isinstance(part, list) for t in part if t is not None]
    loss = sum(s.to(dtype).square().sum() for s in drawn) + 0.3 * kl.sum()
    grads = torch.autograd.grad(loss, flat)
    seed = samples.noise_seed()
    loc, rho, *priors = samples.posterior(dtype)
    many, total = ops.sample_posterior(
        loc, rho, seed, *priors, **samples.draw_options(num_samples=3, element_offset=2)
    )
    results = {f"exact{i}": sample for i, sample in enumerate(drawn)}
    results |= {f"grad{i}": grad for i, grad in enumerate(grads)}
    results |= {"exact_draws": many, "kl": kl, "total": total}
    results["exact_normals"] = ops.standard_normal(seed, 5003, stream=4, sample=2, element_offset=3)
    results["exact_seeds"] = ops.derive_seeds(seed, 2, 7)
    counter, key = torch.arange(12).reshape(3, 4), torch.arange(6).reshape(3, 2)
    results["exact_words"] = ops.philox4x32_10(counter, key)
    return {name: value.detach().clone() for name, value in results.items()}


def cases() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, function, arguments)."""
    for dtype in (torch.float32, torch.float64):
        yield f"posteriors-{dtype}", posteriors, (dtype,)
    for dtype in (torch.float32, torch.float64, *NARROW):
        for problem in PROBLEMS:
            yield f"library-{problem}-{dtype}", convolution, (dtype, problem, AUTO)
            if dtype != torch.float64:
                yield f"direct-{problem}-{dtype}", convolution, (dtype, problem, DIRECT)
    for dtype in NARROW:
        yield f"library-sampled-{dtype}", sampled_weight, (dtype, LIBRARY)
        yield f"direct-sampled-{dtype}", sampled_weight, (dtype, DIRECT)


def main(out: str, library: str | None = None) -> None:
    if library is not None:
        _native._state.module = _native._import(Path(library))
        _native._state.decided = True
    results = {}
    for name, function, arguments in cases():
        try:
            results[name] = function(*arguments)
        except NotImplementedError as error:
            results[name] = {"refused": str(error)}
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
