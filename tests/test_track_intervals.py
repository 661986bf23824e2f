"""Intervals and pass@k against closed forms, published numbers and exact enumeration."""

import itertools
import math

import numpy as np
import pytest

from rl.track.intervals import bootstrap_interval, difference_interval, pass_at_k, wilson_interval


def test_wilson_bounds_solve_the_score_equation() -> None:
    """Wilson's bounds are the shares p with |phat - p| = z sqrt(p (1 - p) / n): checked without his formula."""
    for successes, n, z, confidence in ((7, 10, 1.959963984540054, 0.95), (585, 1000, 2.5758293035489004, 0.99)):
        for p in wilson_interval(successes, n, confidence):
            assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_wilson_at_the_ends() -> None:
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 20) == (0.0, pytest.approx(z2 / (20 + z2)))
    assert wilson_interval(20, 20) == (pytest.approx(20 / (20 + z2)), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (0, -1, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_nonsense(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"successes|confidence"):
        wilson_interval(successes, n, confidence)


def test_difference_interval_reproduces_newcombe() -> None:
    """Newcombe (1998), table II, row (a): 56/70 - 48/80 = 0.2, method 10 gives [0.0524, 0.3339]."""
    low, high = difference_interval(48 / 80, wilson_interval(48, 80), 56 / 70, wilson_interval(56, 70))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_pass_at_k_equals_enumeration() -> None:
    """Over all ways to choose k of n samples, the share that holds a right one."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            exact = sum(any(sample < c for sample in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_exact_for_large_n() -> None:
    n, c, k = 100_000, 3, 500
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # Python's integers do not overflow
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)
    # One right in 10^12: 1 - (1 - k / n) loses four digits to cancellation in the naive form.
    assert pass_at_k(10**12, 1, 1) == pytest.approx(1e-12, rel=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_nonsense(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pass_at_k(n, c, k)


def test_bootstrap_agrees_with_the_enumerated_bootstrap() -> None:
    """Four problems have 4^4 = 256 equally likely resamples: the exact percentiles are known."""
    values = [0.0, 1.0, 5.0, 10.0]
    means = sorted(sum(draw) / 4 for draw in itertools.product(values, repeat=4))
    low, high = bootstrap_interval(values, confidence=0.8, num_resamples=40_000)
    cumulative = [sum(mean <= bound + 1e-9 for mean in means) / 256 for bound in (low, high)]
    below = [sum(mean < bound - 1e-9 for mean in means) / 256 for bound in (low, high)]
    assert below[0] <= 0.1 + 0.01 and cumulative[0] >= 0.1 - 0.01
    assert below[1] <= 0.9 + 0.01 and cumulative[1] >= 0.9 - 0.01


def test_bootstrap_of_many_problems_is_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(3).random(3000)  # more than one chunk of draws
    low, high = bootstrap_interval(values, seed=7)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (low, high) == bootstrap_interval(values, seed=7)
    assert (low, high) != bootstrap_interval(values, seed=8)


@pytest.mark.parametrize("values", [[], [[1.0, 0.0]], [1.0, math.nan]])
def test_bootstrap_refuses_nonsense(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)
