"""One short sentence with two given nouns: a first task for a real language model.

Every pair of nouns, in either order, belongs to one split; the nouns themselves are in all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from rewards.keywords import forms, repetition, words_of
from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records

# 120 concrete nouns, no one inside another's plural, and none whose plural is another word.
NOUNS = (
    *("actor", "airport", "apple", "arrow", "artist", "baker", "balloon", "banana", "basket", "beach", "bell"),
    *("bench", "bicycle", "blanket", "boat", "bottle", "branch", "bread", "bridge", "brother", "butter", "button"),
    *("cabin", "camera", "candle", "carpet", "castle", "cat", "chair", "cherry", "circus", "clock", "cloud", "coat"),
    *("cousin", "crown", "curtain", "desert", "doctor", "dog", "dolphin", "door", "dragon", "drum", "eagle"),
    *("elephant", "farmer", "feather", "fence", "ferry", "flag", "flower", "forest", "fountain", "fox", "garden"),
    *("giraffe", "guitar", "hammer", "harbor", "honey", "horse", "hotel", "island", "jacket", "kettle", "key"),
    *("kitchen", "kite", "ladder", "lamp", "lemon", "letter", "library", "lion", "map", "market", "meadow", "mirror"),
    *("monkey", "moon", "mountain", "needle", "neighbor", "nurse", "ocean", "orange", "owl", "painter", "parrot"),
    *("pencil", "piano", "pillow", "pirate", "pocket", "potato", "prince", "rabbit", "river", "robot", "rocket"),
    *("sailor", "school", "singer", "soldier", "spider", "spoon", "suitcase", "teacher", "tiger", "tower", "train"),
    *("treasure", "tunnel", "umbrella", "valley", "village", "violin", "wizard", "wolf"),
)


class WordsTask(DrawnTask):
    """Prompt `Write one short sentence with the words "wolf" and "piano".`, judged by `keyword_sentence`."""

    reward = "keyword_sentence"
    grid = None
    alphabet = None

    def file_examples(self, path: str) -> list[Example]:
        """Rows of any file with a column `keywords`, words joined by commas or a list."""
        rows = []
        for number, record in enumerate(read_records(path), start=1):
            given = record.get("keywords")
            words = [word.strip() for word in given.split(",")] if isinstance(given, str) else given
            if not isinstance(words, list) or not words or not all(words):
                raise ValueError(f"{path}: row {number} needs keywords, such as wolf,piano")
            rows.append(_example([str(word) for word in words]))
        return rows

    def measure(
        self, examples: Sequence[Example], completions: Sequence[str], reported: Mapping[str, float]
    ) -> dict[str, float]:
        """What the judge reported, and what no reward sees.

        distinct_frames: different sentences once their keywords are blanked, as a share of all. repetition: share of a
        sentence's words that stood in it before.
        """
        frames, repeated = set(), []
        for example, text in zip(examples, completions, strict=True):
            words, blanked = words_of(text), {form for word in example["keywords"] for form in forms(word)}
            frames.add(tuple("_" if word in blanked else word for word in words))
            repeated.append(repetition(words))
        count = max(1, len(completions))
        return {**reported, "distinct_frames": len(frames) / count, "repetition": sum(repeated) / count}

    def _propose(self, rng: random.Random) -> tuple[str, list[str]]:
        pair = rng.sample(NOUNS, 2)
        return " ".join(sorted(pair)), pair

    def _shown(self, problem: list[str], rng: random.Random) -> Example:
        return _example(problem)

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(f"the task words has only {found} {split} pairs of nouns where {count} are asked for")


def _example(words: list[str]) -> Example:
    quoted = [f'"{word}"' for word in words]
    listed = " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    return {"prompt": f"Write one short sentence with the words {listed}.", "keywords": words}
