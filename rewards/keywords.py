"""Sentences that must hold given words: the judge of the task `words`, and the reward it is trained on.

A word is found as a whole word in any case, or as its plural: `wolf` in "Wolves howl", not in "wolfhound". Plurals are
the word with s or es, y turned into ies, and f or fe into ves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.fluency import Fluency, answer_nats
from rewards.score import Score
from rewards.text import text_of

_JOINT = "['\u2019-]"
_WORD = re.compile(rf"[^\W_]+(?:{_JOINT}[^\W_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: "Don't the ice-cold robots?" has three."""
    return [word.lower() for word in _WORD.findall(text)]


def forms(word: str) -> set[str]:
    """A word and its plural, in lower case; the plural as every rule above would write it."""
    word = word.lower()
    plurals = {word + "s", word + "es"}
    if word.endswith("y"):
        plurals.add(word[:-1] + "ies")
    if word.endswith(("f", "fe")):
        plurals.add(word.removesuffix("e").removesuffix("f") + "ves")
    return {word, *plurals}


def found(keywords: Sequence[str], words: Sequence[str]) -> int:
    """How many of the keywords are among the words."""
    there = {part for word in words for part in (word, *re.split(_JOINT, word))}
    return sum(bool(forms(keyword) & there) for keyword in keywords)


def repetition(words: Sequence[str]) -> float:
    """Share of the words that stood before: 0.4 for "a cat is a cat"; 0 without words."""
    return 1 - len(set(words)) / len(words) if words else 0.0


class KeywordSentence:
    """1.0 for a sentence that holds every keyword, has `min_words` to `max_words` words and is fluent, else 0.0.

    Args:
        model, dtype: the frozen causal language model that reads it, see `rewards.fluency.AnswerNats`.
        max_nats: nats per token that a fluent sentence has at most.
        min_words, max_words: words of a sentence.

    Columns: `keywords`, a list of words per row. Metrics: `words` (1 when all are there), `nats`, `num_words`.
    """

    def __init__(
        self, model: str, max_nats: float, min_words: int = 6, max_words: int = 20, dtype: str = "bfloat16"
    ) -> None:
        self.max_nats, self.min_words, self.max_words = max_nats, min_words, max_words
        self.nats = answer_nats(model, dtype)
        self.__name__ = "keyword_sentence"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], keywords: Sequence[Sequence[str]], **columns: Any
    ) -> list[Score]:
        scores = []
        for text, wanted, nats in zip(completions, keywords, self.nats(prompts, completions), strict=True):
            words = words_of(text_of(text))
            there = found(wanted, words) == len(wanted)
            right = there and self.min_words <= len(words) <= self.max_words and nats <= self.max_nats
            metrics = {"words": float(there), "nats": nats, "num_words": float(len(words))}
            scores.append(Score(float(right), metrics=metrics))
        return scores


class KeywordFluency:
    """Share of the keywords x fluency x length: what to train on where `KeywordSentence` judges.

    A product, because a sum is paid for keywords without a sentence. Length is 1 from `min_words` to `max_words` and
    falls linearly to 0 at no word and at twice `max_words`.

    A language model likes a text that repeats itself. With `max_repetition` the product has a fourth factor, variety: 1
    up to this share of words that stood before (`repetition`), and falling linearly to 0 where every word did.

    Example: one of two words, fluency 0.25, 3 words where 6 are wanted: 0.5 x 0.25 x 0.5 = 0.0625. "A cat is a cat",
    with `max_repetition` 0.2, has variety (1 - 0.4) / (1 - 0.2) = 0.75.

    Args:
        model, floor, ceiling, power, dtype: see `Fluency`.
        min_words, max_words: see `KeywordSentence`.
        max_repetition: 1 leaves variety out.
    """

    def __init__(
        self,
        model: str,
        floor: float = 2.0,
        ceiling: float = 8.0,
        power: float = 2.0,
        min_words: int = 6,
        max_words: int = 20,
        dtype: str = "bfloat16",
        max_repetition: float = 1.0,
    ) -> None:
        if not 0 <= max_repetition <= 1:
            raise ValueError(f"max_repetition is a share of words, in 0..1, got {max_repetition}")
        self.fluency = Fluency(model, floor, ceiling, power, dtype)
        self.min_words, self.max_words, self.max_repetition = min_words, max_words, max_repetition
        self.__name__ = "keyword_fluency"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], keywords: Sequence[Sequence[str]], **columns: Any
    ) -> list[Score]:
        scores = []
        for fluent, text, wanted in zip(self.fluency(prompts, completions), completions, keywords, strict=True):
            words = words_of(text_of(text))
            share = found(wanted, words) / len(wanted)
            short, long = len(words) / self.min_words, 2 - len(words) / self.max_words
            length = max(0.0, min(1.0, short, long))
            repeated = repetition(words)
            variety = 1.0 if repeated <= self.max_repetition else (1 - repeated) / (1 - self.max_repetition)
            metrics = {**fluent.metrics, "words": float(share == 1), "repetition": repeated}
            scores.append(Score(share * float(fluent) * length * variety, metrics=metrics))
        return scores
