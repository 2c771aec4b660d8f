"""The layers against cases recorded from ``tfp.layers``: output, each loss, every gradient."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tfp_cases
import torch
from tfp_cases import CASES

from fastbconv import noise
from fastbconv.layers import tfp

_EXPECTED = ("output", "losses", "grad.")


def _case_id(case: dict[str, Any]) -> str:
    return case["name"]


def _eps(data: dict[str, np.ndarray], part: str) -> torch.Tensor | None:
    value = data.get(f"{part}_eps")
    return None if value is None else torch.from_numpy(value)


@pytest.fixture(autouse=True)
def _quiet_low_precision():
    """float16 posteriors warn once per process when they are trained; any case may be first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training torch.float16")
        yield


@pytest.mark.parametrize("generic", [True, False], ids=["distributions", "closed-form"])
@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_recorded_case(case: dict[str, Any], generic: bool) -> None:
    data = tfp_cases.load(case)
    fns = (tfp_cases.inject(_eps(data, part)) for part in ("kernel", "bias"))
    layer = tfp_cases.build(case, data, *fns, generic=generic)
    assert [tuple(w["shape"]) for w in case["weights"]] == [tuple(w.shape) for w in layer.weights]
    assert [w["name"] for w in case["weights"]] == list(dict(layer.named_parameters()))
    assert layer.count_params() == case["count_params"]
    got = tfp_cases.run(layer, data)
    want = {key: value for key, value in data.items() if key.startswith(_EXPECTED)}
    if not case["has_gradients"]:
        want = {key: value for key, value in want.items() if not key.startswith("grad.")}
    tfp_cases.assert_close(got, want, case["tolerance"])
    if "kernel_sample" in data:
        sample = {"losses": [], "kernel": layer.kernel_posterior_tensor}
        expected = {"losses": [], "kernel": data["kernel_sample"]}
        tfp_cases.assert_close(sample, expected, case["tolerance"])


@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_fused_path_equals_generic_path(case: dict[str, Any]) -> None:
    """The fused path with ``seed=`` is the generic path fed with the noise of that seed."""
    data = tfp_cases.load(case)
    seed = torch.tensor([0x1234_5678_9ABC, 3])
    uses_mean = case["args"].get("kernel_posterior_tensor_fn") is not None
    kernel_fn = tfp.posterior_mean if uses_mean else tfp.posterior_sample
    fused = tfp_cases.build(case, data, kernel_fn, tfp.posterior_sample, generic=False)
    kernel_shape = fused.weights[0].shape
    rank = len(kernel_shape) - 2
    operator_shape = (*kernel_shape[::-1][:2], *kernel_shape[:rank])
    eps = noise.weight_eps(seed, operator_shape).permute(*range(2, rank + 2), 1, 0)
    names = dict(fused.named_parameters())
    fixed_kernel = uses_mean or "kernel_posterior_untransformed_scale" not in names
    random_bias = "bias_posterior_untransformed_scale" in names
    bias_eps = noise.weight_eps(seed, kernel_shape[-1:], stream="bias") if random_bias else None
    generic = tfp_cases.build(
        case,
        data,
        tfp_cases.inject(None if fixed_kernel else eps),
        tfp_cases.inject(bias_eps),
        generic=True,
    )
    got, want = tfp_cases.run(fused, data, seed=seed), tfp_cases.run(generic, data)
    tfp_cases.assert_close(got, want, case["tolerance"])


def test_all_recorded_cases_are_there() -> None:
    layers = [case["layer"] for case in CASES]
    assert layers.count("Convolution2DReparameterization") == 77
    assert layers.count("DenseReparameterization") == 3


@pytest.mark.parametrize("key", ["conv2d_reparam", "dense_reparam"])
def test_moments_over_4096_draws(key: str) -> None:
    """Means and variances agree with the recorded ones within five standard errors."""
    with np.load(tfp_cases.FOLDER / "statistics.npz") as archive:
        data = {k: archive[k] for k in archive.files}
    options: dict[str, Any] = {"bias_posterior_fn": tfp.default_mean_field_normal_fn()}
    if key == "dense_reparam":
        layer: Any = tfp.DenseReparameterization(4, **options)
    else:
        layer = tfp.Convolution2DReparameterization(3, 3, padding="same", **options)
    x = torch.from_numpy(data[f"{key}.input"])
    layer.build(tuple(x.shape))
    names = list(dict(layer.named_parameters()))
    layer.set_weights([data[f"{key}.var.{name}"] for name in names])
    draws = 4096
    with torch.no_grad():
        outputs = torch.stack([layer(x, seed=n) for n in range(draws)]).double().numpy()
    variance = data[f"{key}.var"]
    # Both sides are estimates: the variance of their difference is twice that of one. A mean has
    # variance v / n, a variance of normal outputs 2 v^2 / n.
    mean_error = np.abs(outputs.mean(0) - data[f"{key}.mean"]) / np.sqrt(2 * variance / draws)
    var_error = np.abs(outputs.var(0) - variance) / (variance * np.sqrt(4 / draws))
    assert mean_error.max() < 5
    assert var_error.max() < 5
    first, second = (outputs[:, i].reshape(draws, -1) for i in (0, 1))
    covariance = ((first - first.mean(0)) * (second - second.mean(0))).mean(0)
    spread = np.sqrt(2 * 2 * variance[0].reshape(-1) * variance[1].reshape(-1) / draws)
    assert (np.abs(covariance - data[f"{key}.cov01"]) / spread).max() < 5
