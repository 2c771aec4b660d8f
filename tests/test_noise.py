"""The generator: known answers, frozen bits, addressing, seeds. Its statistics are tested apart."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import noise_golden as golden
import numpy as np
import pytest
import torch

import fastbconv as fb
from fastbconv import noise, ops

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = golden.addresses().tolist()
DRAWS = (ops.standard_normal, noise.mirror_standard_normal)


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    with np.load(golden.FILE) as file:
        return dict(file)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().numpy().view(np.uint32)


def draw(address: list[int], count: int = golden.COUNT) -> torch.Tensor:
    """Native draws of one row of the golden file."""
    key, offset, stream, sample, first = address
    return noise.standard_normal(
        torch.tensor([key, offset]), count, stream=stream, sample=sample, element_offset=first
    )


# --- Philox ---------------------------------------------------------------------------------------


def known_answers() -> torch.Tensor:
    """(3, 10): counter, key and result."""
    lines = (ROOT / "tests" / "data" / "philox4x32_10.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    assert [row[:2] for row in rows] == [["philox4x32", "10"]] * 3
    return torch.tensor([[int(word, 16) for word in row[2:]] for row in rows])


def philox_of_numpy(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(golden.philox(counter.numpy(), key.numpy()).astype(np.int64))


PHILOX = {
    "native": ops.philox4x32_10,
    "public": noise.philox4x32_10,
    "mirror": noise.mirror_philox4x32_10,
    "numpy": philox_of_numpy,
}


@pytest.mark.parametrize("name", PHILOX)
def test_philox_known_answers(name: str, isa: str) -> None:
    rows = known_answers()
    result = PHILOX[name](rows[:, :4].contiguous(), rows[:, 4:6].contiguous())
    assert result.dtype == torch.int64
    assert torch.equal(result, rows[:, 6:])


def test_philox_implementations_agree_on_random_and_extreme_words() -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 2**32, (4000, 6), generator=generator)
    extremes = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    words[:2000] = extremes[torch.randint(0, 5, (2000, 6), generator=generator)]
    counter, key = words[:, :4].contiguous(), words[:, 4:].contiguous()
    results = {name: philox(counter, key) for name, philox in PHILOX.items()}
    for name, result in results.items():
        assert torch.equal(result, results["numpy"]), name


def test_philox_broadcasts_leading_dimensions() -> None:
    counter, key = torch.arange(24).reshape(3, 2, 4), torch.tensor([5, 9])
    result = noise.philox4x32_10(counter, key)
    assert result.shape == (3, 2, 4)
    assert torch.equal(result[2, 1], noise.philox4x32_10(counter[2, 1], key))
    assert torch.equal(result, noise.mirror_philox4x32_10(counter, key))


def test_philox_errors() -> None:
    counter, key = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="counter: expected int64"):
        noise.philox4x32_10(counter.to(torch.int32), key)
    with pytest.raises(ValueError, match=r"counter: expected shape \(\.\.\., 4\), got \(3,\)"):
        noise.philox4x32_10(counter[:3], key)
    with pytest.raises(ValueError, match=r"key: expected shape \(\.\.\., 2\), got \(\)"):
        noise.philox4x32_10(counter, key[0])
    for wrong in (-1, 2**32):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            ops.philox4x32_10(counter + wrong, key)


# --- frozen bits ----------------------------------------------------------------------------------


def test_golden_file_is_the_compiled_definition(frozen: dict[str, np.ndarray]) -> None:
    fresh = golden.make()
    assert fresh.keys() == frozen.keys()
    for name, array in fresh.items():
        assert np.array_equal(array, frozen[name]), name
        assert array.dtype == frozen[name].dtype, name


@pytest.mark.parametrize("flush", [False, True])
def test_golden_normals_on_each_instruction_set(
    isa: str, frozen: dict[str, np.ndarray], flush: bool
) -> None:
    torch.set_flush_denormal(flush)  # no step has a subnormal number
    try:
        got = [bits(draw(address)) for address in ADDRESSES]
    finally:
        torch.set_flush_denormal(False)
    for address, have, want in zip(ADDRESSES, got, frozen["normals"], strict=True):
        assert np.array_equal(have, want), f"{isa}: {address}"


def test_golden_normals_are_those_of_float64(frozen: dict[str, np.ndarray]) -> None:
    for address, stored in zip(ADDRESSES, frozen["normals"], strict=True):
        error = np.abs(stored.view(np.float32) - golden.normals_of(*address))
        assert error.max() < 1e-6, address


def test_golden_words_and_children(frozen: dict[str, np.ndarray]) -> None:
    for address, want in zip(ADDRESSES, frozen["words"], strict=True):
        key, offset, stream, sample, first = address
        blocks = list(range(first // 4, first // 4 + golden.BLOCKS))
        assert np.array_equal(golden.words_of(key, offset, stream, sample, blocks), want), address
    for (key, offset, index), child in zip(
        golden.parents().tolist(), frozen["children"].tolist(), strict=True
    ):
        assert golden.child_of(key, offset, index) == tuple(child)
        assert noise.derive(torch.tensor([key, offset]), index).tolist() == child


def test_mirror_is_within_rounding_of_native(frozen: dict[str, np.ndarray]) -> None:
    for address, stored in zip(ADDRESSES, frozen["normals"], strict=True):
        key, offset, stream, sample, first = address
        mirror = noise.mirror_standard_normal(
            torch.tensor([key, offset]),
            golden.COUNT,
            stream=stream,
            sample=sample,
            element_offset=first,
        )
        assert mirror.dtype == torch.float32
        assert np.abs(mirror.numpy() - stored.view(np.float32)).max() < 1e-5, address


def test_mirror_is_within_rounding_of_native_on_many_draws() -> None:
    seed = torch.tensor([11, 12])
    native, mirror = (f(seed, 1 << 16, stream=0, sample=0, element_offset=0) for f in DRAWS)
    assert (native - mirror).abs().max() < 1e-5


def test_environment_variable_limits_the_instruction_set(frozen: dict[str, np.ndarray]) -> None:
    address = ADDRESSES[0]
    program = (
        "import torch, fastbconv as fb, fastbconv._native as n\n"
        f"z = fb.noise.standard_normal(torch.tensor({address[:2]}), {golden.COUNT})\n"
        "print(n.load().current_isa(), *z.view(torch.int32).tolist())"
    )
    environment = {**os.environ, "FASTBCONV_ISA": "baseline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    isa, *got = done.stdout.split()
    assert isa == "baseline"
    assert [int(word) & 0xFFFFFFFF for word in got] == frozen["normals"][0].tolist()


# --- addressing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_splits_do_not_matter(threads: int, isa: str) -> None:
    whole = noise.standard_normal(3, 70_001)
    torch.set_num_threads(threads)
    assert torch.equal(noise.standard_normal(3, 70_001), whole)
    pieces = [
        noise.standard_normal(3, size, element_offset=first)
        for first, size in ((0, 1), (1, 62), (63, 2), (65, 935), (1000, 69_001))
    ]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (4, 7), (6,), (3, 2, 5), (2, 3, 2, 2, 2)])
def test_weight_eps_is_standard_normal_in_filter_tap_channel_order(shape: tuple[int, ...]) -> None:
    options = {"sample": 3, "stream": "bias", "element_offset": 10}
    eps = noise.weight_eps(9, shape, **options)
    flat = noise.standard_normal(9, math.prod(shape), **options)
    assert eps.shape == shape
    assert eps.dtype == torch.float32
    if len(shape) == 1:
        assert torch.equal(eps, flat)
    else:
        ordered = eps.movedim(1, -1)  # K, taps, C
        assert ordered.is_contiguous()
        assert torch.equal(ordered.flatten(), flat)
    assert torch.equal(noise.standard_normal(9, shape, **options), flat.reshape(shape))


def test_seed_forms_and_samples() -> None:
    n, shape = -12, (3, 4, 2, 2)
    as_tensor = noise.weight_eps(torch.tensor([n, 0]), shape)
    assert torch.equal(noise.weight_eps(n, shape), as_tensor)
    assert torch.equal(noise.weight_eps((1 << 64) + n, shape), as_tensor)
    moved = noise.weight_eps(torch.tensor([n, 1]), shape)
    assert torch.equal(noise.weight_eps(n, shape, 1), moved)
    assert torch.equal(noise.weight_eps(torch.tensor([n, -1]), shape, 2), moved)
    assert not torch.equal(moved, as_tensor)


@pytest.mark.parametrize("draws", DRAWS, ids=["native", "mirror"])
@pytest.mark.parametrize(
    ("offset", "sample", "sum_"),
    [
        (-1, 1, 0),
        (golden.HIGHEST, 1, golden.LOWEST),
        (golden.LOWEST, golden.LOWEST, 0),
        ((1 << 32) - 1, 1, 1 << 32),
        (5, -6, -1),
    ],
)
def test_offsets_wrap_modulo_two_to_the_64(draws, offset: int, sample: int, sum_: int) -> None:
    one = draws(torch.tensor([4, offset]), 40, stream=0, sample=sample, element_offset=0)
    two = draws(torch.tensor([4, sum_]), 40, stream=0, sample=0, element_offset=0)
    assert torch.equal(one, two)


def test_every_part_of_the_address_matters() -> None:
    """Draws that differ in one part share no element; a normal repeats with probability 1e-8."""
    parts = [(key, offset, 0, 0) for key in (0, 1, 1 << 32, -1) for offset in (0, 1, 1 << 32, -5)]
    parts += [(0, 0, stream, 0) for stream in range(1, 16)]
    parts += [(0, 0, 0, first) for first in (4, 4 << 32, 4 << 59)]
    rows = torch.stack(
        [
            noise.standard_normal(torch.tensor([k, o]), 256, stream=stream, element_offset=first)
            for k, o, stream, first in parts
        ]
    )
    for i in range(len(rows)):
        for j in range(i):
            assert int((rows[i] == rows[j]).sum()) <= 1, (parts[i], parts[j])
            assert abs(torch.corrcoef(rows[[i, j]])[0, 1]) < 0.35  # 5.6 standard deviations


# --- seeds ----------------------------------------------------------------------------------------


def test_derived_children_are_distinct_and_uncorrelated() -> None:
    children = torch.stack([noise.derive(parent, i) for parent in (0, 1) for i in range(100)])
    assert len({tuple(row) for row in children.tolist()}) == 200
    draws = torch.stack([noise.standard_normal(child, 4096) for child in children[:50]])
    correlation = torch.corrcoef(torch.cat([draws, noise.standard_normal(0, 4096)[None]]))
    assert (correlation - torch.eye(51)).abs().max() < 0.09  # 5.8 standard deviations
    assert noise.derive(7, 3).tolist() == noise.derive(torch.tensor([7, 0]), 3).tolist()
    with pytest.raises(ValueError, match="index: expected a non-negative integer, got -1"):
        noise.derive(7, -1)


def test_equal_layers_of_a_fixed_sample_have_unrelated_noise() -> None:
    model = torch.nn.Sequential(*(fb.BayesConv2d(16, 16, 3) for _ in range(4)))
    sampled = []
    for position in range(4):
        with fb.fixed_sample(model, 5):
            # The identity basis as input shows the weight itself.
            basis = torch.eye(16 * 9).reshape(-1, 16, 3, 3)
            output = model[position](basis).squeeze()
        layer = model[position]
        loc = layer.weight.detach().reshape(16, -1)
        scale = torch.nn.functional.softplus(layer.weight_rho.detach()).reshape(16, -1)
        bias = 0 if layer.bias is None else layer.bias.detach()[:, None]
        sampled.append(((output.detach().T - loc - bias) / scale).flatten())
        eps = noise.weight_eps(noise.derive(5, position), (16, 16, 3, 3))
        assert torch.allclose(sampled[-1], eps.flatten(), atol=1e-3)
    correlation = torch.corrcoef(torch.stack(sampled))
    assert (correlation - torch.eye(4)).abs().max() < 0.11  # 5.3 standard deviations


def test_drawn_seeds_follow_the_generators() -> None:
    torch.manual_seed(3)
    first, second = noise.draw_seed(), noise.draw_seed()
    torch.manual_seed(3)
    assert torch.equal(noise.draw_seed(), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)

    state = torch.get_rng_state()
    own = [noise.draw_seed(torch.Generator().manual_seed(8)) for _ in range(2)]
    assert torch.equal(own[0], own[1])
    assert torch.equal(torch.get_rng_state(), state)  # the global one has not moved

    layer, image = fb.BayesLinear(4, 3), torch.ones(2, 4)
    torch.manual_seed(4)
    output = layer(image)
    assert not torch.equal(layer(image), output)
    torch.manual_seed(4)
    assert torch.equal(layer(image), output)


def test_rank_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise.rank_offset() == 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 3 if group else 40_000)
    # A rank beyond 2^15 reaches the sign bit: the sum with the offset wraps like any other.
    assert noise.rank_offset() == (40_000 << 48) - (1 << 64)
    with noise.data_parallel_group("group"):
        assert noise.rank_offset() == (40_000 << 48) - (1 << 64)
        with noise.data_parallel_group(object()):
            assert noise.rank_offset() == 3 << 48
        with noise.data_parallel_group(None):
            assert noise.rank_offset() == 0
    layer, image = fb.BayesLinear(4, 3, bias=False), torch.eye(4)
    torch.manual_seed(4)
    drawn = noise.draw_seed()
    torch.manual_seed(4)
    output = layer(image)
    moved = drawn + torch.tensor([0, noise.rank_offset()])
    assert torch.equal(output, layer(image, seed=moved))  # a given seed is not moved again
    assert not torch.equal(output, layer(image, seed=drawn))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (1.5, TypeError, "seed: expected an int or an int64 tensor of shape (2,), got float"),
        (True, TypeError, "got bool"),
        (torch.zeros(2), TypeError, "seed: expected an int64 tensor, got torch.float32"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "seed: expected shape (2,), got (3,)"),
        (torch.tensor(1), ValueError, "got ()"),
        (1 << 64, ValueError, "at most 64 bits"),
        (golden.LOWEST - 1, ValueError, "at most 64 bits"),
    ],
)
def test_seed_errors(seed: object, error: type[Exception], message: str) -> None:
    for call in (
        noise.seed_tensor,
        lambda s: noise.weight_eps(s, (2, 3)),
        lambda s: noise.derive(s, 0),
    ):
        with pytest.raises(error) as raised:
            call(seed)
        assert message in str(raised.value)


def test_draw_errors() -> None:
    with pytest.raises(ValueError, match="shape: expected non-negative sizes"):
        noise.standard_normal(0, (2, -1))
    with pytest.raises(ValueError, match="element_offset: expected a non-negative integer, got -4"):
        noise.standard_normal(0, 3, element_offset=-4)
    with pytest.raises(ValueError, match=r"stream: expected one of .*'weight'.*, got 'wieght'"):
        noise.standard_normal(0, 3, stream="wieght")
    seed = torch.tensor([0, 0])
    for stream in (-1, 16):
        with pytest.raises(ValueError, match="stream"):
            ops.standard_normal(seed, 3, stream=stream, sample=0, element_offset=0)
    with pytest.raises(ValueError, match="numel"):
        ops.standard_normal(seed, -1, stream=0, sample=0, element_offset=0)
    assert noise.standard_normal(0, 0).shape == (0,)
    assert noise.weight_eps(0, (3, 0, 2, 2)).shape == (3, 0, 2, 2)
