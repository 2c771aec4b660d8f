"""Random signs: the low bits of frozen words, on every path, and fair."""

from __future__ import annotations

import noise_golden as golden
import numpy as np
import torch

from fastbconv import noise


def test_golden_signs_on_each_instruction_set(isa: str) -> None:
    """A sign is the low bit of its word, 0 for +1, whichever kernel draws it."""
    with np.load(golden.FILE) as archive:
        frozen = archive["words"]
    for address, words in zip(golden.addresses().tolist(), frozen, strict=True):
        key, offset, stream, sample, first = address
        where = {"stream": stream, "sample": sample, "element_offset": first}
        skipped = first % 4
        want = 1.0 - 2.0 * (words.reshape(-1)[skipped:] & 1)
        for draw_signs in (noise.random_signs, noise.mirror_random_signs):
            got = draw_signs(torch.tensor([key, offset]), want.size, **where)
            assert got.dtype == torch.float32
            assert np.array_equal(got.numpy(), want), f"{isa}: {address}"


def test_signs_are_fair_and_unrelated() -> None:
    count = 1 << 20
    rows = [noise.random_signs(3, count, stream=s, sample=n) for s in (2, 3) for n in (0, 1)]
    rows.append(noise.standard_normal(3, count, stream="sign_input").sign())
    signs = torch.stack(rows)
    assert bool((signs.abs() == 1).all())
    mean, correlation = signs.mean(1), signs @ signs.T / count
    assert (mean * count**0.5).abs().max() < 4.5  # standard deviations
    assert ((correlation - torch.eye(5)) * count**0.5).abs().max() < 4.5
    lagged = torch.stack([(signs[0, lag:] * signs[0, :-lag]).mean() for lag in range(1, 65)])
    assert (lagged * count**0.5).abs().max() < 4.5
    assert torch.equal(noise.random_signs(3, (7, 5)), signs[0, :35].reshape(7, 5))
