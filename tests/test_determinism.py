"""The same bits for any number of threads, from any thread, and on any instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import op_samples as samples
import pytest
import torch
from op_samples import DIRECT, LIBRARY, SILU, WINOGRAD, options, tensors
from torch import Tensor

from fastbconv import ops

NATIVE = samples.native()
THREADS = (1, 2, 3, 7)
ISAS = NATIVE.build_info()["isas"]

# Extents that no tile divides; rows, filters and channels enough for seven threads.
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({"N": 5, "C": 19, "H": 9, "W": 11, "K": 37}, {}),
    "channels_last": ({"N": 6, "C": 32, "H": 8, "W": 8, "K": 64, "channels_last": True}, {}),
    "float64": ({"N": 3, "C": 6, "H": 7, "W": 5, "K": 9, "dtype": torch.float64}, {}),
    "bfloat16": ({"N": 4, "C": 16, "H": 9, "W": 9, "K": 17, "dtype": torch.bfloat16}, {}),
    "bfloat16-odd": ({"N": 5, "C": 3, "H": 9, "W": 11, "K": 70, "dtype": torch.bfloat16}, {}),
    "bfloat16-many_weights": (
        {
            "N": 3,
            "C": 520,
            "H": 7,
            "W": 5,
            "K": 264,
            "dtype": torch.bfloat16,
            "channels_last": True,
        },
        {},
    ),
    "bfloat16-samples": (
        {"N": 6, "C": 34, "H": 6, "W": 6, "K": 24, "dtype": torch.bfloat16},
        {"num_samples": 3, "share_input": True},
    ),
    "samples": ({"N": 6, "C": 8, "H": 6, "W": 6, "K": 24}, {"num_samples": 3}),
    "shared": ({"N": 2, "C": 8, "H": 6, "W": 6, "K": 24}, {"num_samples": 3, "share_input": True}),
    # Taken apart by draws for one and two threads, shared by more.
    "many_samples": ({"N": 16, "C": 20, "H": 6, "W": 7, "K": 24}, {"num_samples": 8}),
    "many_shared": (
        {"N": 2, "C": 20, "H": 6, "W": 7, "K": 24},
        {"num_samples": 8, "share_input": True},
    ),
    "groups": ({"N": 2, "C": 12, "H": 9, "W": 7, "K": 8, "groups": 4}, {"groups": 4}),
    "depthwise": (
        {"N": 5, "C": 37, "H": 9, "W": 7, "K": 37, "groups": 37, "channels_last": True},
        {"groups": 37},
    ),
    "depthwise-samples": (
        {"N": 2, "C": 20, "H": 9, "W": 7, "K": 40, "groups": 20, "dtype": torch.bfloat16},
        {"groups": 20, "num_samples": 3, "share_input": True},
    ),
    "strided": (
        {"N": 4, "C": 3, "H": 15, "W": 13, "K": 33},
        {"stride": [2, 3], "dilation": [2, 1]},
    ),
    "point": ({"N": 2, "C": 5, "H": 6, "W": 6, "K": 7, "R": 1, "S": 1}, {"padding": [0, 0, 0, 0]}),
    "many_weights": ({"N": 2, "C": 520, "H": 7, "W": 5, "K": 264, "channels_last": True}, {}),
    # Contiguous: packed by whole rows, with more threads than those make tasks chunk by chunk.
    "rows_or_chunks": ({"N": 2, "C": 70, "H": 6, "W": 5, "K": 24}, {}),
    "bfloat16-rows_or_chunks": (
        {"N": 2, "C": 71, "H": 6, "W": 5, "K": 24, "dtype": torch.bfloat16},
        {},
    ),
    "many_tiles": ({"N": 3, "C": 70, "H": 18, "W": 15, "K": 130}, {}),
    "wide": ({"N": 64, "C": 64, "H": 8, "W": 8, "K": 64, "channels_last": True}, {}),
}


@pytest.fixture
def all_isas() -> Iterator[None]:
    """Gives the limit of instruction sets back."""
    before = NATIVE.current_isa()
    yield
    NATIVE.limit_isa(before)


def _results(sizes: dict[str, Any], changes: dict[str, Any], algorithm: int) -> dict[str, Tensor]:
    """Output, KL, weight and every gradient of one step."""
    arguments = tensors(prior="trainable", **sizes)
    keywords = options(algorithm=algorithm, keep_weight=True, activation=SILU, **changes)
    output, kl, _, weight = ops.bconv2d(*arguments, **keywords)
    (output.float().square().sum() + 0.5 * kl.float()).backward()
    grads = {
        f"grad {i}": t.grad for i, t in enumerate(arguments) if t is not None and t.requires_grad
    }
    return {"output": output.detach(), "kl": kl.detach(), "weight": weight, **grads}


def _assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


# Every problem by the direct kernels, 3x3 filters without stride and groups by Winograd too.
CASES = [pytest.param(*problem, DIRECT, id=f"{name}-direct") for name, problem in PROBLEMS.items()]
CASES += [
    pytest.param(*PROBLEMS[name], algorithm, id=f"{name}-{method}")
    for method, algorithm in WINOGRAD.items()
    for name in (
        "float32",
        "channels_last",
        "bfloat16",
        "samples",
        "shared",
        "many_weights",
        "many_tiles",
        "wide",
    )
]


@pytest.mark.parametrize(("sizes", "changes", "algorithm"), CASES)
def test_same_bits_for_any_number_of_threads(
    sizes: dict[str, Any], changes: dict[str, Any], algorithm: int
) -> None:
    torch.set_num_threads(THREADS[0])
    expected = _results(sizes, changes, algorithm)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        _assert_equal(_results(sizes, changes, algorithm), expected)


@pytest.mark.parametrize("algorithm", [DIRECT, *WINOGRAD.values()], ids=["direct", *WINOGRAD])
def test_same_bits_from_eight_python_threads(algorithm: int) -> None:
    sizes, changes = PROBLEMS["channels_last"]
    expected = _results(sizes, changes, algorithm)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: _results(sizes, changes, algorithm), range(16)):
            _assert_equal(got, expected)


def test_library_gives_the_same_bits_twice() -> None:
    sizes, changes = PROBLEMS["channels_last"]
    _assert_equal(_results(sizes, changes, LIBRARY), _results(sizes, changes, LIBRARY))


def _draws(count: int = 100_003) -> dict[str, Tensor]:
    seed = samples.noise_seed()
    loc, rho = samples.randn(96, 17, 3, 5), samples.randn(96, 17, 3, 5, seed=1)
    sample, kl = ops.sample_posterior(loc, rho, seed, None, None, **samples.draw_options())
    rest = {"prior": [0.0, 1.0], "scale_floor": samples.FLOOR}
    grads = torch.ops.fastbconv.kl_normal_backward(
        torch.ones(()), loc, rho, None, None, **rest, output_mask=[True, True, False, False]
    )
    noise = ops.standard_normal(seed, count, stream=0, sample=0, element_offset=5)
    return {"noise": noise, "sample": sample, "kl": kl, "by loc": grads[0], "by rho": grads[1]}


@pytest.mark.parametrize("isa", ISAS)
def test_noise_has_the_same_bits_on_every_instruction_set(isa: str, all_isas: None) -> None:
    expected = _draws()
    NATIVE.limit_isa(isa)
    assert NATIVE.current_isa() == isa
    _assert_equal(_draws(), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_any_instruction_set_computes_the_same_convolution(isa: str, all_isas: None) -> None:
    """Sums over channels may be ordered by the vector length, so these are close and not equal."""
    sizes, changes = PROBLEMS["float32"]
    expected = _results(sizes, changes, DIRECT)
    NATIVE.limit_isa(isa)
    got = _results(sizes, changes, DIRECT)
    for name in ("weight", "kl"):
        assert torch.equal(got[name], expected[name]), name
    for name, value in expected.items():
        # A difference of large sums may be small: rounding is that of the largest value.
        largest = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=0.0, atol=1e-6 * largest)
    torch.set_num_threads(3)
    _assert_equal(_results(sizes, changes, DIRECT), got)


@pytest.mark.parametrize("threads", THREADS)
def test_drawing_has_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(1)
    expected = _draws()
    torch.set_num_threads(threads)
    _assert_equal(_draws(), expected)


def test_two_threads_really_run() -> None:
    """Compiled without the OpenMP flag parallel loops are serial, without any other sign."""
    assert NATIVE.build_info()["openmp"]
    torch.set_num_threads(2)
    assert NATIVE.threads_used(8) == 2
    torch.set_num_threads(1)
    assert NATIVE.threads_used(8) == 1


def test_an_unknown_instruction_set_is_refused(all_isas: None) -> None:
    with pytest.raises(
        ValueError, match="isa: expected 'baseline', 'avx2' or 'avx512', got 'sse9'"
    ):
        NATIVE.limit_isa("sse9")
