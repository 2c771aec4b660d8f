"""Statistics of the noise: two dozen draws of 2^20 normals under fixed seeds, more than 500 tests.

Each test gives a p-value that is uniform on (0, 1) for independent standard normals. No p-value may
be below 1e-6, and all together must look uniform; a bad sampler fails by hundreds of orders of
magnitude, which the last test shows on samplers that are bad on purpose. The seeds are fixed: what
passes once passes always.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import fft, special, stats

from fastbconv import noise

N = 1 << 20
BINS = 256
LAGS = 1024
LEAST = 1e-6

Draw = Callable[[], torch.Tensor]


def normals(key: int, offset: int = 0, **options: int | str) -> Draw:
    return lambda: noise.standard_normal(torch.tensor([key, offset]), N, **options)


def drawn(manual_seed: int) -> Draw:
    """As a layer does that is given no seed."""

    def draw() -> torch.Tensor:
        seed = noise.draw_seed(torch.Generator().manual_seed(manual_seed))
        return noise.standard_normal(seed, N)

    return draw


# Addresses near each other on purpose: what a model with equal layers, several samples and seeds
# 0, 1, 2, ... really uses.
DRAWS: dict[str, Draw] = {
    **{f"seed {key}": normals(key) for key in range(6)},
    **{f"sample {sample}": normals(0, sample=sample) for sample in range(1, 5)},
    **{f"layer {i}": lambda i=i: noise.standard_normal(noise.derive(0, i), N) for i in range(5)},
    **{f"stream {stream}": normals(0, stream=stream) for stream in ("bias", "local")},
    "next elements": normals(0, element_offset=N),
    "far elements": normals(0, element_offset=(4 << 32) - N // 2),
    "negative seed": normals(-1, -(1 << 63)),
    "high key word": normals(1 << 32),
    "next rank": normals(0, 1 << 48),
    "drawn 0": drawn(0),
    "drawn 1": drawn(1),
    # Read filter by filter, channel by channel: steps of 64 elements in the order of generation.
    "convolution": lambda: noise.weight_eps(99, (256, 64, 8, 8)).flatten(),
}


# --- p-values -------------------------------------------------------------------------------------


def two_sided(z: np.ndarray | float) -> np.ndarray | float:
    """Of standard-normal statistics."""
    return 2 * special.ndtr(-np.abs(z))


def both_tails(cdf: float, sf: float) -> float:
    return min(1.0, 2 * min(cdf, sf))


def p_chi_square(statistic: float, degrees: int) -> float:
    """Too good a fit counts as well as too bad a one."""
    law = stats.chi2(degrees)
    return both_tails(law.cdf(statistic), law.sf(statistic))


def p_count(count: int, probability: float, size: int) -> float:
    """Of a number of rare events, with half the probability of the number itself (mid-p)."""
    law = stats.binom(size, probability)
    half = 0.5 * law.pmf(count)
    return both_tails(law.cdf(count) - half, law.sf(count) + half)


def p_cells(counts: np.ndarray) -> float:
    """Chi-square of equally probable cells."""
    expected = counts.sum() / counts.size
    return p_chi_square(float(((counts - expected) ** 2).sum() / expected), counts.size - 1)


def p_kolmogorov(uniform: np.ndarray) -> float:
    """Kolmogorov-Smirnov, of values that should be uniform."""
    ordered = np.sort(uniform)
    steps = np.arange(ordered.size + 1) / ordered.size
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return float(stats.kstwobign.sf(distance * np.sqrt(ordered.size)))


def lag_scores(x: np.ndarray) -> np.ndarray:
    """Autocorrelation at lags 1..LAGS in standard deviations. The values have known mean 0 and
    variance 1, so the variance of the sum of n - k products is n - k exactly."""
    spectrum = fft.rfft(x, fft.next_fast_len(x.size + LAGS, real=True))
    sums = fft.irfft(np.abs(spectrum) ** 2, fft.next_fast_len(x.size + LAGS, real=True))
    lags = np.arange(1, LAGS + 1)
    return sums[lags] / np.sqrt(x.size - lags)


def p_least(p: np.ndarray) -> float:
    """Of the least of many independent p-values."""
    return float(-np.expm1(p.size * np.log1p(-p.min())))


# --- the tests of one draw ------------------------------------------------------------------------


def p_of_shape(z: np.ndarray) -> dict[str, float]:
    """Distribution of single values."""
    u, n = special.ndtr(z), z.size
    square = z * z
    cells = np.bincount((u * BINS).astype(np.intp).clip(0, BINS - 1), minlength=BINS)
    largest, least = float(z.max()), float(z.min())
    p = {
        "ks": p_kolmogorov(u),
        "chi-square": p_cells(cells),
        "mean": two_sided(z.sum() / np.sqrt(n)),
        "variance": two_sided((square - 1).sum() / np.sqrt(2 * n)),
        # Third and fourth Hermite polynomial: uncorrelated with the two above, variance 3! and 4!.
        "skewness": two_sided(((square - 3) * z).sum() / np.sqrt(6 * n)),
        "kurtosis": two_sided(((square - 6) * square + 3).sum() / np.sqrt(24 * n)),
        "beyond 4": p_count(int((np.abs(z) > 4).sum()), 2 * special.ndtr(-4), n),
        "beyond 3, signed": two_sided(
            (int((z > 3).sum()) - int((z < -3).sum())) / np.sqrt(2 * n * special.ndtr(-3))
        ),
    }
    for name, extreme in (("maximum", largest), ("minimum", -least)):
        below = float(np.exp(n * np.log1p(-special.ndtr(-extreme))))
        p[name] = both_tails(below, 1 - below)
    return p


def p_of_order(z: np.ndarray) -> dict[str, float | np.ndarray]:
    """Independence of values near each other; two entries have a value for each lag."""
    n, sign = z.size, z > 0
    correlations = lag_scores(z)
    of_squares = lag_scores((z * z - 1) / np.sqrt(2))
    runs = 1 + int((sign[1:] != sign[:-1]).sum())
    blocks = z.reshape(-1, LAGS).sum(1) / np.sqrt(LAGS)
    return {
        "each lag": two_sided(correlations),
        "each lag of squares": two_sided(of_squares),
        "lags": p_chi_square(float((correlations**2).sum()), LAGS),
        "greatest lag": p_least(two_sided(correlations)),
        "lags of squares": p_chi_square(float((of_squares**2).sum()), LAGS),
        "greatest lag of squares": p_least(two_sided(of_squares)),
        "runs of signs": two_sided((runs - (n + 1) / 2) / np.sqrt((n - 1) / 4)),
        "sums of blocks": p_kolmogorov(special.ndtr(blocks)),
        "signs of eight": p_cells(np.bincount(np.packbits(sign), minlength=256)),
    }


def p_of_pairs(z: np.ndarray) -> dict[str, float]:
    """Box-Muller pairs: cosine against sine, radius against angle, one pair against the next."""
    cosine, sine = z[0::2], z[1::2]
    radius = np.exp(-(cosine**2 + sine**2) / 2)
    angle = np.arctan2(sine, cosine) / (2 * np.pi) + 0.5

    def p_joint(a: np.ndarray, b: np.ndarray) -> float:
        cell = [(x * 16).astype(np.intp).clip(0, 15) for x in (a, b)]
        return p_cells(np.bincount(cell[0] * 16 + cell[1], minlength=256))

    return {
        "cosine and sine": two_sided((cosine * sine).sum() / np.sqrt(cosine.size)),
        "squares of cosine and sine": two_sided(
            ((cosine**2 - 1) * (sine**2 - 1)).sum() / (2 * np.sqrt(cosine.size))
        ),
        "joint cosine and sine": p_joint(special.ndtr(cosine), special.ndtr(sine)),
        "radius": p_kolmogorov(radius),
        "angle": p_kolmogorov(angle),
        "joint radius and angle": p_joint(radius, angle),
        "joint angles of a block": p_joint(angle[0::2], angle[1::2]),
        "joint sine and next cosine": p_joint(special.ndtr(sine[:-1]), special.ndtr(cosine[1:])),
    }


def p_of(z: np.ndarray) -> dict[str, np.ndarray]:
    """Every test of one draw; arrays of one value, or of one per lag."""
    parts = (p_of_shape(z), p_of_order(z), p_of_pairs(z))
    return {name: np.atleast_1d(p) for part in parts for name, p in part.items()}


def p_across(rows: np.ndarray) -> dict[tuple[int, int], float]:
    """Correlation of every two draws, element by element."""
    products = rows @ rows.T / np.sqrt(rows.shape[1])
    pairs = zip(*np.triu_indices(len(rows), 1), strict=True)
    return {(int(i), int(j)): float(two_sided(products[i, j])) for i, j in pairs}


# --- the draws and what they give -----------------------------------------------------------------


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    rows = np.stack([draw().numpy() for draw in DRAWS.values()])
    assert rows.dtype == np.float32
    assert rows.shape == (len(DRAWS), N)
    return rows


@pytest.fixture(scope="module")
def p_single(draws: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda row: p_of(row.astype(np.float64)), draws))
    return dict(zip(DRAWS, results, strict=True))


@pytest.fixture(scope="module")
def p_cross(draws: np.ndarray) -> dict[str, float]:
    """Float32 products: their rounding is far below the deviation of a sum of 2^20."""
    names = list(DRAWS)
    both = {
        "correlation": p_across(draws),
        "correlation of squares": p_across((draws * draws - 1) / np.float32(np.sqrt(2))),
    }
    return {
        f"{kind}, {names[i]} and {names[j]}": p
        for kind, pairs in both.items()
        for (i, j), p in pairs.items()
    }


@pytest.mark.parametrize("name", DRAWS)
def test_each_draw(name: str, p_single: dict[str, dict[str, np.ndarray]]) -> None:
    low = {test: p.min() for test, p in p_single[name].items() if not p.min() >= LEAST}
    assert not low


def test_draws_are_uncorrelated(p_cross: dict[str, float]) -> None:
    low = {test: p for test, p in p_cross.items() if not p >= LEAST}
    assert not low


def test_p_values_are_uniform(
    p_single: dict[str, dict[str, np.ndarray]], p_cross: dict[str, float]
) -> None:
    by_test = {
        test: np.concatenate([tests[test] for tests in p_single.values()])
        for test in p_single["seed 0"]
    }
    single = np.concatenate([p for p in by_test.values() if p.size == len(DRAWS)])
    cross = np.array(list(p_cross.values()))
    assert single.size >= 500
    assert cross.size >= 500
    for p in (single, cross, np.concatenate([single, cross]), *by_test.values()):
        assert stats.kstest(p, "uniform").pvalue > 1e-4


def counter_used_twice(z: np.ndarray) -> np.ndarray:
    blocks = z.copy().reshape(-1, 8)
    blocks[::8, 4:] = blocks[::8, :4]
    return blocks.reshape(-1)


def sign_used_twice(z: np.ndarray) -> np.ndarray:
    signs = np.sign(z)
    signs[64::64] = signs[63:-1:64]
    return np.abs(z) * signs


def few_bits(z: np.ndarray) -> np.ndarray:
    return special.ndtri((np.floor(special.ndtr(z) * 2**14) + 0.5) / 2**14)


# A fault of a generator, as a change of good draws, and a test that must see it.
BAD_SAMPLERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "shifted": (lambda z: z + 0.008, "mean"),
    "scaled": (lambda z: z * 1.006, "variance"),
    "cut at 4": (lambda z: z.clip(-4, 4), "beyond 4"),
    "thin tails": (lambda z: z - (z**3 - 3 * z) / 240, "kurtosis"),
    "uniform of 14 bits": (few_bits, "maximum"),
    "cosine without a sign": (
        lambda z: np.where(np.arange(z.size) % 2 == 0, np.abs(z), z),
        "joint cosine and sine",
    ),
    "counter used twice": (counter_used_twice, "lags"),
    "sign used twice": (sign_used_twice, "runs of signs"),
    "scale that follows the past": (
        lambda z: z * (1 + 0.02 * (np.abs(np.roll(z, 700)) - 0.8)),
        "greatest lag of squares",
    ),
    "scale that follows the partner": (
        lambda z: z * (1 + 0.01 * (np.abs(z.reshape(-1, 2)[:, ::-1]).reshape(-1) - 0.8)),
        "squares of cosine and sine",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLERS)
def test_bad_samplers_are_seen(name: str, draws: np.ndarray) -> None:
    change, test = BAD_SAMPLERS[name]
    assert p_of(change(draws[0].astype(np.float64)))[test].min() < LEAST
