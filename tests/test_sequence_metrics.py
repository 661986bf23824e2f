"""Metrics of sets of sequences, by hand and against the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rl.evaluation.sequence_metrics import kmer_correlation, mean_hamming, uniqueness


def test_kmer_correlation_by_hand() -> None:
    # The same texts, some twice: counts per text do not see the size of a set.
    assert kmer_correlation(["AAAT", "TTTA"], ["AAAT", "TTTA"] * 2) == pytest.approx(1.0, abs=1e-12)
    # All eight 3-mers of two letters: one set has AAA alone, the other every one but AAA once.
    assert kmer_correlation(["AAA"], ["AATTTATAA"]) == pytest.approx(-1.0, abs=1e-12)
    # k = 1: counts (3, 1, 0) and (1, 1, 2) of A, B, C are centred (5, -1, -4) / 3 and (-1, -1, 2) / 3.
    assert kmer_correlation(["AAAB"], ["ABCC"], k=1) == pytest.approx(-12 / math.sqrt(42 * 6), abs=1e-12)
    # A letter of one set alone is a k-mer that the other has 0 times.
    assert kmer_correlation(["CC"], ["AA"], k=1) == pytest.approx(-1.0, abs=1e-12)
    assert math.isnan(kmer_correlation(["AB"], ["AAB"], k=1))
    with pytest.raises(ValueError, match="texts on both sides"):
        kmer_correlation([], ["A"])


def test_hamming_and_uniqueness_by_hand() -> None:
    assert mean_hamming(["AAAA", "AATT", "TTTT"]) == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert mean_hamming(["AB", "AB"]) == 0.0
    # Texts of another length are in no pair.
    assert mean_hamming(["AB", "BB", "ABC"]) == 0.5
    assert math.isnan(mean_hamming(["A", "AB", "", ""]))
    assert uniqueness(["A", "B", "A", "C"]) == 0.75
    assert math.isnan(uniqueness([]))


def test_hamming_is_the_mean_over_pairs() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), length)) for length in rng.integers(5, 8, 40)]
    pairs = [p for p in itertools.combinations(texts, 2) if len(p[0]) == len(p[1])]
    shares = [sum(a != b for a, b in zip(*p, strict=True)) / len(p[0]) for p in pairs]
    assert mean_hamming(texts) == pytest.approx(sum(shares) / len(shares), abs=1e-12)
