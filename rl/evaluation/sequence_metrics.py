"""Metrics of sets of sampled sequences that do not know their rewards. Pure functions on texts.

A reward that is optimised too far shows here: samples alike (Hamming distance, uniqueness), or unlike data (k-mers).
The log-likelihood under a model is in `likelihood.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def kmer_correlation(texts: Sequence[str], reference: Sequence[str], k: int = 3) -> float:
    """Pearson correlation of the k-mer counts per text of two sets, over all k-mers of the letters of both.

    DRAKES (arXiv 2410.13643) gives it for k = 3 against the most active real enhancers. NaN when one of the sets uses
    all k-mers alike.

    Raises:
        ValueError: no texts on one side, or k below 1.
    """
    if not len(texts) or not len(reference) or k < 1:
        raise ValueError(f"k-mers need k >= 1 and texts on both sides, got k={k}, {len(texts)} and {len(reference)}")
    letters = sorted(set("".join(texts)) | set("".join(reference)))
    words = ["".join(word) for word in itertools.product(letters, repeat=k)]
    ours, theirs = (np.array([_kmers(group, k)[word] for word in words]) / len(group) for group in (texts, reference))
    if ours.std() == 0 or theirs.std() == 0:
        return float("nan")
    return float(np.corrcoef(ours, theirs)[0, 1])


def _kmers(texts: Sequence[str], k: int) -> Counter[str]:
    return Counter(text[i : i + k] for text in texts for i in range(len(text) - k + 1))


def mean_hamming(texts: Sequence[str]) -> float:
    """Mean share of positions in which two samples differ, over all pairs of one length; NaN without such a pair."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for text in texts:
        by_length[len(text)].append(text)
    shares, pairs = 0.0, 0
    for length, group in by_length.items():
        count = len(group) * (len(group) - 1) // 2
        if not length or not count:
            continue
        # The pairs that agree at a position are the pairs within each letter there: no loop over pairs.
        agreeing = sum(n * (n - 1) // 2 for column in zip(*group, strict=True) for n in Counter(column).values())
        shares += count - agreeing / length
        pairs += count
    return shares / pairs if pairs else float("nan")


def uniqueness(texts: Sequence[str]) -> float:
    """Distinct samples as a share of all; NaN for none."""
    return len(set(texts)) / len(texts) if len(texts) else float("nan")
