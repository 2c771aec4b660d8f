"""Cases recorded from ``tfp.layers``: reading them, and building the layer that each describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal

from fastbconv import regularizers
from fastbconv.layers import tfp

FOLDER = Path(__file__).parent / "data" / "tfp"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
CASES: list[dict[str, Any]] = MANIFEST["cases"]


def load(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a case."""
    with np.load(FOLDER / case["file"]) as archive:
        return {key: archive[key] for key in archive.files}


def inject(eps: Tensor | None) -> Callable[[Any], Tensor]:
    """The tensor function of a case: ``loc + scale * eps``, or the mean without noise."""

    def tensor_fn(distribution: Any) -> Tensor:
        if eps is None:
            return distribution.mean
        base = getattr(distribution, "base_dist", distribution)
        return base.loc + base.scale * eps.to(base.loc)

    return tensor_fn


def recorded_eps(data: dict[str, np.ndarray], part: str) -> Tensor | None:
    """The noise of a part; that of local reparameterisation is the kernel's."""
    names = ("kernel_eps", "affine_eps") if part == "kernel" else ("bias_eps",)
    found = [torch.from_numpy(data[name]) for name in names if name in data]
    return found[0] if found else None


def set_signs(layer: Any, sign_input: Any, sign_output: Any) -> None:
    """Gives a Flipout layer the signs of its calls."""
    signs = tuple(torch.as_tensor(sign) for sign in (sign_input, sign_output))
    layer._signs = lambda *_: signs


def _prior(spec: dict[str, Any] | None) -> Any:
    if spec is None:
        return None
    kind = spec["kind"]
    if kind == "mean_field_normal":
        return tfp.default_mean_field_normal_fn()
    if kind == "standard_normal":
        return tfp.default_multivariate_normal_fn

    def make(dtype: torch.dtype, shape: tuple[int, ...], *_: Any) -> Independent:
        ones = torch.ones(shape, dtype=dtype)
        if kind == "normal":
            base = Normal(spec["loc"] * ones, spec["scale"])
        elif kind == "laplace":
            base = Laplace(spec["loc"] * ones, spec["scale"])
        else:
            weights = torch.tensor([spec["pi"], 1 - spec["pi"]], dtype=dtype)
            scales = torch.tensor([spec["scale1"], spec["scale2"]], dtype=dtype)
            scales = scales.expand(*shape, 2)
            components = Normal(torch.zeros_like(scales), scales)
            base = MixtureSameFamily(Categorical(weights.expand(*shape, 2)), components)
        return Independent(base, len(shape))

    return make


def _posterior(spec: dict[str, Any] | None) -> Any:
    if spec is None:
        return None
    penalty = spec.get("loc_regularizer_l2")
    return tfp.default_mean_field_normal_fn(
        is_singular=spec["kind"] == "deterministic",
        loc_regularizer=None if penalty is None else regularizers.l2(penalty),
    )


def _divergence(spec: dict[str, Any] | None, generic: bool) -> Any:
    if spec is None:
        return None
    if spec["kind"] == "monte_carlo":
        return lambda q, p, w: q.log_prob(w) - p.log_prob(w)
    if spec["kind"] == "analytic_kl_scaled":
        return lambda q, p, w: spec["factor"] * tfp.kl_divergence(q, p, w)
    return (lambda q, p, w: tfp.kl_divergence(q, p, w)) if generic else tfp.kl_divergence


def build(
    case: dict[str, Any],
    data: dict[str, np.ndarray],
    kernel_tensor_fn: Any,
    bias_tensor_fn: Any,
    *,
    generic: bool,
) -> Any:
    """The layer of a case with its weights, ready to be called."""
    args = dict(case["args"])
    defaults = {
        "kernel_posterior_fn": {"kind": "mean_field_normal"},
        "kernel_prior_fn": {"kind": "standard_normal"},
        "kernel_divergence_fn": {"kind": "analytic_kl"},
        "bias_posterior_fn": {"kind": "deterministic"},
        "bias_prior_fn": None,
        "bias_divergence_fn": {"kind": "analytic_kl"},
    }
    functions = {key: args.pop(key, value) for key, value in defaults.items()}
    args.pop("kernel_posterior_tensor_fn", None)
    spec = args.pop("activity_regularizer", None)
    if spec is not None:
        spec = regularizers.L1L2(spec.get("l1", 0.0), spec.get("l2", 0.0))
    layer = getattr(tfp, case["layer"])(
        **args,
        activity_regularizer=spec,
        kernel_posterior_fn=_posterior(functions["kernel_posterior_fn"]),
        kernel_posterior_tensor_fn=kernel_tensor_fn,
        kernel_prior_fn=_prior(functions["kernel_prior_fn"]),
        kernel_divergence_fn=_divergence(functions["kernel_divergence_fn"], generic),
        bias_posterior_fn=_posterior(functions["bias_posterior_fn"]),
        bias_posterior_tensor_fn=bias_tensor_fn,
        bias_prior_fn=_prior(functions["bias_prior_fn"]),
        bias_divergence_fn=_divergence(functions["bias_divergence_fn"], generic),
    )
    layer.build(tuple(case["input_shape"]))
    layer.set_weights([data["var." + weight["name"]] for weight in case["weights"]])
    return layer


def run(layer: Any, data: dict[str, np.ndarray], **call: Any) -> dict[str, Any]:
    """Output, losses and every gradient, under the keys of the recorded arrays.

    Differentiates ``sum(output * cotangent) + sum(losses)`` also where the layer is frozen.
    """
    layer.requires_grad_(True)
    x = torch.from_numpy(data["input"]).requires_grad_()
    output = layer(x, **call)
    losses = layer.losses
    total = (output * torch.from_numpy(data["cotangent"])).sum()
    for loss in losses:
        total = total + loss
    total.backward()
    result = {"output": output, "grad.input": x.grad, "losses": losses}
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        result[f"grad.{name}"] = torch.zeros_like(parameter) if grad is None else grad
    return result


def error(got: Any, want: Any, atol: float) -> float:
    """Largest difference beyond ``atol``, relative to the largest expected magnitude."""
    got, want = (np.asarray(_array(value), np.float64) for value in (got, want))
    if got.shape != want.shape:
        return float("inf")
    if want.size == 0:
        return 0.0
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    difference = max(float(np.abs(got - want).max()) - atol, 0.0)
    return difference / float(np.abs(want).max()) if difference else 0.0


def _array(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, Tensor) else value


def assert_close(got: dict[str, Any], want: dict[str, Any], tolerance: dict[str, float]) -> None:
    """Every array of ``want``, and each loss on its own scale."""
    rtol, atol = tolerance["rtol"], tolerance["atol"]
    assert len(got["losses"]) == len(want["losses"])
    pairs = [
        (f"losses[{i}]", g, w)
        for i, (g, w) in enumerate(zip(got["losses"], want["losses"], strict=True))
    ]
    pairs += [(key, got[key], want[key]) for key in want if key != "losses"]
    wrong = {key: e for key, g, w in pairs if not (e := error(g, w, atol)) <= rtol}
    assert not wrong, f"beyond rtol {rtol}: {wrong}"
