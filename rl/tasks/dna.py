"""DNA to design: enhancers drawn from a motif grammar, or windows of a FASTA file.

The built-in data has a known law (`grammar`), so samples can be judged by their exact likelihood; the activity that its
labels come from is the reward `motif_activity`. Every prompt is the one character `>`; a task with levels asks for
each level of activity in turn instead, by the prompts `0`, `1`, ... of a model with these conditions (recipe ctrl).
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rewards.motifs import CONSENSUS, MotifActivity, load_matrices
from rl.tasks.base import Example, split_of
from rl.tasks.motif_grammar import LETTERS, MotifGrammar

PROMPT = ">"


class DnaTask:
    """Sequences of one length; the response is the sequence."""

    grid = None
    alphabet = LETTERS + PROMPT
    # Every response has the full length: no end token, which the model could choose.
    ends = False

    def __init__(
        self,
        length: int = 40,
        motif_rate: float = 0.008,
        data: str | None = None,
        label_noise: float = 0.3,
        levels: Sequence[float] = (),
    ):
        """
        Args:
            length: letters of a sequence (`sampler.gen_length`).
            motif_rate: how often each motif starts at a free position.
            data: FASTA file (also .gz); the middle `length` letters of its records take the place of the grammar.
            label_noise: standard deviation of the measurement noise on labels.
            levels: activities that divide level 0 from level 1, 1 from 2, ...

        Raises:
            ValueError: levels that do not grow, or no usable data file.
        """
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"task.params.levels must grow, got {list(levels)}")
        self.reward = "level_reached" if levels else "motif_activity"
        bounds = [None, *levels, None]
        self.levels = [list(ends) for ends in itertools.pairwise(bounds)] if levels else []
        self.length, self.label_noise = length, label_noise
        self.grammar = None if data else MotifGrammar(load_matrices(list(CONSENSUS)), length, motif_rate)
        self.records = _windows(data, length) if data else {}

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        return self._rows("train", [seed, step], count)

    def validation_examples(self, count: int) -> list[Example]:
        return self._rows("validation", [0], count)

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return self._rows("test", [seed], count)

    def file_examples(self, path: str) -> list[Example]:
        """All windows of a FASTA file."""
        return [{"prompt": PROMPT, "answer": text} for own in _windows(path, self.length).values() for text in own]

    def labelled(self, half: int, count: int, seed: int = 0) -> tuple[list[str], list[float]]:
        """Training sequences with noisy measurements of their activity; the halves 0 and 1 share no sequence."""
        # A sequence belongs to a half by its own letters, as it belongs to a split.
        found: list[str] = []
        batch = 0
        while len(found) < count:
            rows = self._rows("train", [seed, batch, 1], 2 * count)
            found += [row["answer"] for row in rows if zlib.crc32(row["answer"].encode()) % 2 == half]
            batch += 1
        sequences = found[:count]
        values = [score.value or 0.0 for score in MotifActivity()([PROMPT] * count, sequences)]
        noise = np.random.default_rng([seed, half, 2]).normal(0.0, self.label_noise, count)
        return sequences, (np.array(values) + noise).tolist()

    def reference_sequences(self) -> list[str]:
        """The most active 1 % of 20,000 training sequences, by their true activity."""
        texts = [row["answer"] for row in self._rows("train", [0, 3], 20_000)]
        values = [score.value or 0.0 for score in MotifActivity()([PROMPT] * len(texts), texts)]
        return [texts[index] for index in np.argsort(values)[-len(texts) // 100 :]]

    def _rows(self, split: str, key: list[int], count: int) -> list[Example]:
        rng = np.random.default_rng([zlib.crc32(split.encode()), *key])
        texts: list[str] = []
        if self.grammar is None:
            own = self.records[split]
            texts = [own[index] for index in rng.integers(len(own), size=count)]
        while len(texts) < count:
            assert self.grammar is not None
            texts += [text for text in self.grammar.draw(rng, count + count // 4) if split_of(text) == split]
        if self.levels:
            wanted = [index % len(self.levels) for index in range(count)]
            return [
                {"prompt": str(level), "answer": text, "level": level, "between": self.levels[level]}
                for level, text in zip(wanted, texts, strict=False)
            ]
        return [{"prompt": PROMPT, "answer": text} for text in texts[:count]]


def _windows(path: str, length: int) -> dict[str, list[str]]:
    """The middle of every record of a FASTA file, by split; records that are too short or hold N are left out.

    Raises:
        ValueError: no file, or nothing of that length in it.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"task.params.data {path!r} is not a file")
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for record in text.split(">")[1:]:
        sequence = "".join(record.split("\n")[1:]).upper()
        start = (len(sequence) - length) // 2
        window = sequence[max(start, 0) :][:length]
        if len(window) == length and not set(window) - set(LETTERS):
            splits[split_of(window)].append(window)
    if not all(splits.values()):
        raise ValueError(f"task.params.data {path}: too few FASTA records of {length} letters ACGT for three splits")
    return splits
