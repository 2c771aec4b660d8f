"""The CUDA operators without a GPU: bindings and kernels on the interpreter (tests/simt).

A library is built in which they stand under the CPU key. The suites below then run on it, in
processes of their own, and its results are compared with those of the CPU's kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "simt"))

import host_library  # noqa: E402

# Which tests run, and what of them does not apply: (expression of pytest -k, reason).
NO_WINOGRAD = ("winograd", "CUDA has no Winograd kernels")
NO_FLOAT64 = "tensor cores do not multiply float64"
SUITES: dict[str, list[tuple[str, str]]] = {
    "test_ops.py": [
        NO_WINOGRAD,
        ("bconv2d_affine", "CUDA composes it: test_layers_estimators.py"),
        ("test_algorithms_that_cannot", "says what the CPU has"),
        ("test_library_stays_away", "tells of PyTorch's 16-bit convolution on the CPU"),
        ("test_deterministic_algorithms_exclude", "asks which kernel the CPU takes"),
        ("test_providers_agree", "runs Winograd too; test_results_are_those_of_the_cpu compares"),
    ],
    "test_posterior_list.py": [],
    "test_ops_gradients.py": [
        NO_WINOGRAD,
        ("test_gradcheck and direct", NO_FLOAT64),
    ],
    "test_functional.py": [
        ("computes_the_same and direct", "products of float32 are rounded to tf32"),
        ("integers_without_scale and bfloat16", "the sum is rounded before the bias is added"),
    ],
    "test_layers.py": [],
    "test_layers_estimators.py": [],
    "test_kl.py": [("of_exact_scales", "CUDA sums the terms of single weights, in float32")],
    "test_errors.py": [],
    "test_linear.py": [],
    "test_models.py": [],
    "test_grouped.py": [],
    "test_grouped_rounds.py": [],
    "test_determinism.py": [NO_WINOGRAD, ("float64-direct", NO_FLOAT64)],
}


@pytest.fixture(scope="module")
def library() -> Path:
    return host_library.build()


@pytest.mark.parametrize("suite", SUITES)
def test_suite_on_the_cuda_path(suite: str, library: Path) -> None:
    without = " and ".join(f"not ({expression})" for expression, _ in SUITES[suite])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / suite)]
    run = subprocess.run(
        [*command, *(["-k", without] if without else [])],
        env={**os.environ, host_library.LIBRARY_VARIABLE: str(library)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# Largest difference between the two paths, relative to the largest value of a result. float32 of
# the one-pass kernels has tf32 products; 16-bit results differ by one rounding of the last sum, and
# their gradients by that of the gradient before.
TOLERANCE = {
    ("library", torch.float64): 1e-11,
    ("library", torch.float32): 3e-5,
    ("library", torch.bfloat16): 2.0**-5,
    ("library", torch.float16): 2.0**-8,
    ("direct", torch.float32): 2.0**-6,
    ("direct", torch.bfloat16): 2.0**-5,
    ("direct", torch.float16): 2.0**-8,
}


def results(folder: Path, library: Path | None) -> dict[str, dict[str, torch.Tensor]]:
    out = folder / f"{'cpu' if library is None else 'cuda'}.pt"
    command = [sys.executable, str(HERE / "simt" / "path_cases.py"), str(out)]
    command += [] if library is None else [str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def both(
    library: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("paths")
    return results(folder, None), results(folder, library)


def differences(
    name: str, cpu: dict[str, torch.Tensor], cuda: dict[str, torch.Tensor], tolerance: float
) -> list[str]:
    found = []
    if cuda.keys() != cpu.keys():
        return [f"{name}: {sorted(cuda)} and not {sorted(cpu)}: {cuda.get('refused')}"]
    for key, expected in cpu.items():
        got = cuda[key]
        where = f"{name}, {key}"
        layout = (expected.shape, expected.dtype, expected.stride())
        if layout != (got.shape, got.dtype, got.stride()):
            found.append(f"{where}: {got.shape} {got.dtype} {got.stride()}, expected {layout}")
        elif key.startswith("exact") or key == "weight":
            if not torch.equal(got, expected):
                found.append(f"{where}: the bits differ")
        elif expected.numel() > 0:
            largest = expected.double().abs().max().clamp(min=1e-3)
            error = float((got.double() - expected.double()).abs().max() / largest)
            if not error <= tolerance:
                found.append(f"{where}: error {error:.2e}, at most {tolerance:.2e}")
    return found


@pytest.mark.parametrize("provider", ["library", "direct"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_results_are_those_of_the_cpu(both: tuple, provider: str, dtype: torch.dtype) -> None:
    cpu, cuda = both
    names = [name for name in cpu if name.startswith(provider) and name.endswith(str(dtype))]
    if (provider, dtype) not in TOLERANCE:
        assert names == []
        return
    found = [
        text
        for name in names
        for text in differences(name, cpu[name], cuda[name], TOLERANCE[provider, dtype])
    ]
    assert names
    assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_have_the_bits_of_the_cpu(both: tuple, dtype: torch.dtype) -> None:
    cpu, cuda = both
    name = f"posteriors-{dtype}"
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert differences(name, cpu[name], cuda[name], tolerance) == []


EXPLAIN = """
import json, sys
import torch
from fastbconv import _native
from pathlib import Path
native = _native._import(Path(sys.argv[1]))
question = dict(stride=[1, 1], padding=[1] * 4, dilation=[1, 1], groups=1, num_samples=1,
                share_input=False, channels_last=True, device="cuda")
rows = lambda dtype: native.explain_conv([8, 64, 8, 8], [64, 64, 3, 3], dtype=dtype, **question)
answers = {dtype: rows(dtype) for dtype in ("bfloat16", "float32", "float64")}
torch.backends.cudnn.allow_tf32 = False
answers["float32 without tf32"] = rows("float32")
print(json.dumps(answers))
"""


DETERMINISTIC = """
import sys
import torch
from fastbconv import _native
from pathlib import Path
_native._state.module = _native._import(Path(sys.argv[1]))
_native._state.built, _native._state.library = "jit", Path(sys.argv[1])
_native._state.decided = True
import fastbconv as fb
torch.use_deterministic_algorithms(True)
layer = fb.BayesConv2d(3, 4, 3, bayesian_bias=True)
with fb.algorithm("library"):
    layer(torch.randn(2, 3, 6, 6)).sum().backward()
assert layer.weight_rho.grad.isfinite().all()
"""


def test_deterministic_algorithms_allow_the_library(library: Path) -> None:
    command = [sys.executable, "-c", DETERMINISTIC, str(library)]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_explain_names_the_providers_of_cuda(library: Path) -> None:
    command = [sys.executable, "-c", EXPLAIN, str(library)]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    for dtype, rows in answers.items():
        assert {row["algorithm"] for row in rows if row["chosen"]} == {"library"}, dtype
        direct = [row for row in rows if row["algorithm"] == "direct"]
        assert [row["direction"] for row in direct] == ["fprop", "dgrad", "wgrad"]
        can = dtype in ("bfloat16", "float32")
        assert all(row["available"] == can for row in direct), dtype
        assert all("on request" in row["reason"] for row in direct if can)
        assert not any(row["available"] for row in rows if row["algorithm"].startswith("wino"))
    reasons = [row["reason"] for row in answers["float32 without tf32"]]
    assert any(reason is not None and "allow_tf32" in reason for reason in reasons)
