"""Intervals and pass@k: how sure an accuracy is. Pure functions on the standard library and NumPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), inside [0, 1] also at 0 and n successes.

    Args:
        successes: how many of the n trials succeeded.
        n: independent trials; with n = 0 nothing is known and the interval is (0, 1).
        confidence: two-sided coverage, in (0, 1).

    Raises:
        ValueError: successes outside [0, n] or confidence outside (0, 1).
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n], got successes={successes}, n={n}")
    z = _z(confidence)
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends one bound is exactly 0 or 1; rounding would leave 1e-18 or 1 - 1e-16.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def difference_interval(before: float, before_interval: Interval, after: float, after_interval: Interval) -> Interval:
    """Interval of `after - before` from the intervals of the two (Newcombe 1998, method 10; MOVER in general).

    The two are taken as independent. Measured on the same problems they are not, and the interval is then wider
    than need be: it errs to the side of "not distinguishable".
    """
    change = after - before
    low = change - math.hypot(after - after_interval[0], before_interval[1] - before)
    high = change + math.hypot(after_interval[1] - after, before - before_interval[0])
    return low, high


# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom, and for 10 and more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % t interval of the mean of at least 2 values, such as one for every seed."""
    return _T[min(len(values) - 1, 10) - 1] * statistics.stdev(values) / len(values) ** 0.5


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is right, given c right out of n (Chen et al. 2021, eq. 1).

    `1 - C(n-c, k) / C(n, k)`, computed as a sum of logarithms, so large n neither overflows nor loses digits.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c must lie in [0, n], got c={c}, n={n}")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n], got k={k}, n={n}; draw at least k samples per problem")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over problems.

    Problems are the unit that is drawn again, because the samples of one problem are not independent: give one
    value per problem (its accuracy, its pass@k, its mean reward).

    Args:
        values: float [N], one finite number per problem.
        confidence: two-sided coverage, in (0, 1).
        num_resamples: bootstrap draws.
        seed: the draws are a function of it; equal input gives an equal interval.

    Raises:
        ValueError: no values, values that are not a vector or not finite, or confidence outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values must hold one number per problem, got shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError("values holds a number that is not finite; mask failed problems out first")
    _z(confidence)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, 2_000_000 // array.size)  # at most 16 MB of indices at once
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        means[start:stop] = array[rng.integers(array.size, size=(stop - start, array.size))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
