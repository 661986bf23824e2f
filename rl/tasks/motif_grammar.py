"""Enhancer-like DNA with a known law: motifs in a background chain, and the exact log-likelihood of any sequence.

From left to right, every motif that still fits starts at a free position with probability `rate` and emits a letter
from each of its columns; otherwise one background letter is drawn given the letter before it. The background is poor in
CG, as vertebrate genomes are. Which letters came from motifs is not seen, so a likelihood sums over all ways to cut
a sequence: a forward recursion over the positions at which something begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LETTERS = "ACGT"
# Row: letter before; column: letter. CG is a fifth of what its neighbours are.
_BACKGROUND = np.array(
    [[0.32, 0.18, 0.27, 0.23], [0.34, 0.27, 0.06, 0.33], [0.29, 0.22, 0.27, 0.22], [0.22, 0.20, 0.26, 0.32]]
)


class MotifGrammar:
    """A law over DNA sequences of one length."""

    def __init__(self, motifs: Mapping[str, Sequence[Sequence[float]]], length: int, rate: float):
        """
        Args:
            motifs: name -> [w][4] letter probabilities.
            rate: probability that a given motif starts at a free position where it fits.

        Raises:
            ValueError: rates that leave nothing for the background.
        """
        if length < 1 or not 0 <= rate * len(motifs) < 1:
            raise ValueError(
                f"task.params: length must be at least 1 and motif_rate times {len(motifs)} motifs below 1, got "
                f"{length} and {rate}"
            )
        self.length, self.rate = length, rate
        self.columns = [np.asarray(matrix, dtype=np.float64) for matrix in motifs.values()]
        self.columns = [column / column.sum(1, keepdims=True) for column in self.columns]
        # The chain's own law before the first letter.
        values, vectors = np.linalg.eig(_BACKGROUND.T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        self.first = stationary / stationary.sum()

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        """`count` sequences."""
        letters = np.zeros((count, self.length), dtype=np.int64)
        # First position of each sequence that nothing covers yet.
        free_from = np.zeros(count, dtype=np.int64)
        for i in range(self.length):
            free = free_from <= i
            fitting = [columns for columns in self.columns if i + len(columns) <= self.length]
            u = rng.random(count)
            for index, columns in enumerate(fitting):
                here = np.flatnonzero(free & (u >= index * self.rate) & (u < (index + 1) * self.rate))
                emitted = columns.cumsum(1)[None] < rng.random((len(here), len(columns), 1))
                letters[here, i : i + len(columns)] = emitted[..., :3].sum(2)
                free_from[here] = i + len(columns)
            rest = np.flatnonzero(free & (u >= len(fitting) * self.rate))
            law = np.broadcast_to(self.first, (len(rest), 4)) if i == 0 else _BACKGROUND[letters[rest, i - 1]]
            letters[rest, i] = (law.cumsum(1) < rng.random((len(rest), 1)))[:, :3].sum(1)
        return ["".join(row) for row in np.array(list(LETTERS))[letters]]

    def log_likelihood(self, sequences: Sequence[str]) -> np.ndarray:
        """float64 [B], exact; -inf for a letter outside ACGT.

        Raises:
            ValueError: a sequence of another length.
        """
        for sequence in sequences:
            if len(sequence) != self.length:
                raise ValueError(f"the grammar has sequences of {self.length} letters, got {len(sequence)}")
        ids = np.array([[LETTERS.find(letter) for letter in sequence] for sequence in sequences])
        known = (ids >= 0).all(1)
        ids = np.where(ids < 0, 0, ids)
        # reach[:, i]: log-probability of the first i letters with something beginning behind them.
        reach = np.full((len(ids), self.length + 1), -np.inf)
        reach[:, 0] = 0.0
        with np.errstate(divide="ignore"):
            emission = [np.log(columns) for columns in self.columns]
            background, first = np.log(_BACKGROUND), np.log(self.first)
            for i in range(self.length):
                fitting = [columns for columns in emission if i + len(columns) <= self.length]
                letter = first[ids[:, i]] if i == 0 else background[ids[:, i - 1], ids[:, i]]
                free = np.log1p(-self.rate * len(fitting))
                reach[:, i + 1] = np.logaddexp(reach[:, i + 1], reach[:, i] + free + letter)
                for columns in fitting:
                    width = len(columns)
                    inside = columns[np.arange(width), ids[:, i : i + width]].sum(1)
                    ends = reach[:, i] + np.log(self.rate or 0.0) + inside
                    reach[:, i + width] = np.logaddexp(reach[:, i + width], ends)
        return np.where(known, reach[:, -1], -np.inf)
