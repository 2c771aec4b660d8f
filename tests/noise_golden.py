"""The noise golden file: what it holds, how it was made, and the same numbers from NumPy alone.

``tests/data/noise_golden.npz`` pins the bits of the noise: a change of one of them is a breaking
release. ``python tests/noise_golden.py`` writes it anew from the one-element definition in
``csrc/core/noise.h``, compiled alone at -O0 (``tests/native/noise_golden.cpp``).

Arrays:
    address (n, 5) int64: key, offset, stream, sample, first element.
    normals (n, COUNT) uint32: bits of the float32 draws of COUNT elements from the first.
    words (n, BLOCKS, 4) uint32: the Philox words of BLOCKS blocks from first element // 4.
    parents (m, 3) int64: key, offset and child number of ``noise.derive``.
    children (m, 2) int64: the seeds of those children.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
FILE = TESTS / "data" / "noise_golden.npz"
COUNT = 150  # two whole groups of 64 of the vectorised kernels, and a rest
BLOCKS = 4
MASK64 = (1 << 64) - 1
WEIGHT, BIAS, DERIVE = 0, 1, 15
LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1

SEEDS = [
    (0, 0),
    (1, 0),
    (7, 0),
    (-1, -1),
    (HIGHEST, 5),
    (LOWEST, LOWEST),
    (0x243F6A8885A308D3, 0x13198A2E03707344),
    (-0x5BF6C7DDD660CE30, (1 << 32) - 1),
]
# Element numbers: aligned or not, around the 2^32nd counter, in its high word, and the last ones.
FIRSTS = [0, 1, 2, 3, 61, 1000, (4 << 32) - 70, (4 << 32) + 5, (5 << 36) + 3, (4 << 60) - COUNT]


def addresses() -> np.ndarray:
    """Every seed from element 0; one seed and a negative one everywhere; streams; samples."""
    rows = [(*seed, WEIGHT, 0, 0) for seed in SEEDS]
    rows += [(*seed, WEIGHT, 0, first) for seed in (SEEDS[2], SEEDS[7]) for first in FIRSTS[1:]]
    rows += [(*SEEDS[6], stream, 0, 2) for stream in (BIAS, 2, 3, 4, 5, DERIVE)]
    rows += [(*SEEDS[7], WEIGHT, sample, 0) for sample in (1, 2, 1000)]
    rows += [(7, HIGHEST, BIAS, 1, 0), (7, -1, BIAS, 1, 0), (7, 0, BIAS, (1 << 48) + 9, 0)]
    return np.array(rows, dtype=np.int64)


def parents() -> np.ndarray:
    return np.array(
        [(*seed, index) for seed in SEEDS for index in (0, 1, 2, 12345)], dtype=np.int64
    )


# --- the definition, in NumPy ---------------------------------------------------------------------


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 as in the paper: (..., 4) and (..., 2) of uint32 values -> (..., 4) uint64."""
    c, k = [np.asarray(part, dtype=np.uint64) for part in (counter, key)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    left, _, right, _ = np.moveaxis(c, -1, 0)
    first, second = c[..., 1], c[..., 3]
    for round_number in range(10):
        bumps = [(w * round_number) & 0xFFFFFFFF for w in (0x9E3779B9, 0xBB67AE85)]
        keys = [(k[..., j] + np.uint64(bumps[j])) & low for j in (0, 1)]
        a, b = left * np.uint64(0xD2511F53), right * np.uint64(0xCD9E8D57)
        left, first = (b >> shift) ^ first ^ keys[0], b & low
        right, second = (a >> shift) ^ second ^ keys[1], a & low
    return np.stack([left, first, right, second], axis=-1)


def words_of(key: int, offset: int, stream: int, sample: int, blocks: list[int]) -> np.ndarray:
    """(len(blocks), 4) words, in Python integers up to the counter."""
    moved, key = (offset + sample) & MASK64, key & MASK64
    counter = [
        (b & 0xFFFFFFFF, (b >> 32) | (stream << 28), moved & 0xFFFFFFFF, moved >> 32)
        for b in blocks
    ]
    return philox(np.array(counter), np.array([key & 0xFFFFFFFF, key >> 32]))


def normals_of(
    key: int, offset: int, stream: int, sample: int, first: int, count: int = COUNT
) -> np.ndarray:
    """(count,) draws in float64. The uniform is rounded to float32 as the kernels round it (near 1
    that rounding moves the draw by more than all their later steps); nothing else is."""
    blocks = list(range(first // 4, (first + count + 3) // 4))
    word = words_of(key, offset, stream, sample, blocks).reshape(-1, 2)
    half = (word[:, 0] >> np.uint64(1)).astype(np.float32).astype(np.float64)
    u = (half * 2.0**-31 + 2.0**-32).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    # The low 31 bits, as a signed number s in [-1, 1), run over half a turn; the top bit is a sign.
    s = ((word[:, 1] << np.uint64(1)) & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    sign = 1 - 2 * (word[:, 1] >> np.uint64(31)).astype(np.float64)
    angle = s.astype(np.float64) * 2.0**-31 * (np.pi / 2)
    pairs = np.stack([radius * np.cos(angle) * sign, radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[first % 4 : first % 4 + count]


def child_of(key: int, offset: int, index: int) -> tuple[int, int]:
    """The seed of one child, as two int64."""
    w = [int(x) for x in words_of(key, offset, DERIVE, 0, [index])[0]]
    both = np.array([w[0] | w[1] << 32, w[2] | w[3] << 32], dtype=np.uint64).view(np.int64)
    return int(both[0]), int(both[1])


# --- the file -------------------------------------------------------------------------------------


def native(requests: list[tuple[str, int, int, int, int, int]]) -> list[list[int]]:
    """Answers of the compiled definition."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "noise_golden"
        source = TESTS / "native" / "noise_golden.cpp"
        compiler = os.environ.get("CXX", "g++")
        flags = ["-std=c++17", "-O0", "-ffp-contract=off"]
        subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
        lines = "\n".join(" ".join(map(str, request)) for request in requests)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def make() -> dict[str, np.ndarray]:
    """The arrays of the file, from the compiled definition."""
    address, parent = addresses(), parents()
    requests = []
    for key, offset, stream, sample, first in address.tolist():
        seed = (key & MASK64, (offset + sample) & MASK64)
        requests.append(("normals", *seed, stream, first, COUNT))
        requests.append(("words", *seed, stream, first // 4, BLOCKS))
    for key, offset, index in parent.tolist():
        requests.append(("words", key & MASK64, offset & MASK64, DERIVE, index, 1))
    answers = native(requests)
    drawn, derived = answers[: 2 * len(address)], answers[2 * len(address) :]
    child = np.array(derived, dtype=np.uint32).view(np.uint64).view(np.int64)  # little-endian
    return {
        "address": address,
        "normals": np.array(drawn[0::2], dtype=np.uint32),
        "words": np.array(drawn[1::2], dtype=np.uint32).reshape(-1, BLOCKS, 4),
        "parents": parent,
        "children": child,
    }


if __name__ == "__main__":
    np.savez_compressed(FILE, **make())
