"""Initialisers with Keras's names: their formulas, names, configurations and messages."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbconv import initializers
from fastbconv.initializers import RandomNormal, VarianceScaling

KERNEL = (3, 5, 40, 30)  # fan in 600, fan out 450
FAN_IN, FAN_OUT = 600, 450
FAN_AVG = (FAN_IN + FAN_OUT) / 2
# "he_normal", "HeNormal": the two spellings of Keras.
NAMES = {
    "constant": "Constant",
    "glorot_normal": "GlorotNormal",
    "glorot_uniform": "GlorotUniform",
    "he_normal": "HeNormal",
    "he_uniform": "HeUniform",
    "identity": "Identity",
    "lecun_normal": "LecunNormal",
    "lecun_uniform": "LecunUniform",
    "ones": "Ones",
    "orthogonal": "Orthogonal",
    "random_normal": "RandomNormal",
    "random_uniform": "RandomUniform",
    "truncated_normal": "TruncatedNormal",
    "variance_scaling": "VarianceScaling",
    "zeros": "Zeros",
}
# What Keras's get_config gives.
CONFIGS: dict[str, dict[str, Any]] = {
    "Constant": {"value": 0},
    "Identity": {"gain": 1.0},
    "Ones": {},
    "Orthogonal": {"gain": 1.0, "seed": None},
    "RandomNormal": {"mean": 0.0, "stddev": 0.05, "seed": None},
    "RandomUniform": {"minval": -0.05, "maxval": 0.05, "seed": None},
    "TruncatedNormal": {"mean": 0.0, "stddev": 0.05, "seed": None},
    "VarianceScaling": {
        "scale": 1.0,
        "mode": "fan_in",
        "distribution": "truncated_normal",
        "seed": None,
    },
    "Zeros": {},
}


def draw(identifier: Any, shape: tuple[int, ...] = KERNEL, dtype: Any = torch.float32) -> Tensor:
    made = initializers.get(identifier)
    assert made is not None
    return made(shape, dtype)


def check_uniform(values: Tensor, limit: float) -> None:
    assert 0.999 * limit < values.abs().max().item() <= limit * (1 + 1e-6)
    assert values.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert abs(values.mean().item()) < 0.02 * limit


def check_normal(values: Tensor, stddev: float) -> None:
    """Not truncated: 4.5 % of the values are further away than two standard deviations."""
    assert values.std().item() == pytest.approx(stddev, rel=0.02)
    assert (values.abs() > 2 * stddev).float().mean().item() == pytest.approx(0.0455, rel=0.1)
    assert abs(values.mean().item()) < 0.03 * stddev


def check_truncated(values: Tensor, stddev: float) -> None:
    """``stddev`` is that of the values, after the truncation at twice that of the normal."""
    edge = 2 * stddev / 0.87962566103423978
    assert 0.99 * edge < values.abs().max().item() <= edge * (1 + 1e-6)
    assert values.std().item() == pytest.approx(stddev, rel=0.02)
    assert abs(values.mean().item()) < 0.03 * stddev
    # Half of a truncated normal lies within 0.6392 of its parent's deviations.
    inside = (values.abs() < 0.6392 * edge / 2).float().mean().item()
    assert inside == pytest.approx(0.5, abs=0.02)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "check", "size"),
    [
        ("random_normal", check_normal, 0.05),
        ("random_uniform", check_uniform, 0.05),
        ("truncated_normal", check_truncated, 0.05 * 0.87962566103423978),
        ("variance_scaling", check_truncated, math.sqrt(1 / FAN_IN)),
        ("glorot_normal", check_truncated, math.sqrt(1 / FAN_AVG)),
        ("glorot_uniform", check_uniform, math.sqrt(6 / (FAN_IN + FAN_OUT))),
        ("he_normal", check_truncated, math.sqrt(2 / FAN_IN)),
        ("he_uniform", check_uniform, math.sqrt(6 / FAN_IN)),
        ("lecun_normal", check_truncated, math.sqrt(1 / FAN_IN)),
        ("lecun_uniform", check_uniform, math.sqrt(3 / FAN_IN)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions_of_the_names(name: str, check: Any, size: float, dtype: Any) -> None:
    values = draw(name, dtype=dtype)
    assert (values.shape, values.dtype) == (KERNEL, dtype)
    check(values, size)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_variance_scaling(mode: str) -> None:
    fan = {"fan_in": FAN_IN, "fan_out": FAN_OUT, "fan_avg": FAN_AVG}[mode]
    stddev = math.sqrt(3 / fan)
    check_uniform(draw(VarianceScaling(3, mode, "uniform")), math.sqrt(3) * stddev)
    check_truncated(draw(VarianceScaling(3, mode, "normal")), stddev)
    check_normal(draw(VarianceScaling(3, mode, "Untruncated_Normal")), stddev)


@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"),
    [((), 1, 1), ((7,), 7, 7), ((7, 9), 7, 9), ((3, 7, 9), 21, 27), ((2, 3, 4, 7, 9), 168, 216)],
)
def test_fans(shape: tuple[int, ...], fan_in: int, fan_out: int) -> None:
    """The limit is that of the fans: no value is above it, and the largest of many is near it."""
    for mode, fan in (("fan_in", fan_in), ("fan_out", fan_out)):
        made = VarianceScaling(1.0, mode, "uniform")
        largest = max(made(shape, torch.float64).abs().max().item() for _ in range(200))
        assert 0.9 * math.sqrt(3 / fan) < largest <= math.sqrt(3 / fan)
    assert draw("glorot_uniform", (0, 0)).shape == (0, 0)


def test_truncated_normal_around_a_mean() -> None:
    values = draw(initializers.TruncatedNormal(-3.0, 0.1), (100, 100))
    assert values.mean().item() == pytest.approx(-3, abs=0.01)
    assert -3.2 <= values.min().item() < -3.19
    assert -2.81 < values.max().item() <= -2.8 + 1e-6


def test_fixed_values() -> None:
    assert torch.equal(draw("zeros", (2, 3)), torch.zeros(2, 3))
    assert torch.equal(draw("ones", (2, 3)), torch.ones(2, 3))
    assert torch.equal(draw("constant", (2,)), torch.zeros(2))
    assert torch.equal(draw(initializers.Constant(-3), ()), torch.tensor(-3.0))
    expected = torch.tensor([[2.0, 0, 0], [0, 2, 0]])
    assert torch.equal(draw(initializers.Identity(2.0), (2, 3)), expected)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 3, 2, 8), (2, 2, 1, 8), (1, 1)])
def test_orthogonal(shape: tuple[int, ...]) -> None:
    w = draw(initializers.Orthogonal(2.0), shape, torch.float64).reshape(-1, shape[-1])
    gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    torch.testing.assert_close(gram, 4 * torch.eye(len(gram), dtype=torch.float64))


def test_orthogonal_matrices_are_equally_likely() -> None:
    """An element of a uniform orthogonal matrix has mean 0 and variance 1 / rows."""
    first = torch.stack([draw("orthogonal", (3, 3)) for _ in range(3000)])
    assert first.mean(0).abs().max().item() < 0.05
    assert (first.square().mean(0) - 1 / 3).abs().max().item() < 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_devices_and_independence(name: str, dtype: torch.dtype) -> None:
    """Drawn in float32 and rounded; on the device of the context; afresh at each call."""
    torch.manual_seed(7)
    values = draw(name, (4, 6), dtype)
    assert (values.dtype, values.shape) == (dtype, (4, 6))
    if dtype != torch.float64:
        torch.manual_seed(7)
        assert torch.equal(values, draw(name, (4, 6)).to(dtype))
    fixed = name in ("constant", "identity", "ones", "zeros")
    assert torch.equal(values, draw(name, (4, 6), dtype)) == fixed
    with torch.device("meta"):
        assert draw(name, (4, 6), dtype).is_meta


@pytest.mark.parametrize("name", NAMES)
def test_names_and_configurations(name: str) -> None:
    made = initializers.get(name)
    kind = type(made)
    assert kind.__name__ == NAMES[name]
    assert made == initializers.get(NAMES[name]) == initializers.get(kind) == kind()
    assert initializers.get(made) is made
    assert hash(made) == hash(kind())
    assert made != initializers.get("zeros" if name == "ones" else "ones")
    config = json.loads(json.dumps(initializers.serialize(made)))
    assert config["class_name"] == NAMES[name]
    assert initializers.get(config) == made
    keras = {"class_name": NAMES[name], "config": CONFIGS.get(NAMES[name], {"seed": None})}
    assert initializers.get(keras) == made
    assert initializers.get({"module": "keras.initializers", "registered_name": None, **keras})


def test_aliases_and_other_forms() -> None:
    for alias, name in (("normal", "random_normal"), ("uniform", "random_uniform")):
        assert initializers.get(alias) == initializers.get(name)
    assert initializers.get("zero") == initializers.Zeros()
    assert initializers.get("one") == initializers.get({"class_name": "Ones"})
    assert initializers.get(None) is None
    assert initializers.get(torch.zeros) is torch.zeros
    assert repr(RandomNormal(1, 2)) == "RandomNormal(mean=1.0, stddev=2.0)"
    assert set(NAMES.values()) == {kind.__name__ for kind in initializers.CLASSES}


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("zeroes", ValueError, "w: expected one of 'constant', 'glorot_normal', .*, got 'zeroes'"),
        ("", ValueError, "w: expected one of .*, got ''"),
        (0, TypeError, r"w: expected None, a name, .* f\(shape, dtype\) -> tensor, got int"),
        (torch.zeros(2), TypeError, "w: expected .*, got Tensor"),
        ({}, ValueError, "w: expected a configuration {'class_name': name, .*, got {}"),
        ({"class_name": "Zeros", "config": 3}, ValueError, "w: expected a configuration"),
        ({"class_name": "Zero_s2"}, ValueError, "w: expected one of .*, got 'Zero_s2'"),
        (
            {"class_name": "Constant", "config": {"x": 1}},
            TypeError,
            "w, Constant: expected the keys 'value' alone, got 'x'",
        ),
        (
            {"class_name": "Constant", "cnfig": {"value": 1}},
            TypeError,
            "w: expected the keys 'class_name', 'config', .* alone, got 'cnfig'",
        ),
        (
            torch.nn.init.zeros_,
            TypeError,
            r"w: .* -> tensor, got torch.nn.init.zeros_, .* take fastbconv.initializers.Zeros\(\)",
        ),
        (
            functools.partial(torch.nn.init.xavier_normal_, gain=2.0),
            TypeError,
            r"xavier_normal_, .* in place.*take fastbconv.initializers.GlorotNormal\(\)",
        ),
        (torch.nn.init.dirac_, TypeError, "dirac_, .* write a function that returns the tensor"),
        (
            {"class_name": "HeNormal", "config": {"seed": 3}},
            NotImplementedError,
            "w, HeNormal: seed: expected None, got 3; .*torch.manual_seed",
        ),
    ],
)
def test_messages_of_get(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        initializers.get(given, "w")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: RandomNormal("0"), TypeError, "mean: expected a number, got str"),
        (lambda: RandomNormal(True), TypeError, "mean: expected a number, got bool"),
        (lambda: RandomNormal(0, -1), ValueError, "stddev: .* of at least 0, got -1"),
        (lambda: RandomNormal(math.nan), ValueError, "mean: expected a finite number, got nan"),
        (lambda: initializers.RandomUniform(1, 0), ValueError, "maxval: .* of at least 1, got 0"),
        (lambda: VarianceScaling(0), ValueError, "scale: expected a positive number, got 0"),
        (lambda: VarianceScaling(1, "fan"), ValueError, "mode: .*'fan_avg', got 'fan'"),
        (lambda: VarianceScaling(1, "fan_in", 2), ValueError, "distribution: .*, got 2"),
        (lambda: draw("orthogonal", (3,)), ValueError, r"two axes, got \(3,\)"),
        (lambda: draw("identity", (1, 2, 2)), ValueError, r"two axes, got \(1, 2, 2\)"),
        (lambda: initializers.Orthogonal(seed=1), NotImplementedError, "seed: expected None"),
    ],
)
def test_messages_of_the_classes(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_numpy_numbers() -> None:
    assert RandomNormal(np.float32(0.5), np.int64(2)) == RandomNormal(0.5, 2.0)
