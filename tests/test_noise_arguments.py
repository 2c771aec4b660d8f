"""What the functions of noise take and refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastbconv as fb
from fastbconv import noise


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint64])
def test_numpy_integers_are_integers(kind) -> None:
    assert noise.seed_tensor(kind(3)).tolist() == [3, 0]
    assert torch.equal(noise.derive(kind(3), kind(2)), noise.derive(3, 2))
    options = {"sample": kind(1), "element_offset": kind(5)}
    expected = noise.standard_normal(3, 4, sample=1, element_offset=5)
    assert torch.equal(noise.standard_normal(kind(3), kind(4), **options), expected)
    layer, x = fb.BayesConv2d(2, 2, 3), torch.ones(1, 2, 5, 5)
    assert torch.equal(layer(x, seed=kind(3)), layer(x, seed=3))
    with fb.fixed_sample(layer, kind(3)):
        y = layer(x)
    with fb.fixed_sample(layer, 3):
        assert torch.equal(layer(x), y)


def test_a_refused_seed_tells_its_type_with_its_module() -> None:
    for value, said in (
        (np.bool_(1), "numpy.bool"),
        (np.float32(1), "numpy.float32"),
        (True, "bool"),
    ):
        with pytest.raises(TypeError, match=rf"seed: expected an int or .*, got {said}_?$"):
            noise.seed_tensor(value)


def test_a_seed_without_values() -> None:
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    said = "seed: expected a tensor on cpu, got one on meta, which has no values"
    with pytest.raises(ValueError, match=said):
        noise.seed_tensor(seed, "cpu")
    with pytest.raises(ValueError, match=said):
        fb.BayesConv2d(2, 2, 3)(torch.ones(1, 2, 5, 5), seed=seed)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_any_integer_is_a_seed_of_a_compiled_function(dynamic: bool | None) -> None:
    """From its second value on an int is traced: the comparisons of as_int64 become guards."""
    torch._dynamo.reset()
    layer, x = fb.BayesLinear(4, 3), torch.randn(2, 4)
    compiled = torch.compile(
        lambda x, seed: layer(x, seed=seed), backend="eager", fullgraph=True, dynamic=dynamic
    )
    for seed in (1, 2, 3, -7, 2**63 + 5, -(2**63), 2**64 - 1, 2**63 - 1):
        assert torch.equal(compiled(x, seed), layer(x, seed=seed)), seed
