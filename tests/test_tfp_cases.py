"""The layers against cases recorded from ``tfp.layers``: output, each loss, every gradient."""

from __future__ import annotations

import collections
import warnings
from typing import Any

import numpy as np
import pytest
import tfp_cases
import torch
from tfp_cases import CASES

from fastbconv import noise
from fastbconv.layers import tfp
from fastbconv.layers.tfp_variables import from_operator, to_operator

_EXPECTED = ("output", "losses", "grad.")
_SAMPLES = {  # recorded name -> where a layer shows it
    "kernel_sample": "kernel_posterior_tensor",
    "perturbation_sample": "kernel_posterior_affine_tensor",
    "affine_sample": "kernel_posterior_affine_tensor",
}


def _case_id(case: dict[str, Any]) -> str:
    return case["name"]


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
    fns = (tfp_cases.inject(tfp_cases.recorded_eps(data, part)) for part in ("kernel", "bias"))
    layer = tfp_cases.build(case, data, *fns, generic=generic)
    if "sign_input" in data:
        tfp_cases.set_signs(layer, data["sign_input"], data["sign_output"])
    assert [tuple(w["shape"]) for w in case["weights"]] == [tuple(w.shape) for w in layer.weights]
    assert [w["name"] for w in case["weights"]] == list(dict(layer.named_parameters()))
    assert layer.count_params() == case["count_params"]
    got = tfp_cases.run(layer, data)
    want = {key: value for key, value in data.items() if key.startswith(_EXPECTED)}
    if not case["has_gradients"]:
        want = {key: value for key, value in want.items() if not key.startswith("grad.")}
    tfp_cases.assert_close(got, want, case["tolerance"])
    for recorded, name in _SAMPLES.items():
        if recorded in data:
            sample = {"losses": [], "sample": getattr(layer, name)}
            expected = {"losses": [], "sample": data[recorded]}
            tfp_cases.assert_close(sample, expected, case["tolerance"])


@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_fused_path_equals_generic_path(case: dict[str, Any]) -> None:
    """The fused path with ``seed=`` is the generic path fed with the noise of that seed."""
    data = tfp_cases.load(case)
    seed = torch.tensor([0x1234_5678_9ABC, 3])
    uses_mean = case["args"].get("kernel_posterior_tensor_fn") is not None
    kernel_fn = tfp.posterior_mean if uses_mean else tfp.posterior_sample
    fused = tfp_cases.build(case, data, kernel_fn, tfp.posterior_sample, generic=False)
    kernel, names = fused.weights[0], dict(fused.named_parameters())
    kernel_eps = from_operator(noise.weight_eps(seed, to_operator(kernel).shape))
    if "Local" in case["layer"]:
        kernel_eps = noise.standard_normal(seed, case["output_shape"], stream="local")
    if uses_mean or "kernel_posterior_untransformed_scale" not in names:
        kernel_eps = None
    random_bias = "bias_posterior_untransformed_scale" in names
    bias_eps = noise.weight_eps(seed, kernel.shape[-1:], stream="bias") if random_bias else None
    eps = (tfp_cases.inject(value) for value in (kernel_eps, bias_eps))
    generic = tfp_cases.build(case, data, *eps, generic=True)
    if "sign_input" in data:
        signs = (
            noise.random_signs(seed, data[name].shape, stream=name)
            for name in ("sign_input", "sign_output")
        )
        tfp_cases.set_signs(generic, *signs)
    got, want = tfp_cases.run(fused, data, seed=seed), tfp_cases.run(generic, data)
    tfp_cases.assert_close(got, want, case["tolerance"])
    if "Reparam" not in case["layer"].replace("LocalReparam", ""):
        sample = {"losses": [], "sample": fused.kernel_posterior_affine_tensor}
        expected = {"losses": [], "sample": generic.kernel_posterior_affine_tensor}
        tfp_cases.assert_close(sample, expected, case["tolerance"])


def test_all_recorded_cases_are_there() -> None:
    layers = collections.Counter(case["layer"] for case in CASES)
    assert layers == {
        "Convolution1DFlipout": 1,
        "Convolution1DReparameterization": 4,
        "Convolution2DFlipout": 4,
        "Convolution2DReparameterization": 77,
        "Convolution3DFlipout": 1,
        "Convolution3DReparameterization": 3,
        "DenseFlipout": 2,
        "DenseLocalReparameterization": 2,
        "DenseReparameterization": 3,
    }


STATISTICS = {
    "conv2d_reparam": lambda **o: tfp.Convolution2DReparameterization(3, 3, padding="same", **o),
    "conv2d_flipout": lambda **o: tfp.Convolution2DFlipout(3, 3, padding="same", **o),
    "dense_reparam": lambda **o: tfp.DenseReparameterization(4, **o),
    "dense_local": lambda **o: tfp.DenseLocalReparameterization(4, **o),
    "dense_flipout": lambda **o: tfp.DenseFlipout(4, **o),
}


@pytest.mark.parametrize("key", STATISTICS)
def test_moments_over_4096_draws(key: str) -> None:
    """Means, variances and a covariance agree with the recorded ones within five standard errors.

    The covariance of two rows tells the estimators apart: they share a kernel, or only the bias.
    """
    with np.load(tfp_cases.FOLDER / "statistics.npz") as archive:
        data = {k: archive[k] for k in archive.files}
    layer = STATISTICS[key](bias_posterior_fn=tfp.default_mean_field_normal_fn())
    x = torch.from_numpy(data[f"{key}.input"])
    layer.build(tuple(x.shape))
    names = list(dict(layer.named_parameters()))
    layer.set_weights([data[f"{key}.var.{name}"] for name in names])
    draws = 4096
    torch.set_num_threads(1)  # small outputs: starting threads would take longer than the work
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
